"""The hint that something happened to an event file, where the operating system tells."""

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from watchdog.events import (
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyEmitter, InotifyObserver
from watchdog.observers.inotify_c import InotifyConstants, Mask

from blocks.discovery import is_event_file
from blocks.imaging_system import ImagingSystem

logger = logging.getLogger(__name__)

# Not that a file is opened or read, as we do so ourselves with each of them.
_KINDS: list[type[FileSystemEvent]] = [FileCreatedEvent, FileModifiedEvent, FileClosedEvent]


class _Emitter(InotifyEmitter):
    """Does not ask what went away.

    watchdog would hold that back for half a second, to pair it with where it went, and all that comes after it too.
    """

    def get_event_mask_from_filter(self) -> Mask:
        return Mask(super().get_event_mask_from_filter() & ~InotifyConstants.IN_MOVED_FROM)


class _Observer(InotifyObserver):
    def __init__(self) -> None:
        super().__init__()
        self._emitter_class = _Emitter


class _Handler(FileSystemEventHandler):
    """Tells which event file something happened to; what was renamed into place comes as created."""

    def __init__(self, take: Callable[[str], None], loop: asyncio.AbstractEventLoop) -> None:
        self._take = take
        self._loop = loop

    def on_any_event(self, event: FileSystemEvent) -> None:
        name = Path(os.fsdecode(event.src_path)).name
        if is_event_file(name):
            self._loop.call_soon_threadsafe(self._take, f"events/{name}")


class Hints:
    """Tells where something happens to an event file of one system. Nothing is told where that has to be polled."""

    def __init__(self, take: Callable[[str], None]) -> None:
        """`take` is called in the event loop, with a path below the system's directory."""
        self._take = take
        self._observer: _Observer | None = None
        self._observed: tuple[str, int, int] | None = None

    def renew(self, system: ImagingSystem, loop: asyncio.AbstractEventLoop) -> None:
        """See to it that an observer watches the directory that is there now, if that can be watched."""
        events = system.directory / "events"
        try:
            status = events.stat()
            place = (system.observation, status.st_dev, status.st_ino)
            # It ends with its directory. One on a share that is not mounted any more goes on, and sees nothing.
            is_alive = self._observer is not None and any(emitter.is_alive() for emitter in self._observer.emitters)
            if place == self._observed and (is_alive or place[0] == "polling"):
                return
            self.stop()
            if place[0] == "native":
                self._observer = _Observer()
                self._observer.schedule(_Handler(self._take, loop), str(events), event_filter=_KINDS)
                self._observer.start()
            self._observed = place
        except OSError as error:
            logger.warning("%s can't be watched, only rescanned: %s", system.directory, error)
            self.stop()  # it holds descriptors already

    def stop(self) -> None:
        """Tell nothing any more."""
        if self._observer is not None:
            self._observer.stop()
        self._observer = self._observed = None
