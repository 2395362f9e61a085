"""A Ceph cluster of one monitor, one disk and one RADOS Gateway on loopback: a real S3 server.

Needs the Debian packages ceph-mon, ceph-osd, radosgw and openssl. The gateway answers over HTTP and,
with a certificate of its own, over HTTPS.
"""

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self
from uuid import uuid4

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "openssl", "radosgw", "radosgw-admin")
START_SECONDS = 90

ACCESS_KEY = "gateway-access"
SECRET_KEY = "gateway-secret"

CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_v2}/0,v1:127.0.0.1:{mon_v1}/0]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
# Without authentication there is no key to encrypt with.
ms mon client mode = crc
run dir = {home}
admin socket =
crash dir = {home}
log file = {home}/$name.log
mon cluster log file = {home}/cluster.log
# One disk holds everything once.
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail crit = 0

[mon.a]
mon data = {home}/mon
auth allow insecure global id reclaim = false

[osd.0]
osd data = {home}/osd
osd objectstore = bluestore
bluestore block size = {capacity}
osd memory target = 939524096

[client.rgw]
rgw data = {home}/rgw
rgw frontends = beast endpoint=127.0.0.1:{http} ssl_endpoint=127.0.0.1:{https} \
ssl_certificate={home}/gateway.pem ssl_private_key={home}/gateway.key
rgw run sync thread = false
rgw gc obj min wait = 5
rgw gc processor period = 10
"""


class GatewayFailed(Exception):
    """The cluster did not start; the message names the log to read."""


def missing_programs() -> list[str]:
    """What has to be installed before a gateway can be started here."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


class RadosGateway:
    """A running cluster; its gateway can be killed and started again."""

    def __init__(self, home: Path, capacity: int) -> None:
        self.home = home
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._http, self._https, mon_v2, mon_v1 = _free_ports(4)
        self._fsid = str(uuid4())
        self._monitors = (f"v2:127.0.0.1:{mon_v2}", f"v1:127.0.0.1:{mon_v1}")
        self._configuration = home / "ceph.conf"
        self._configuration.write_text(
            CONFIGURATION.format(
                fsid=self._fsid,
                home=home,
                capacity=capacity,
                http=self._http,
                https=self._https,
                mon_v2=mon_v2,
                mon_v1=mon_v1,
            )
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http}"

    @property
    def tls_url(self) -> str:
        return f"https://127.0.0.1:{self._https}"

    @property
    def certificate(self) -> Path:
        """What a client has to trust to use `tls_url`."""
        return self.home / "gateway.pem"

    @property
    def pids(self) -> list[int]:
        """The server's processes."""
        return [process.pid for process in self._processes.values()]

    @classmethod
    @contextmanager
    def running(cls, home: Path, capacity: int = 8 << 30) -> Iterator[Self]:
        """Start a cluster below `home`, and stop it in the end.

        Args:
            capacity: bytes its disk holds; a sparse file.

        Raises:
            GatewayFailed: if it does not answer in time.
        """
        gateway = cls(home, capacity)
        try:
            gateway._start()
            yield gateway
        finally:
            gateway._stop()

    def kill_gateway(self) -> None:
        """End the gateway at once, as a crash would; monitor and disk go on."""
        process = self._processes.pop("rgw")
        process.kill()
        process.wait()

    def start_gateway(self) -> None:
        """Start the gateway and wait until it answers."""
        self._spawn("rgw", "radosgw", "-f", "-n", "client.rgw")
        self._await("rgw", self._answers)

    def add_key(self, access: str, secret: str) -> None:
        """Let the user in with a further pair."""
        self._administer("key", "create", "--key-type=s3", *_pair(access, secret))

    def remove_key(self, access: str) -> None:
        """Let the user in no longer with this pair."""
        self._administer("key", "rm", "--key-type=s3", f"--access-key={access}")

    def _start(self) -> None:
        for directory in ("mon", "osd", "rgw"):
            (self.home / directory).mkdir()
        self._make_certificate()
        self._start_monitor()
        self._start_disk()
        self.start_gateway()
        self._administer("user", "create", "--display-name=test", *_pair(ACCESS_KEY, SECRET_KEY))

    def _administer(self, *command: str) -> None:
        self._run("radosgw-admin", "-n", "client.rgw", *command, "--uid=test")

    def _make_certificate(self) -> None:
        days, subject = ("-days", "2"), ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
        files = ("-keyout", f"{self.home}/gateway.key", "-out", f"{self.home}/gateway.pem")
        command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *days, *subject, *files)
        subprocess.run(command, check=True, capture_output=True)

    def _start_monitor(self) -> None:
        monitor_map = f"{self.home}/monmap"
        addresses = f"[{','.join(self._monitors)}]"
        command = ("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", addresses, monitor_map)
        subprocess.run(command, check=True, capture_output=True)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitor_map)
        self._spawn("mon", "ceph-mon", "-f", "-i", "a")
        self._await("mon", lambda: self._succeeds("ceph", "--connect-timeout", "2", "mon", "stat"))

    def _start_disk(self) -> None:
        identity = str(uuid4())
        self._run("ceph", "osd", "new", identity)
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", identity)
        self._spawn("osd", "ceph-osd", "-f", "-i", "0")
        self._await("osd", lambda: b" 1 up" in self._run("ceph", "osd", "stat"))

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [program, "--conf", str(self._configuration), *arguments]

    def _run(self, program: str, *arguments: str) -> bytes:
        done = subprocess.run(self._command(program, *arguments), capture_output=True, timeout=START_SECONDS)
        if done.returncode:
            raise GatewayFailed(f"{program} {' '.join(arguments)}: {done.stderr.decode(errors='replace')[-2000:]}")
        return done.stdout

    def _succeeds(self, program: str, *arguments: str) -> bool:
        return not subprocess.run(self._command(program, *arguments), capture_output=True, timeout=20).returncode

    def _spawn(self, name: str, program: str, *arguments: str) -> None:
        with (self.home / f"{name}.out").open("ab") as output:
            command = self._command(program, *arguments)
            self._processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def _await(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self._processes[name].poll() is not None or time.monotonic() > deadline:
                raise GatewayFailed(f"{name} of the Ceph cluster did not start; see {self.home}/{name}.out")
            time.sleep(0.1)

    def _stop(self) -> None:
        for name in ("rgw", "osd", "mon"):
            if (process := self._processes.pop(name, None)) is None:
                continue
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _pair(access: str, secret: str) -> tuple[str, str]:
    return f"--access-key={access}", f"--secret-key={secret}"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [int(listener.getsockname()[1]) for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()
