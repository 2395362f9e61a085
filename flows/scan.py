"""What lies in the directory of one system's event files and is not dealt with: the truth, whatever was hinted at."""

import logging
import os
import time

from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from flows.outcome import clear
from flows.verdicts import Verdicts

logger = logging.getLogger(__name__)

# After so long (seconds), it is asked for anew which event files are dealt with.
RELOAD_SECONDS = 3600.0


class Scan:
    """Looks through the event files of one system, again and again. All of it asks Redis and the disk, so it blocks."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._verdicts = Verdicts()
        self._learned_at = float("-inf")
        self._place: tuple[int, int] | None = None

    @property
    def verdicts(self) -> Verdicts:
        """How the event files were dealt with, as far as that is known here."""
        return self._verdicts

    def find(self, system: ImagingSystem) -> list[str]:
        """Every event file that is not dealt with as it is now.

        Raises:
            OSError: when the directory can't be read.
            RedisError: when Redis can't be asked.
        """
        self._learn(system)
        # Asked for before looking, so that what is rejected meanwhile is not taken for gone.
        rejected = self._log.register.rejections(system.name)
        for event_file in self._log.register.take_requests(system.name):
            self._verdicts.forget(event_file)
        found = []
        stands = self._verdicts.stands
        self._verdicts.begin_rescan()
        for name, status in system.event_files(self._verdicts.rests):
            if rejected:
                rejected.pop(name, None)
            try:
                if not stands(name, status, system):
                    found.append(name)
            except FileNotFoundError:
                continue
        if self._is_same_place(system):
            for name in rejected:
                self._clear_if_gone(system, name)
        return found

    def _learn(self, system: ImagingSystem) -> None:
        """Learn which event files are dealt with, where Redis does not know as many as we do, or not for long.

        A Redis that was restored, or took over from another, may have forgotten some: these have to be taken in again.
        """
        register = self._log.register
        is_recent = time.monotonic() - self._learned_at < RELOAD_SECONDS
        if is_recent and register.count_concluded(system.name) >= len(self._verdicts):
            return
        self._verdicts = Verdicts(register.conclusions(system.name))
        self._learned_at = time.monotonic()
        logger.info("Watching %s, %d event files known", system.name, len(self._verdicts))

    def _is_same_place(self, system: ImagingSystem) -> bool:
        """Whether the events are where they were, or where some of those are that we know.

        Beneath a share that is away lies another directory, which may have an `events` of its own.
        """
        events = system.directory / "events"
        status = events.stat()
        place = (status.st_dev, status.st_ino)
        if self._place in (None, place) or any(f"events/{name}" in self._verdicts for name in os.listdir(events)):  # noqa: PTH208 -- names are all that is needed
            self._place = place
        return self._place == place

    def _clear_if_gone(self, system: ImagingSystem, event_file: str) -> None:
        """End the rejection of a file that the operator removed; a share that is away is no reason."""
        try:
            (system.directory / event_file).lstat()
        except FileNotFoundError:
            (system.directory / "events").stat()
        else:
            return  # a listing may lack what is renamed at that moment
        clear(system.name, event_file, None, self._log)
        self._verdicts.forget(event_file)
