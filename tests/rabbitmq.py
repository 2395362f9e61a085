"""A RabbitMQ broker of the tests' own: free ports, its own data, name and cookie."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the one in the PATH changes the user
START_SECONDS = 60.0
STOP_SECONDS = 20.0


def missing_programs() -> list[str]:
    """What has to be installed before a broker can be started."""
    return [name for name, there in (("rabbitmq-server", PROGRAM.exists()), ("erl", shutil.which("erl"))) if not there]


class RabbitMQ:
    """One broker, which can be stopped and started again with its data."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._port, distribution, names = _free_ports(3)
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}/"
        nothing = home / "nothing"
        nothing.touch()
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),  # of the Erlang cookie
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_PORT": str(names),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"archiver-{self._port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": str(home / "data"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(home / "pid"),
            "RABBITMQ_CONF_ENV_FILE": str(nothing),
            "RABBITMQ_CONFIG_FILE": str(home / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
            # The machine is shared, and a broker of a test has little to do.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
        }

    @classmethod
    @contextmanager
    def running(cls, home: Path) -> Iterator["RabbitMQ"]:
        """A broker, for as long as it is needed."""
        broker = cls(home)
        broker.start()
        try:
            yield broker
        finally:
            broker.stop()
            # The broker's name server stays behind by itself.
            subprocess.run(["epmd", "-kill"], env=broker.environment, capture_output=True, timeout=10, check=False)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [PROGRAM], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._home
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, (self._home / "log").read_text()
            assert time.monotonic() < deadline, (self._home / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop it; its durable queues stay."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_SECONDS)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1) as connection:
            # To what is no AMQP it answers with the protocol it speaks.
            connection.settimeout(2)
            connection.sendall(b"AMQP\x00\x00\x00\x00")
            return connection.recv(4) == b"AMQP"
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports
