"""What lies in the directories of uploaded timesteps and is not in their objects."""

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, Select
from sqlmodel import Session, col, select

from blocks.bulk import among
from blocks.findings import Finding
from blocks.imaging_system import ImagingSystem
from blocks.tables import Timestep, TimestepImage


def audit_directories(
    system: ImagingSystem, engine: Engine, directories: Sequence[str], latest: float
) -> Iterator[Finding]:
    """Files that came after the upload, or were replaced by others of another size, or are back after a purge.

    Only those are compared that changed since their event files were written, by the clock of their share alone.

    Args:
        directories: paths below the system's; of few enough timesteps to be held in memory.
        latest: what changed since then (seconds since 1970) may still be on its way.

    Raises:
        OSError: when the disk can't be read.
    """
    found, purged = _uploaded(system, engine, directories)
    for path, timesteps in found.items():
        directory = system.directory / path
        names, changed_at = _names_below(directory)
        if not names or changed_at > latest:
            continue
        if path in purged:
            more = _not_stored(directory, names, _stored(engine, timesteps))
            yield Finding(
                "files of a purged timestep are back",
                f"{directory}: {len(names)}, as {min(names)!a}"
                + (f"; {len(more)} of them are not in the object, as {more[0]!a}" if more else ""),
                "no purge looks there again: see who put them back, keep what is not in the object, and remove the "
                "rest",
            )
            continue
        if changed_at < _written_at(system, timesteps.values()):
            continue
        if more := _not_stored(directory, names, _stored(engine, timesteps)):
            yield Finding(
                "files that are not in the object",
                f"{directory}: {len(more)} of {len(names)}, as {more[0]!a}",
                "they came after the upload: move them into a directory with an event file of its own, or remove them; "
                "this is for a person to decide",
            )


def _uploaded(
    system: ImagingSystem, engine: Engine, directories: Sequence[str]
) -> tuple[dict[str, dict[UUID, str | None]], set[str]]:
    """The directories with nothing but uploaded timesteps: these, with their event files; and which were purged."""
    row = Timestep
    columns: list[Any] = [row.image_dir, row.id, row.event_file, row.uploaded_at, row.source_purged_at]
    query: Select[Any] = select(*columns).where(col(row.system) == system.name, among(row.image_dir, directories))
    found: dict[str, dict[UUID, str | None]] = defaultdict(dict)
    others, purged = set(), set()
    with Session(engine) as session:
        for path, id, event_file, uploaded_at, purged_at in session.execute(query):
            found[path][id] = event_file
            if uploaded_at is None:
                others.add(path)
            if purged_at is not None:
                purged.add(path)
    return {path: found[path] for path in sorted(found) if path not in others}, purged


def _written_at(system: ImagingSystem, event_files: Iterable[str | None]) -> float:
    """When the first of these was written, by their share; long ago where one is gone."""
    times = [0.0]
    with suppress(FileNotFoundError):
        times = [(system.directory / name).lstat().st_mtime if name else 0.0 for name in event_files]
    return min(times)


def _stored(engine: Engine, timesteps: Iterable[UUID]) -> dict[str, int]:
    """What their objects hold: sizes by names."""
    image = TimestepImage
    with Session(engine) as session:
        found = session.exec(select(image.name, image.size).where(among(image.timestep_id, timesteps)))
        return {name: size for name, size in found}


def _not_stored(directory: Path, names: list[str], stored: dict[str, int]) -> list[str]:
    """Those that are not there, or have another size; none where it is not known what is there."""
    if not stored:
        return []
    differing = []
    for name in sorted(names):
        with suppress(FileNotFoundError):
            status = (directory / name).lstat()
            if not stat.S_ISREG(status.st_mode) or stored.get(name) != status.st_size:
                differing.append(name)
    return differing


def _names_below(directory: Path) -> tuple[list[str], float]:
    """The files at any depth, and when the last one came or went."""
    names: list[str] = []
    changed_at = 0.0
    for path, _, files in os.walk(directory):
        with suppress(FileNotFoundError):
            changed_at = max(changed_at, Path(path).stat().st_mtime)
        names += (str(Path(path, name).relative_to(directory)) for name in files)
    return names, changed_at
