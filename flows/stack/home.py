"""The directory of a stack: its lock, its secrets, its ports and the file with its settings."""

import asyncio
import fcntl
import json
import os
import secrets
import shlex
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flows.stack.service import StartError

# Below the range that systems take for outgoing connections: while a part restarts, its port stays free.
FIRST_PORT, LAST_PORT = 20_000, 29_999
PORT_PATIENCE = 3.0  # seconds that a port of the home may stay taken by a part that is just ending


class Home:
    """Everything a stack keeps between two starts. Only one stack at a time may hold it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env_file = path / "env"
        self._ports_file = path / "ports.json"

    def directory(self, name: str) -> Path:
        """A directory of the home, made if need be, that only its owner may enter."""
        directory = self.path / name
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the home. The lock ends with this process, however it ends.

        Raises:
            StartError: another stack holds it.
        """
        # Passable for root's own stack, because its PostgreSQL runs as another user.
        self.path.mkdir(parents=True, exist_ok=True, mode=0o711 if os.geteuid() == 0 else 0o700)
        with (self.path / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise StartError(
                    f"{self.path} is in use by another stack (process {lock.read().strip() or 'unknown'}). "
                    "Stop that one, or set ARCHIVER_HOME to another directory to run a second one beside it."
                ) from None
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield

    def secret(self, name: str) -> str:
        """The secret of that name, generated at its first use and kept."""
        file = self.directory("secrets") / name
        if not file.exists():
            write_private(file, secrets.token_hex(24) + "\n")
        return file.read_text().strip()

    async def port(self, name: str, *, host: str = "127.0.0.1", wanted: int = 0) -> int:
        """A free port for a part: the wanted one, else that of the last time, else any.

        Raises:
            StartError: the wanted port is taken.
        """
        ports: dict[str, int] = json.loads(self._ports_file.read_text()) if self._ports_file.exists() else {}
        preferred = wanted or ports.get(name, 0)
        if preferred and not await _becomes_free(host, preferred):
            if wanted:
                raise StartError(f"port {wanted} of {host}, wanted for the {name}, is taken by another program")
            preferred = 0
        others = {port for part, port in ports.items() if part != name}
        while not preferred:
            candidate = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT + 1)
            preferred = candidate if candidate not in others and _is_free(host, candidate) else 0
        write_private(self._ports_file, json.dumps(ports | {name: preferred}, indent=2) + "\n")
        return preferred

    def write_env(self, env: Mapping[str, str]) -> None:
        """Write the settings of the running stack so that a shell can read them: `. $ARCHIVER_HOME/env`."""
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in sorted(env.items())]
        write_private(self.env_file, "".join(lines))


async def _becomes_free(host: str, port: int) -> bool:
    for _ in range(int(PORT_PATIENCE / 0.1)):
        if _is_free(host, port):
            return True
        await asyncio.sleep(0.1)
    return False


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do it: connections of an earlier server that are still closing don't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner may read; whoever reads it sees all of it or the former one."""
    draft = file.with_name(f"{file.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    draft.replace(file)
