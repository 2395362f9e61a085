"""Sees every event file of one system: watchdog gives the hint, the periodic rescan is the truth."""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

import httpx
from prefect.client.schemas.objects import StateType
from pydantic import ValidationError
from redis.exceptions import RedisError

from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.settings import get_settings
from blocks.synthetic_timestep import SYSTEM as FLIGHT_CHECK
from blocks.system_seen import SystemSeen
from flows.examination import Examined, examine
from flows.hints import Hints
from flows.outcome import clear, reject
from flows.pending import Pending, PendingFile
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

# Gives the system of a name below a root, as it is configured now.
Configured = Callable[[str, Path], Awaitable[ImagingSystem]]


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
        self._verdicts = Verdicts()
        self._learned_at = float("-inf")
        self._pending = Pending()
        self._hinted: set[str] = set()
        self._due: dict[str, float] = {}
        self._place: tuple[int, int] | None = None
        self._rescan_at = 0.0
        self._wake = asyncio.Event()
        self._hints = Hints(self._take_hint)

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            while True:
                try:
                    if time.monotonic() >= self._rescan_at:
                        await self._configure()
                        await self._rescan()
                        await asyncio.to_thread(self._tell)
                    await self._work()
                except (httpx.HTTPError, RedisError, OSError) as error:
                    # The files stay where they are, and the next rescan finds them.
                    logger.warning("Event files of %s wait: %s: %s", self._name, type(error).__name__, error)
                    self._rescan_at = time.monotonic() + min(2.0, RESCAN_SECONDS)
                await self._wait()
        finally:
            self._hints.stop()

    # --- finding

    async def _configure(self) -> None:
        try:
            self._system = await self._configured(self._name, self._root)
        except ValidationError as error:
            logger.error("The block of %s is wrong, so it stays as it was: %s", self._name, error)  # noqa: TRY400 -- a sentence for its operator
        await asyncio.to_thread(self._hints.renew, self._system, asyncio.get_running_loop())

    def _tell(self) -> None:
        if self._name == FLIGHT_CHECK:
            return  # no disk of a microscope
        try:
            self._log.systems.tell(SystemSeen.of(self._system, get_settings(), waiting=len(self._due)))
        except OSError as error:
            logger.warning("The disks of %s can't be asked how full they are: %s", self._name, error)

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
        self._verdicts = await asyncio.to_thread(lambda: Verdicts(register.conclusions(self._name)))
        self._learned_at = time.monotonic()
        logger.info("Watching %s, %d event files known", self._name, len(self._verdicts))

    async def _rescan(self) -> None:
        await self._learn()
        found, gone = await asyncio.to_thread(self._look)
        now = time.monotonic()
        for event_file in gone:
            self._verdicts.forget(event_file)
        self._due = {event_file: self._due.get(event_file, now) for event_file in found}
        self._pending.keep(self._due)
        pause = min(RESCAN_SECONDS, POLL_SECONDS) if self._system.observation == "polling" else RESCAN_SECONDS
        self._rescan_at = now + pause

    def _look(self) -> tuple[list[str], list[str]]:
        """Every event file that is not dealt with as it is now, and those of which the rejection is over."""
        # Asked for before looking, so that what is rejected meanwhile is not taken for gone.
        rejected = self._log.register.rejections(self._name)
        for event_file in self._log.register.take_requests(self._name):
            self._verdicts.forget(event_file)
        found = []
        system, stands = self._system, self._verdicts.stands
        self._verdicts.begin_rescan()
        for name, status in system.event_files(self._verdicts.rests):
            if rejected:
                rejected.pop(name, None)
            try:
                if not stands(name, status, system):
                    found.append(name)
            except FileNotFoundError:
                continue
        gone = rejected if self._is_same_place() else {}
        return found, [name for name in gone if self._clear_if_gone(name)]

    def _is_same_place(self) -> bool:
        """Whether the events are where they were, or where some of those are that we know.

        Beneath a share that is away lies another directory, which may have an `events` of its own.
        """
        events = self._system.directory / "events"
        status = events.stat()
        place = (status.st_dev, status.st_ino)
        if self._place in (None, place) or any(f"events/{name}" in self._verdicts for name in os.listdir(events)):  # noqa: PTH208 -- names are all that is needed
            self._place = place
        return self._place == place

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
        pause = 0.5 if self._due and self._pending.room() <= 0 else 0.0
        # Not asyncio.wait_for: before Python 3.12, one that is cancelled as the hint comes forgets that it was.
        with suppress(TimeoutError):
            async with asyncio.timeout(max(pause, at - time.monotonic(), 0.01)):
                await self._wake.wait()
        self._wake.clear()

    # --- acting

    async def _work(self) -> None:
        """What was hinted at, and then a piece of the backlog."""
        hinted, self._hinted = sorted(self._hinted), set()
        await self._consider_all(hinted)
        if self._pending.room() <= 0:
            await self._consider_all(self._pending.under_way())
        now = time.monotonic()
        due = [event_file for event_file, at in self._due.items() if at <= now]
        await self._consider_all(due[: max(0, self._pending.room())])

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
            found = await asyncio.to_thread(examine, self._system, event_file, self._verdicts, self._log)
        except FileNotFoundError:
            self._pending.forget(event_file)
            return None
        except OSError as error:
            # Its mount fails, or a part of it. The other files go on.
            logger.warning("%s/%s can't be read now: %s", self._name, event_file, error)
            return None
        if found is None:
            self._pending.forget(event_file)
            return None
        pending = self._pending.seen(event_file, found.state)
        if now - pending.driven < LOOK_AGAIN_SECONDS:
            return None
        # It may still be being written; the flow says what is wrong with it once it has settled.
        unsettled = pending.since + self._system.settle_seconds - now
        if found.event is None and unsettled > 0:
            return unsettled
        await self._drive(event_file, found, pending)
        return None

    async def _drive(self, event_file: str, found: Examined, pending: PendingFile) -> None:
        event = found.event
        asked = f" {found.asked}" if found.asked else ""
        looks = f"{self._name}/{event_file} {pending.fingerprint.file} {found.conclusion}{asked}"
        subject = event.timestep_id if event else "unreadable"

        def is_done() -> bool:
            return (self._log.register.conclusion(self._name, event_file) or "") != found.conclusion

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
        pending.was_driven()
