"""Sees every event file of one system: watchdog gives the hint, the periodic rescan is the truth."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import httpx
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from redis.exceptions import RedisError

from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem, WrongBlock
from blocks.reach import queue_of
from blocks.settings import get_settings
from blocks.synthetic_timestep import SYSTEM as FLIGHT_CHECK
from blocks.system_seen import SystemSeen
from flows.examination import Examined, examine
from flows.hints import Hints
from flows.looks import take_look
from flows.outcome import reject
from flows.pending import Pending, PendingFile
from flows.runs import Runs
from flows.scan import Scan

logger = logging.getLogger(__name__)

# Between two rescans (seconds), and where only they see what other machines do.
RESCAN_SECONDS = 10.0
POLL_SECONDS = 5.0
# After something failed (seconds).
AGAIN_SECONDS = 2.0
# How often a file is looked at that has a run under way.
LOOK_AGAIN_SECONDS = 15.0
# How often it is looked whether runs of the backlog have ended (seconds).
ROOM_SECONDS = 0.5

# Gives the system of a name below a root, as it is configured now.
Configured = Callable[[str, Path], Awaitable[ImagingSystem]]


class SystemWatch:
    """Gives every event file of one system that is not dealt with an ingest-timestep run.

    By itself for each system, so that a share that hangs holds up no other. What was hinted at waits neither for
    a rescan nor for the backlog that it found.
    """

    def __init__(self, name: str, root: Path, log: EventLog, runs: Runs, configured: Configured) -> None:
        self._name = name
        self._root = root
        self._log = log
        self._runs = runs
        self._configured = configured
        self._system = ImagingSystem(name=name, root=root)
        self._scan = Scan(log)
        self._pending = Pending()
        self._hinted: set[str] = set()
        self._due: dict[str, float] = {}
        # When each event file was seen first that is not dealt with.
        self._waiting: dict[str, datetime] = {}
        self._has_hint, self._has_due, self._has_failed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._hints = Hints(self._take_hint)

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for part in (self._find, self._follow_hints, self._work_off):
                    group.create_task(self._go_on_with(part))
        finally:
            self._hints.stop()

    async def _go_on_with(self, part: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await part()
            except (httpx.HTTPError, ObjectNotFound, RedisError, OSError) as error:
                # The files stay where they are, and the next rescan finds them.
                logger.warning("Event files of %s wait: %s: %s", self._name, type(error).__name__, error)
                await asyncio.sleep(min(AGAIN_SECONDS, RESCAN_SECONDS))
                self._has_failed.set()

    # --- finding

    async def _find(self) -> None:
        await self._configure()
        await self._rescan()
        await asyncio.to_thread(self._tell)
        observation = await asyncio.to_thread(lambda: self._system.observation)
        pause = min(RESCAN_SECONDS, POLL_SECONDS) if observation == "polling" else RESCAN_SECONDS
        await _wait(self._has_failed, pause)

    async def _configure(self) -> None:
        try:
            self._system = await self._configured(self._name, self._root)
        except WrongBlock as error:
            logger.error("%s stays as it was: %s", self._name, error)  # noqa: TRY400 -- a sentence for its operator
        await asyncio.to_thread(self._hints.renew, self._system, asyncio.get_running_loop())

    async def _rescan(self) -> None:
        # What is hinted at meanwhile may have come after the listing.
        before = {*self._due, *self._pending.names()}
        found = await asyncio.to_thread(self._scan.find, self._system)
        seen_at, now = datetime.now(UTC), time.monotonic()
        self._waiting = {event_file: self._waiting.get(event_file, seen_at) for event_file in found}
        for event_file in before.difference(found):
            self._due.pop(event_file, None)
            self._pending.forget(event_file)
        for event_file in found:
            self._due.setdefault(event_file, now)
        self._has_due.set()

    def _tell(self) -> None:
        if self._name == FLIGHT_CHECK:
            return  # no disk of a microscope
        try:
            self._log.systems.tell(SystemSeen.of(self._system, get_settings(), waiting=self._waiting.values()))
        except OSError as error:
            logger.warning("The disks of %s can't be asked how full they are: %s", self._name, error)

    def _take_hint(self, event_file: str) -> None:
        self._hinted.add(event_file)
        self._has_hint.set()

    # --- acting

    async def _follow_hints(self) -> None:
        await self._has_hint.wait()
        self._has_hint.clear()
        hinted, self._hinted = sorted(self._hinted), set()
        await self._consider_all(hinted)

    async def _work_off(self) -> None:
        """Of what was found, as much as has room, and then what is due next."""
        if self._pending.room() <= 0:
            await self._consider_all(self._pending.under_way())
        now = time.monotonic()
        due = [event_file for event_file, at in self._due.items() if at <= now]
        await self._consider_all(due[: max(0, self._pending.room())])
        if not self._due:
            await _wait(self._has_due, None)
        elif self._pending.room() <= 0:
            await asyncio.sleep(ROOM_SECONDS)
        else:
            await _wait(self._has_due, max(0.01, min(self._due.values()) - time.monotonic()))

    async def _consider_all(self, event_files: Iterable[str]) -> None:
        for event_file in event_files:
            if (again := await self._consider(event_file)) is None:
                self._due.pop(event_file, None)
            else:
                self._due[event_file] = time.monotonic() + again
                self._has_due.set()

    async def _consider(self, event_file: str) -> float | None:
        """Give the file a run if it needs one.

        Returns:
            After how many seconds to look at it again, if before the next rescan.
        """
        now = time.monotonic()
        try:
            found = await asyncio.to_thread(examine, self._system, event_file, self._scan.verdicts, self._log)
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

        drive = self._runs.drive(
            work=f"{subject}:{hashlib.sha256(looks.encode()).hexdigest()[:16]}",
            name=f"ingest {self._name} {event_file}",
            parameters={"system": self._name, "event_file": event_file},
            tags=[self._name, *([event.experiment_id] if event else [])],
            is_done=is_done,
            queue=queue_of(self._name),
        )
        look = [asyncio.to_thread(take_look, self._system, event)] if event else []
        driven, *_ = await asyncio.gather(drive, *look)
        if driven and driven.state_type == StateType.CANCELLED and not await asyncio.to_thread(is_done):
            reason = "its flow run was cancelled in Prefect; press Retry on that run, or touch the file"
            await asyncio.to_thread(reject, self._system, event_file, event, reason, pending.fingerprint, self._log)
        pending.was_driven(has_begun=driven is None or driven.has_begun)


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    """Until the event comes, for so many seconds at most."""
    # Not asyncio.wait_for: before Python 3.12, one that is cancelled as the event comes forgets that it was.
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    event.clear()
