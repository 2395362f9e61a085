"""One supervised process: how to start it, when it is ready, how to stop it."""

import asyncio
import logging
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from blocks.errors import ArchiverError

logger = logging.getLogger(__name__)

LOG_LIMIT = 10_000_000  # bytes; a log that is longer moves to <name>.log.1
LOG_TAIL = 25  # lines shown of the log of a service that did not start
PROBE_INTERVAL = 0.2  # seconds
KILL_TIMEOUT = 1  # seconds; a process that waits for a dead network mount cannot be killed
TETHER = Path(__file__).with_name("tether.py")


class StartError(ArchiverError):
    """A part of the stack did not start; the message holds the end of its log."""


async def _at_once() -> None:
    """The readiness of a service that is ready as soon as it runs."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A process to be kept running.

    `ready` returns when the service can be used and raises while it cannot; it also does what every start
    needs before others use the service (a database, a bucket). `prepare` runs before every start.
    Times are in seconds. `orphan_signal` is what the process gets when its supervisor was killed.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path | None = None
    user: str | None = None
    prepare: Callable[[], Awaitable[None]] = _at_once
    ready: Callable[[], Awaitable[None]] = _at_once
    ready_timeout: float = 60
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout: float = 4
    orphan_signal: signal.Signals = signal.SIGKILL


class ServiceProcess:
    """The process of a service: at most one at a time, its output in a log of bounded size."""

    def __init__(self, service: Service, log: Path) -> None:
        self.service = service
        self.log = log
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """The process id, or None while there is no such process."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process and running else None

    async def start(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            StartError: it could not be prepared, ended, or was not ready in time (it is then stopped).
        """
        await self._spawn()
        problem: Exception | None = None
        try:
            async with asyncio.timeout(self.service.ready_timeout):
                while self.pid is not None:
                    try:
                        await self.service.ready()
                        if self.pid is not None:  # else another program has answered
                            return
                    except Exception as error:
                        problem = error
                        await asyncio.sleep(PROBE_INTERVAL)
        except TimeoutError:
            await self.stop()
            raise self._start_error(f"was not ready after {self.service.ready_timeout:g} s ({problem})") from problem
        raise self._start_error(f"ended at its start ({await self.ended()})")

    async def run(self) -> None:
        """Run the process to its end, for at most `ready_timeout` seconds.

        Raises:
            StartError: it failed, or did not end in time (it is then stopped).
        """
        await self._spawn()
        try:
            async with asyncio.timeout(self.service.ready_timeout):
                how = await self.ended()
        except TimeoutError:
            await self.stop()
            raise self._start_error(f"did not end within {self.service.ready_timeout:g} s") from None
        if how != "exit code 0":
            raise self._start_error(f"failed ({how})")

    async def ended(self) -> str:
        """Wait for the end of the process and say how it ended."""
        if self._process is None:
            return "not started"
        code = await self._process.wait()
        self._kill_group()
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    async def stop(self) -> None:
        """Ask the process to end, and kill it if it has not after `stop_timeout` seconds."""
        if self._process is None:
            return
        if self.pid is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(self.service.stop_signal)
            try:
                async with asyncio.timeout(self.service.stop_timeout):
                    await self._process.wait()
            except TimeoutError:
                logger.warning("%s did not stop in %g s; killing it", self.service.name, self.service.stop_timeout)
        self._kill_group()
        try:
            async with asyncio.timeout(KILL_TIMEOUT):
                await self._process.wait()
        except TimeoutError:
            logger.warning("%s (pid %d) does not even end on SIGKILL", self.service.name, self._process.pid)

    def trim_log(self) -> None:
        """Move the log aside when it is too long. The process may go on writing: it appends."""
        if self.log.exists() and self.log.stat().st_size > LOG_LIMIT:
            shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
            os.truncate(self.log, 0)
            self._log_start = 0

    async def _spawn(self) -> None:
        try:
            await self.service.prepare()
        except (OSError, ValueError) as error:
            raise StartError(f"{self.service.name} could not be prepared: {error}") from error
        self.trim_log()
        with self.log.open("ab") as log:
            log.write(f"--- {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z} {self.service.name} starts\n".encode())
            log.flush()
            self._log_start = log.tell()
            tether = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), str(int(self.service.orphan_signal))]
            self._process = await asyncio.create_subprocess_exec(
                *tether,
                self.service.user or "",
                *self.service.argv,
                env=self.service.env,
                cwd=self.service.cwd,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                # A Ctrl-C in the terminal is for the supervisor, which then stops its services in order.
                start_new_session=True,
            )

    def _kill_group(self) -> None:
        """End what the process has left behind; it leads a process group of its own."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _start_error(self, what: str) -> StartError:
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 20_000))
            tail = log.read().decode(errors="replace").splitlines()[-LOG_TAIL:]
        shown = "\n".join(f"    {line}" for line in tail) or "    (no output)"
        return StartError(f"{self.service.name} {what}. The end of {self.log}:\n{shown}")
