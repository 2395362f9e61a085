"""Sees every event file: watchdog gives the hint, the periodic rescan is the truth."""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import httpx
from redis.exceptions import RedisError
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.observers.polling import PollingObserver

from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.event_log import EventLog
from blocks.imaging_system import Fingerprint, ImagingSystem, is_event_file
from blocks.settings import Settings
from flows.dispatch import LOOK_AGAIN_SECONDS, Runs, entrypoint
from flows.ingest import clear

logger = logging.getLogger(__name__)

RESCAN_SECONDS = 10.0

# Gives the system of a name below a root, as it is configured now.
Configured = Callable[[str, Path], Awaitable[ImagingSystem]]


@dataclass
class _Pending:
    """An event file that is not dealt with: since when it looks as it does, and when it got a run."""

    fingerprint: Fingerprint
    since: float
    driven: float = float("-inf")


@dataclass
class _View:
    """What the watcher knows of one system. `concluded` holds fingerprints as JSON, to stay small."""

    system: ImagingSystem
    concluded: dict[str, str]
    pending: dict[str, _Pending] = field(default_factory=dict)
    hinted: set[str] = field(default_factory=set)
    observer: BaseObserver | None = None

    def is_concluded(self, event_file: str, now: Fingerprint) -> bool:
        """Whether the file was dealt with as it is now, and with what its verdict depended on."""
        known = self.concluded.get(event_file)
        if known is None or known == now.model_dump_json():
            return known is not None
        verdict = Fingerprint.model_validate_json(known)
        if verdict.file != now.file:
            return False
        # Once taken in, nothing but the file itself matters.
        return verdict.access is None or self.system.is_as(verdict, event_file)


