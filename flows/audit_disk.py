"""What lies on a system's disk and is not known, or is known and not dealt with."""

import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TypeVar

from sqlalchemy import Engine, exists, func
from sqlmodel import Session, col, select

from blocks.bulk import among
from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.event_log import EventLog
from blocks.findings import Finding
from blocks.fingerprint import Fingerprint
from blocks.image_directory import NotAllowed
from blocks.image_survey import IMAGE_SUFFIXES
from blocks.imaging_system import ImagingSystem
from blocks.messages import Ingested
from blocks.tables import RejectedEventFile, Timestep, TimestepEvent
from flows.audit_directories import audit_directories

# So many names are looked up at once, so that a disk of any size fits into memory.
_AT_ONCE = 1000

T = TypeVar("T")


def audit_disk(system: ImagingSystem, log: EventLog, engine: Engine, grace_seconds: float) -> Iterator[Finding]:
    """Event files without a timestep, images that no event announces, and files that came after the upload.

    Args:
        grace_seconds: what changed more recently than this may still be on its way.

    Raises:
        OSError: when the disk can't be read.
    """
    audit = _Audit(system, log, engine, time.time() - grace_seconds)
    for page in _pages(system.event_files()):
        yield from audit.event_files(dict(page))
    yield from audit.directories("")


class _Audit:
    """Of one system's disk."""

    def __init__(self, system: ImagingSystem, log: EventLog, engine: Engine, latest: float) -> None:
        self._system = system
        self._log = log
        self._engine = engine
        self._latest = latest
        # What is announced by event files that are not dealt with.
        self._announced: set[str] = set()
        self._ancestors: set[str] = set()
        # Whether that is known of all of them.
        self._is_all_read = True

    def event_files(self, found: dict[str, os.stat_result]) -> Iterator[Finding]:
        """Those that no timestep tells of, and nobody rejected."""
        recorded, rejected = self._known(found)
        conclusions = self._log.register.conclusions_of(self._system.name, found)
        events: dict[str, ImagingEvent | None] = {}
        for event_file, status in found.items():
            # The row is about the file that was there then; another one may have been put in its place.
            if event_file in recorded and _is_concluded(conclusions[event_file], status):
                continue
            try:
                self._announce(self._system.announced_directories(event_file))
            except NotAllowed as error:
                self._is_all_read = False
                yield Finding(
                    "event file that can't be read",
                    f"{self._system.directory / event_file}: {error}",
                    "let us read it: until then, nothing of this system is purged, nor told to have no event",
                )
            # A rejected file is listed already, with its reason.
            if event_file in rejected or status.st_mtime > self._latest:
                continue
            try:
                events[event_file] = self._system.read_event(event_file)
            except (InvalidEventFile, FileNotFoundError):
                events[event_file] = None
        with Session(self._engine) as session:
            ids = [event.timestep_id for event in events.values() if event]
            known = set(session.exec(select(Timestep.id).where(among(Timestep.id, ids))))
        for event_file, event in events.items():
            if event is None or event.timestep_id not in known:
                yield Finding(
                    "event file without a timestep",
                    f"{self._system.directory / event_file}",
                    "have it read again",
                    fix=partial(self._log.register.ask_again, self._system.name, event_file),
                )

    def directories(self, below: str) -> Iterator[Finding]:
        """Those with images in or below them that no event is about."""
        with os.scandir(self._system.directory / below) as entries:
            for page in _pages(entry.name for entry in entries if entry.is_dir(follow_symlinks=False)):
                yield from self._directories([f"{below}/{name}" if below else name for name in sorted(page)])

    def _directories(self, paths: list[str]) -> Iterator[Finding]:
        unknown = [path for path in paths if path != "events" and path not in self._announced]
        announced = self._announced_of(unknown)
        # What has others below it, holds files of these too.
        whole = announced - self._ancestors - self._ancestors_of(sorted(announced))
        yield from audit_directories(self._system, self._engine, sorted(whole), self._latest)
        unknown = [path for path in unknown if path not in announced]
        ancestors = self._ancestors.union(self._ancestors_of(unknown))
        for path in unknown:
            if path in ancestors:
                yield from self.directories(path)
                continue
            images, changed_at = _images_below(self._system.directory / path)
            if images and changed_at < self._latest and self._is_all_read:
                yield Finding(
                    "images that no event announces",
                    f"{self._system.directory / path}: {images}",
                    "write an event file for them, or remove them; this is for a person to decide",
                )

    def _announce(self, directories: set[str]) -> None:
        self._announced |= directories
        self._ancestors.update(str(parent) for directory in directories for parent in PurePosixPath(directory).parents)

    def _known(self, event_files: Iterable[str]) -> tuple[set[str | None], set[str]]:
        """Which of these event files a timestep tells of, and which are rejected."""
        event, row = TimestepEvent, RejectedEventFile
        recorded = (
            select(event.event_file)
            .join(Timestep, col(Timestep.id) == col(event.timestep_id))
            .where(event.system == self._system.name, among(event.event_file, event_files), event.type == Ingested.type)
        )
        rejected = select(row.event_file).where(row.system == self._system.name, among(row.event_file, event_files))
        with Session(self._engine) as session:
            return set(session.exec(recorded)), set(session.exec(rejected))

    def _announced_of(self, paths: list[str]) -> set[str]:
        """Which of these directories are those of a timestep."""
        row = Timestep
        query = select(row.image_dir).where(row.system == self._system.name, among(row.image_dir, paths))
        with Session(self._engine) as session:
            return set(session.exec(query))

    def _ancestors_of(self, paths: list[str]) -> set[str]:
        """Which of these directories have that of a timestep somewhere below them."""
        image_dir, path = col(Timestep.image_dir), func.unnest(paths).column_valued("path")
        # In the order of their bytes, all that is below a directory lies between its '/' and what follows on that.
        below = exists().where(
            col(Timestep.system) == self._system.name, image_dir >= path.concat("/"), image_dir < path.concat("0")
        )
        with Session(self._engine) as session:
            return set(session.exec(select(path).where(below))) if paths else set()


def _pages(found: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(found)
    while page := list(islice(rest, _AT_ONCE)):
        yield page


def _is_concluded(conclusion: str | None, status: os.stat_result) -> bool:
    """Whether an event file was dealt with as it is now."""
    return conclusion is not None and Fingerprint.model_validate_json(conclusion).file == Fingerprint.state_of(status)


def _images_below(directory: Path) -> tuple[int, float]:
    images, changed_at = 0, 0.0
    for path, _, files in os.walk(directory):
        changed_at = max(changed_at, Path(path).stat().st_mtime)
        images += sum(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in files)
    return images, changed_at
