"""Sees every event file of one system: watchdog gives the hint, the periodic rescan is the truth."""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx
from prefect.client.schemas.objects import StateType
from pydantic import ValidationError
from redis.exceptions import RedisError
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from blocks.discovery import is_event_file
from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.event_log import EventLog
from blocks.fingerprint import Fingerprint
from blocks.imaging_system import ImagingSystem
from flows.ingest import clear, reject
from flows.runs import Runs
from flows.verdicts import Verdicts

logger = logging.getLogger(__name__)

# Between two rescans (seconds), and where only they see what other machines do.
RESCAN_SECONDS = 10.0
POLL_SECONDS = 5.0
# After so long (seconds), it is asked for anew which event files are dealt with.
RELOAD_SECONDS = 3600.0
# How often a file is looked at that has a run under way.
LOOK_AGAIN_SECONDS = 15.0
# Of a backlog, so many files get a run at the same time, so that a new one need not wait for all of them. A run
# that takes longer than this (seconds) waits for its images, and does not count.
BACKLOG_RUNS = 50
BACKLOG_RUN_SECONDS = 30.0

# Gives the system of a name below a root, as it is configured now.
Configured = Callable[[str, Path], Awaitable[ImagingSystem]]


@dataclass
class _Pending:
    """An event file that is not dealt with: since when it looks as it does, when it got a run, and was last seen to."""

    fingerprint: Fingerprint
    since: float
    began: float | None = None
    driven: float = float("-inf")


class _Hints(FileSystemEventHandler):
    """Tells which event files something happened to; an atomic rename comes as a move."""

    def __init__(self, take: Callable[[set[str]], None], loop: asyncio.AbstractEventLoop) -> None:
        self._take = take
        self._loop = loop

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type in ("created", "modified", "moved"):
            names = {Path(os.fsdecode(path)).name for path in (event.src_path, event.dest_path) if path}
            if event_files := {f"events/{name}" for name in names if is_event_file(name)}:
                self._loop.call_soon_threadsafe(self._take, event_files)


