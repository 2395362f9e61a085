"""Who else has images in a timestep's directory, so that a purge would delete more than that timestep's."""

import time
from collections import defaultdict
from pathlib import Path, PurePosixPath

from blocks.event_log import EventLog
from blocks.fingerprint import Fingerprint
from blocks.image_directory import NotAllowed
from blocks.imaging_system import ImagingSystem
from blocks.purgeable import NotProven, Purgeable, PurgeableTimesteps, Spelling

# A pass may take hours, and meanwhile other event files announce images. After so long they are looked at again.
_REMEMBER_SECONDS = 60.0


class Claims:
    """The image directories of one system: of other timesteps, and of event files that are not taken in, or not yet."""

    def __init__(self, system: ImagingSystem, log: EventLog, timesteps: PurgeableTimesteps) -> None:
        self._system = system
        self._log = log
        self._timesteps = timesteps
        self._announced: dict[str, set[str]] = {}
        self._alike: dict[str, list[Spelling]] = {}
        self._read_at = float("-inf")

    def check(self, timestep: Purgeable) -> None:
        """Make sure that nobody else has images in a timestep's directory, or in one above or below.

        Raises:
            NotProven: when somebody has.
            OSError: when the system's mount fails.
        """
        if time.monotonic() - self._read_at > _REMEMBER_SECONDS:
            self._read()
        own = PurePosixPath(timestep.row.image_dir)
        for img_dir, event_files in self._announced.items():
            other = PurePosixPath(img_dir)
            others = event_files - {timestep.ingested.event_file}
            if others and (own.is_relative_to(other) or other.is_relative_to(own)):
                raise NotProven(f"{min(others)} announces {img_dir} too")
        self._timesteps.check_unshared(timestep.row)
        for path in (own, *own.parents):
            for other_name in self._alike.get(str(path), ()):
                # What lies in a directory above is somebody else's only where that is announced as a whole.
                if (path == own or other_name.is_whole) and self._are_one(str(path), other_name.path):
                    raise NotProven(f"on this share, {path} is {other_name.path}, which is announced too")

    def _read(self) -> None:
        announced = self._announced_directories()
        alike = self._timesteps.spelled_alike(self._system.name, announced)
        self._announced, self._alike, self._read_at = announced, alike, time.monotonic()

    def _announced_directories(self) -> dict[str, set[str]]:
        """By image directories, which event files that are not dealt with announce each."""
        concluded = self._log.register.concluded(self._system.name)
        announced: dict[str, set[str]] = defaultdict(set)
        for name, status in self._system.event_files():
            known = concluded.get(name)
            verdict = Fingerprint.model_validate_json(known) if known else None
            if verdict and verdict.access is None and verdict.file == Fingerprint.state_of(status):
                continue
            try:
                directories = self._system.announced_directories(name)
            except NotAllowed as error:
                place = self._system.directory / name
                raise NotProven(f"{place} may announce its images too, which can't be told: {error}") from error
            for img_dir in directories:
                announced[img_dir].add(name)
        return announced

    def _are_one(self, path: str, other: str) -> bool:
        home: Path = self._system.directory
        try:
            return (home / path).samefile(home / other)
        except (FileNotFoundError, NotADirectoryError):
            return False
