"""What lies on a system's disk and is not known, or is known and not dealt with."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sqlalchemy import Engine
from sqlmodel import Session, select

from blocks.event_file import InvalidEventFile
from blocks.event_log import EventLog
from blocks.findings import Finding
from blocks.fingerprint import Fingerprint
from blocks.image_survey import IMAGE_SUFFIXES
from blocks.imaging_system import ImagingSystem
from blocks.tables import RejectedEventFile, Timestep


@dataclass(frozen=True)
class _Known:
    """What the database knows of one system."""

    timesteps: frozenset[str]
    event_files: frozenset[str]
    directories: frozenset[str]
    rejected: frozenset[str]

    @classmethod
    def of(cls, system: str, engine: Engine) -> "_Known":
        rows = select(Timestep.id, Timestep.event_file, Timestep.image_dir).where(Timestep.system == system)
        rejected = select(RejectedEventFile.event_file).where(RejectedEventFile.system == system)
        with Session(engine) as session:
            found = session.exec(rows).all()
            return cls(
                timesteps=frozenset(str(id) for id, _, _ in found),
                event_files=frozenset(event_file for _, event_file, _ in found if event_file),
                directories=frozenset(image_dir for _, _, image_dir in found),
                rejected=frozenset(session.exec(rejected)),
            )


def audit_disk(system: ImagingSystem, log: EventLog, engine: Engine, grace_seconds: float) -> Iterator[Finding]:
    """Event files without a timestep, and images that no event announces.

    Args:
        grace_seconds: what changed more recently than this may still be on its way.

    Raises:
        OSError: when the disk can't be read.
    """
    known = _Known.of(system.name, engine)
    concluded = log.register.concluded(system.name)
    directories = set(known.directories)
    latest = time.time() - grace_seconds
    for event_file, status in system.event_files():
        # The row is about the file that was there then; another one may have been put in its place.
        if event_file in known.event_files and _is_concluded(concluded.get(event_file), status):
            continue
        directory = system.announced_directory(event_file)
        directories.add(directory)
        # A rejected file is listed already, with its reason.
        if event_file in known.rejected or status.st_mtime > latest:
            continue
        try:
            timestep = str(system.read_event(event_file).timestep_id)
        except (InvalidEventFile, FileNotFoundError):
            timestep = ""
        if timestep not in known.timesteps:
            yield Finding(
                "event file without a timestep",
                f"{system.directory / event_file}",
                "have it read again",
                fix=lambda event_file=event_file: log.register.ask_again(system.name, event_file),  # type: ignore[misc]
            )
    ancestors = {str(parent) for directory in directories for parent in PurePosixPath(directory).parents}
    yield from _unannounced(system, "", directories, ancestors, latest)


def _is_concluded(conclusion: str | None, status: os.stat_result) -> bool:
    """Whether an event file was dealt with as it is now."""
    return conclusion is not None and Fingerprint.model_validate_json(conclusion).file == Fingerprint.state_of(status)


def _unannounced(
    system: ImagingSystem, below: str, announced: set[str], ancestors: set[str], latest: float
) -> Iterator[Finding]:
    """Directories with images in or below them that no event is about."""
    with os.scandir(system.directory / below) as entries:
        inner = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    for name in inner:
        path = f"{below}/{name}" if below else name
        if path in announced or path == "events":
            continue
        if path in ancestors:
            yield from _unannounced(system, path, announced, ancestors, latest)
            continue
        images, changed_at = _images_below(system.directory / path)
        if images and changed_at < latest:
            yield Finding(
                "images that no event announces",
                f"{system.directory / path}: {images}",
                "write an event file for them, or remove them; this is for a person to decide",
            )


def _images_below(directory: Path) -> tuple[int, float]:
    images, changed_at = 0, 0.0
    for path, _, files in os.walk(directory):
        changed_at = max(changed_at, Path(path).stat().st_mtime)
        images += sum(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in files)
    return images, changed_at