class _Hints(FileSystemEventHandler):
    """Tells the watcher which event files something happened to; an atomic rename comes as a move."""

    def __init__(self, view: _View, wake: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
        self._view = view
        self._wake = wake
        self._loop = loop

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type in ("created", "modified", "moved"):
            names = {Path(os.fsdecode(path)).name for path in (event.src_path, event.dest_path) if path}
            self._loop.call_soon_threadsafe(self._hint, {f"events/{name}" for name in names if is_event_file(name)})

    def _hint(self, event_files: set[str]) -> None:
        self._view.hinted |= event_files
        if event_files:
            self._wake.set()


class Watcher:
    """Gives every event file that is not dealt with an ingest-timestep run."""

    def __init__(
        self, root: Path, log: EventLog, runs: Runs, configured: Configured = ImagingSystem.configured
    ) -> None:
        self._root = root
        self._log = log
        self._runs = runs
        self._configured = configured
        self._views: dict[str, _View] = {}
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        rescan_at = 0.0
        try:
            while True:
                try:
                    if time.monotonic() >= rescan_at:
                        await self._find_systems()
                        found = await asyncio.to_thread(self._rescan)
                        rescan_at = time.monotonic() + RESCAN_SECONDS
                    else:
                        found = self._take_hints()
                    wait = min([await self._consider(view, file) for view, file in found], default=RESCAN_SECONDS)
                    rescan_at = min(rescan_at, time.monotonic() + wait)
                except (httpx.HTTPError, RedisError, OSError) as error:
                    # The files stay where they are, and the next rescan finds them.
                    logger.warning("Event files wait, because a service is away: %s: %s", type(error).__name__, error)
                    rescan_at = time.monotonic() + 2.0
                await self._wait_for_hint(rescan_at - time.monotonic())
        finally:
            for view in self._views.values():
                _stop(view.observer)

    # --- finding

    async def _find_systems(self) -> None:
        for name in await asyncio.to_thread(ImagingSystem.discover, self._root):
            if name not in self._views:
                concluded = await asyncio.to_thread(self._log.register.concluded, name)
                self._views[name] = _View(await self._configured(name, self._root), concluded)
                logger.info("Watching %s, %d event files known", name, len(concluded))
        for name, view in self._views.items():
            system = await self._configured(name, self._root)
            # An observer stops for good when its directory vanishes, e.g. with an unmounted share.
            is_alive = view.observer is not None and any(emitter.is_alive() for emitter in view.observer.emitters)
            if not is_alive or system.watching != view.system.watching:
                _stop(view.observer)
                view.observer = self._observe(view, system)
            view.system = system

    def _observe(self, view: _View, system: ImagingSystem) -> BaseObserver | None:
        observer: BaseObserver | None = None
        try:
            observer = Observer() if system.observation == "native" else PollingObserver(timeout=5)
            observer.schedule(_Hints(view, self._wake, asyncio.get_running_loop()), str(system.directory / "events"))
            observer.start()
        except OSError as error:
            logger.warning("%s can't be watched, only rescanned: %s", system.directory, error)
            _stop(observer)  # it holds descriptors already
            return None
        return observer

    def _rescan(self) -> list[tuple[_View, str]]:
        """Every event file that is not dealt with as it is now."""
        found = []
        for view in self._views.values():
            try:
                # Asked for before looking, so that what is rejected meanwhile is not taken for gone.
                rejected = self._log.register.rejections(view.system.name)
                files = {name: Fingerprint.of(status) for name, status in view.system.event_files()}
                for name in rejected.keys() - files.keys():
                    self._clear_if_gone(view, name)
                found += [(view, name) for name, state in files.items() if not view.is_concluded(name, state)]
            except OSError as error:
                logger.warning("%s can't be read: %s", view.system.directory, error)
                continue
            view.pending = {name: pending for name, pending in view.pending.items() if name in files}
        return found

    def _clear_if_gone(self, view: _View, event_file: str) -> None:
        """End the rejection of a file that the operator removed; a share that is away is no reason."""
        events = view.system.directory / "events"
        try:
            (view.system.directory / event_file).lstat()
        except FileNotFoundError:
            events.stat()
        else:
            return  # a listing may lack what is renamed at that moment
        clear(view.system.name, event_file, None, self._log)
        view.concluded.pop(event_file, None)

    def _take_hints(self) -> list[tuple[_View, str]]:
        found = [(view, name) for view in self._views.values() for name in sorted(view.hinted)]
        for view in self._views.values():
            view.hinted.clear()
        return found

    async def _wait_for_hint(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._wake.wait(), timeout=max(0.05, seconds))
        except TimeoutError:
            return
        self._wake.clear()

    # --- acting

    async def _consider(self, view: _View, event_file: str) -> float:
        """Give the file a run if it needs one.

        Returns:
            After how many seconds to look at it again.
        """
        now = time.monotonic()
        try:
            state = await asyncio.to_thread(view.system.fingerprint, event_file)
            if conclusion := await asyncio.to_thread(self._log.register.conclusion, view.system.name, event_file):
                view.concluded[event_file] = conclusion
            if await asyncio.to_thread(view.is_concluded, event_file, state):
                view.pending.pop(event_file, None)
                return RESCAN_SECONDS
            pending = view.pending.get(event_file)
            if pending is None or pending.fingerprint != state:
                pending = view.pending[event_file] = _Pending(state, since=now)
            if now - pending.driven < LOOK_AGAIN_SECONDS:
                return RESCAN_SECONDS
            event: ImagingEvent | None
            try:
                event = await asyncio.to_thread(view.system.read_event, event_file)
            except InvalidEventFile:
                # It may still be being written; the flow says what is wrong with it once it has settled.
                unsettled = pending.since + view.system.settle_seconds - now
                if unsettled > 0:
                    return unsettled
                event = None
        except FileNotFoundError:
            view.pending.pop(event_file, None)
            return RESCAN_SECONDS
        except OSError as error:
            # Its mount fails, or a part of it. The other files go on.
            logger.warning("%s/%s can't be read now: %s", view.system.name, event_file, error)
            return RESCAN_SECONDS
        await self._drive(view, event_file, event, pending)
        return RESCAN_SECONDS

    async def _drive(self, view: _View, event_file: str, event: ImagingEvent | None, pending: _Pending) -> None:
        before = view.concluded.get(event_file, "")
        looks = f"{view.system.name}/{event_file} {pending.fingerprint.file} {before}"
        subject = event.timestep_id if event else "unreadable"
        await self._runs.drive(
            work=f"{subject}:{hashlib.sha256(looks.encode()).hexdigest()[:16]}",
            name=f"ingest {view.system.name} {event_file}",
            parameters={"system": view.system.name, "event_file": event_file},
            tags=[view.system.name, *([event.experiment_id] if event else [])],
            is_done=lambda: (self._log.register.conclusion(view.system.name, event_file) or "") != before,
        )
        pending.driven = time.monotonic()


async def event_ingester(settings: Settings) -> None:
    """The entrypoint: watch event files, and execute the runs they get, until a signal."""
    settings.require("data_dir")
    async with entrypoint("event-ingester", settings) as this:
        runs = Runs("ingest-timestep/event-ingester", this.client, this.log)
        await this.serve(Watcher(cast(Path, settings.data_dir), this.log, runs).run)


def _stop(observer: BaseObserver | None) -> None:
    if observer is not None:
        observer.stop()
