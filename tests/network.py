"""Hosts on one machine: network namespaces behind a bridge, each with a link of its own.

It has to run as root, in network and mount namespaces of its own (`sandbox`): then all of it, also what a failure
leaves, goes with the processes in them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.compose import ROOT

NETWORK = "10.77.0"
NAMESPACES = Path("/run/netns")


def missing() -> str:
    """What this machine lacks to have such hosts, as a reason to skip; empty if nothing."""
    if os.geteuid() != 0:
        return "needs root, for namespaces of its own"
    programs = [program for program in ("unshare", "ip", "tc") if not shutil.which(program)]
    return f"needs {', '.join(programs)} (util-linux and iproute2), for namespaces of its own" if programs else ""


def sandbox(module: str, *arguments: str) -> list[str]:
    """The command that runs a module in namespaces of its own; whatever it starts ends with it."""
    unshare = ["unshare", "--net", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    return [*unshare, "--mount-proc", sys.executable, "-m", module, *arguments]


def run_in_sandbox(module: str, seconds: float) -> str:
    """What a module prints that runs in a sandbox, with a directory of its own as its argument; it has to end well.

    Args:
        seconds: that it may take.
    """
    # Not below pytest's own directory, which is closed to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="archiver-hosts-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o711)
        command = sandbox(module, directory)
        done = subprocess.run(
            command, cwd=ROOT, env=plain_environment(), capture_output=True, text=True, timeout=seconds, check=False
        )
        logs = "".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in Path(directory).rglob("logs/*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    return done.stdout


def plain_environment() -> dict[str, str]:
    """The caller's environment, without what is about this system or a proxy."""
    ours = ("ARCHIVER_", "AWS_", "PREFECT_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {name: value for name, value in env.items() if not name.lower().endswith("_proxy")}


class Host:
    """A host with an address; the process that makes it is the one with the bridge, which the others reach too."""

    def __init__(self, name: str, number: int, directory: Path) -> None:
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self.directory = directory / name
        self.directory.mkdir()
        self._link = f"to-{name}"
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", self._link, "master", "bridge", "up")
        for command in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _run("ip", "-n", name, *command.split())

    def inside(self, names: dict[str, list[str]]) -> list[str]:
        """The command that runs another one on this host, where names have these addresses."""
        hosts = self.directory / "hosts"
        lines = [f"{address} {name}\n" for name, addresses in names.items() for address in addresses]
        hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        script = 'mount --bind "$0" /etc/hosts; exec "$@"'
        # `ip netns exec` has given it a mount namespace of its own.
        return [_program("ip"), "netns", "exec", self.name, "sh", "-euc", script, str(hosts)]

    def cut_off(self) -> None:
        """As if somebody had pulled its cable."""
        _run("ip", "link", "set", self._link, "down")

    def connect(self) -> None:
        """Put the cable back."""
        _run("ip", "link", "set", self._link, "up")

    def limit(self, megabits: float) -> None:
        """Have it send no more than so much per second."""
        shape = f"root tbf rate {int(megabits * 1000)}kbit burst 256kb latency 100ms"
        _run("ip", "netns", "exec", self.name, "tc", "qdisc", "replace", "dev", "eth0", *shape.split())


def make_network() -> str:
    """The bridge, to which hosts are connected; gives back the address of the machine that has it."""
    NAMESPACES.mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "tmpfs", str(NAMESPACES))
    for command in (
        "link set lo up",
        "link add bridge type bridge",
        f"addr add {NETWORK}.1/24 dev bridge",
        "link set bridge up",
    ):
        _run("ip", *command.split())
    return f"{NETWORK}.1"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def _program(name: str) -> str:
    return shutil.which(name) or name