class SystemWatch:
    """Gives every event file of one system that is not dealt with an ingest-timestep run.

    By itself for each system, so that a share that hangs holds up no other.
    """

    def __init__(self, name: str, root: Path, log: EventLog, runs: Runs, configured: Configured) -> None:
        self._name = name
        self._root = root
        self._log = log
        self._runs = runs
        self._configured = configured
        self._system = ImagingSystem(name=name, root=root)
        self._verdicts = Verdicts({})
        self._learned_at = float("-inf")
        self._pending: dict[str, _Pending] = {}
        self._hinted: set[str] = set()
        self._due: dict[str, float] = {}
        self._rescan_at = 0.0
        self._wake = asyncio.Event()
        self._observer: BaseObserver | None = None
        self._observed: tuple[str, int, int] | None = None

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            while True:
                try:
                    if time.monotonic() >= self._rescan_at:
                        await self._configure()
                        await self._rescan()
                    await self._work()
                except (httpx.HTTPError, RedisError, OSError) as error:
                    # The files stay where they are, and the next rescan finds them.
                    logger.warning("Event files of %s wait: %s: %s", self._name, type(error).__name__, error)
                    self._rescan_at = time.monotonic() + min(2.0, RESCAN_SECONDS)
                await self._wait()
        finally:
            self._stop()

    # --- finding

    async def _configure(self) -> None:
        try:
            self._system = await self._configured(self._name, self._root)
        except ValidationError as error:
            logger.error("The block of %s is wrong, so it stays as it was: %s", self._name, error)  # noqa: TRY400 -- a sentence for its operator
        await asyncio.to_thread(self._observe, asyncio.get_running_loop())

    def _observe(self, loop: asyncio.AbstractEventLoop) -> None:
        """See to it that an observer watches the directory that is there now, if that can be watched."""
        events = self._system.directory / "events"
        try:
            status = events.stat()
            place = (self._system.observation, status.st_dev, status.st_ino)
            # It ends with its directory. One on a share that is not mounted any more goes on, and sees nothing.
            is_alive = self._observer is not None and any(emitter.is_alive() for emitter in self._observer.emitters)
            if place == self._observed and (is_alive or place[0] == "polling"):
                return
            self._stop()
            if place[0] == "native":
                self._observer = Observer()
                self._observer.schedule(_Hints(self._take_hint, loop), str(events))
                self._observer.start()
            self._observed = place
        except OSError as error:
            logger.warning("%s can't be watched, only rescanned: %s", self._system.directory, error)
            self._stop()  # it holds descriptors already

    def _stop(self) -> None:
        if self._observer is not None:
            self._observer.stop()
        self._observer = self._observed = None

    def _take_hint(self, event_files: set[str]) -> None:
        self._hinted |= event_files
        self._wake.set()

    async def _learn(self) -> None:
        """Learn which event files are dealt with, where Redis does not know as many as we do, or not for long.

        A Redis that was restored, or took over from another, may have forgotten some: these have to be taken in again.
        """
        register = self._log.register
        is_recent = time.monotonic() - self._learned_at < RELOAD_SECONDS
        if is_recent and await asyncio.to_thread(register.count_concluded, self._name) >= len(self._verdicts):
            return
        self._verdicts = Verdicts(await asyncio.to_thread(register.concluded, self._name))
        self._learned_at = time.monotonic()
        logger.info("Watching %s, %d event files known", self._name, len(self._verdicts))

    async def _rescan(self) -> None:
        await self._learn()
        found, gone = await asyncio.to_thread(self._look)
        now = time.monotonic()
        for event_file in gone:
            self._verdicts.forget(event_file)
        self._due = {event_file: self._due.get(event_file, now) for event_file in found}
        self._pending = {name: pending for name, pending in self._pending.items() if name in self._due}
        pause = min(RESCAN_SECONDS, POLL_SECONDS) if self._system.observation == "polling" else RESCAN_SECONDS
        self._rescan_at = now + pause

    def _look(self) -> tuple[list[str], list[str]]:
        """Every event file that is not dealt with as it is now, and those of which the rejection is over."""
        # Asked for before looking, so that what is rejected meanwhile is not taken for gone.
        rejected = self._log.register.rejections(self._name)
        for event_file in self._log.register.take_requests(self._name):
            self._verdicts.forget(event_file)
        found = []
        for name, status in self._system.event_files():
            rejected.pop(name, None)
            try:
                if not self._verdicts.stands(name, status, self._system):
                    found.append(name)
            except FileNotFoundError:
                continue
        return found, [name for name in rejected if self._clear_if_gone(name)]

    def _clear_if_gone(self, event_file: str) -> bool:
        """End the rejection of a file that the operator removed; a share that is away is no reason."""
        try:
            (self._system.directory / event_file).lstat()
        except FileNotFoundError:
            (self._system.directory / "events").stat()
        else:
            return False  # a listing may lack what is renamed at that moment
        clear(self._name, event_file, None, self._log)
        return True

    async def _wait(self) -> None:
        """Until there is something to do: a hint, a file that is due, or the next rescan."""
        at = min([self._rescan_at, *self._due.values()])
        pause = 0.5 if self._due and self._room() <= 0 else 0.0
        try:
            await asyncio.wait_for(self._wake.wait(), timeout=max(pause, at - time.monotonic(), 0.01))
        except TimeoutError:
            return
        self._wake.clear()

    # --- acting

    async def _work(self) -> None:
        """What was hinted at, and then a piece of the backlog."""
        hinted, self._hinted = sorted(self._hinted), set()
        await self._consider_all(hinted)
        if self._room() <= 0:
            await self._consider_all(self._under_way())
        now = time.monotonic()
        due = [event_file for event_file, at in self._due.items() if at <= now]
        await self._consider_all(due[: max(0, self._room())])

    def _under_way(self) -> list[str]:
        oldest = time.monotonic() - BACKLOG_RUN_SECONDS
        return [event_file for event_file, pending in self._pending.items() if (pending.began or oldest) > oldest]

    def _room(self) -> int:
        return BACKLOG_RUNS - len(self._under_way())

    async def _consider_all(self, event_files: Iterable[str]) -> None:
        for event_file in event_files:
            if (again := await self._consider(event_file)) is None:
                self._due.pop(event_file, None)
            else:
                self._due[event_file] = time.monotonic() + again

    async def _consider(self, event_file: str) -> float | None:
        """Give the file a run if it needs one.

        Returns:
            After how many seconds to look at it again, if before the next rescan.
        """
        now = time.monotonic()
        try:
            status = await asyncio.to_thread((self._system.directory / event_file).lstat)
            conclusion = await asyncio.to_thread(self._log.register.conclusion, self._name, event_file)
            if conclusion:
                self._verdicts.learn(event_file, conclusion)
            if await asyncio.to_thread(self._verdicts.stands, event_file, status, self._system):
                self._pending.pop(event_file, None)
                return None
            state = await asyncio.to_thread(self._system.fingerprint, event_file)
            pending = self._pending.get(event_file)
            if pending is None or pending.fingerprint != state:
                pending = self._pending[event_file] = _Pending(state, since=now)
            if now - pending.driven < LOOK_AGAIN_SECONDS:
                return None
            event: ImagingEvent | None
            try:
                event = await asyncio.to_thread(self._system.read_event, event_file)
            except InvalidEventFile:
                # It may still be being written; the flow says what is wrong with it once it has settled.
                unsettled = pending.since + self._system.settle_seconds - now
                if unsettled > 0:
                    return unsettled
                event = None
        except FileNotFoundError:
            self._pending.pop(event_file, None)
            return None
        except OSError as error:
            # Its mount fails, or a part of it. The other files go on.
            logger.warning("%s/%s can't be read now: %s", self._name, event_file, error)
            return None
        await self._drive(event_file, event, pending, conclusion or "")
        return None

    async def _drive(self, event_file: str, event: ImagingEvent | None, pending: _Pending, before: str) -> None:
        register = self._log.register
        asked = await asyncio.to_thread(register.asked, self._name, event_file)
        looks = f"{self._name}/{event_file} {pending.fingerprint.file} {before}{f' {asked}' if asked else ''}"
        subject = event.timestep_id if event else "unreadable"

        def is_done() -> bool:
            return (register.conclusion(self._name, event_file) or "") != before

        driven = await self._runs.drive(
            work=f"{subject}:{hashlib.sha256(looks.encode()).hexdigest()[:16]}",
            name=f"ingest {self._name} {event_file}",
            parameters={"system": self._name, "event_file": event_file},
            tags=[self._name, *([event.experiment_id] if event else [])],
            is_done=is_done,
        )
        if driven and driven.state_type == StateType.CANCELLED and not await asyncio.to_thread(is_done):
            reason = "its flow run was cancelled in Prefect; press Retry on that run, or touch the file"
            await asyncio.to_thread(reject, self._system, event_file, event, reason, pending.fingerprint, self._log)
        pending.driven = time.monotonic()
        # A run that is only looked at again has not begun again.
        pending.began = pending.began or pending.driven
