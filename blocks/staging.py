"""Copies of timesteps on a disk of ours, for sources that are slow, or about to run full.

A copy is there as a whole or not at all: `<root>/<system>/<timestep_id>` comes by a rename, once all of it is
durable, with `<timestep_id>.json` beside it, which says what its files hash to, and how the source was.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from blocks.errors import ArchiverError
from blocks.settings import Settings
from blocks.source_file import BundleError, SourceFile, SourceUnreadable, find_sources, settled_state_of

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
# So much of the disk always stays free, whatever the budget says.
_RESERVE = 0.05


class StagingFull(ArchiverError):
    """There is no room for a copy now; the message says how much there is."""


class NeverFits(ArchiverError):
    """A copy would not fit even if staging were empty; the message says how large it is."""


@dataclass(frozen=True)
class Copy:
    """A sound copy of a timestep."""

    directory: Path
    source_state: str | None
    """Of the source as it was when this was copied from it; None where that is not known."""
    hashes: Mapping[str, str]
    """SHA-256 of each file, by its name."""


class _Copied(BaseModel):
    """What is said of a copy, beside it."""

    model_config = ConfigDict(frozen=True)

    files: dict[str, str] = Field(description="SHA-256 of each file, by its name.")
    source_state: str | None = Field(None, description="Of the source before it was read.")


class Staging:
    """The directory of the copies, with its budget in bytes."""

    def __init__(self, root: Path, budget: int | None = None) -> None:
        self._root = root
        self._budget = budget

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The staging of this installation.

        Raises:
            MissingSetting: when ARCHIVER_STAGING_DIR is not set.
        """
        settings.require("staging_dir")
        assert settings.staging_dir is not None  # noqa: S101 -- as just required
        return cls(settings.staging_dir, settings.staging_budget_bytes)

    def home(self, system: str) -> Path:
        """The directory of a system's copies."""
        return self._root / system

    def systems(self) -> list[str]:
        """Names of those that have anything here, sorted.

        Raises:
            OSError: when it can't be read.
        """
        return sorted({path.parent.name for path in self._root.glob("*/*")})

    def find(self, system: str, timestep_id: UUID, source: Path) -> Copy | None:
        """The copy of a timestep, if there is one that still is what was copied, and what the source holds.

        Each file is read for that: a copy must never get between the source and the proof of an upload.
        Another copy is passed over, but stays: it may hold the only image of its kind.

        Raises:
            OSError: when the copy, or a source that is there, can't be read, so that this can't be told.
        """
        copy = self.home(system) / timestep_id.hex
        if not copy.is_dir():
            return None
        said = _read_said(self.home(system) / f"{timestep_id.hex}.json")
        try:
            files = find_sources(copy)
            if source.is_dir() and not _holds(files, find_sources(source)):
                logger.warning("%s is passed over: %s was changed since it was copied", copy, source)
                return None
            if {name: _hash(file) for name, file in files.items()} == said.files:
                return Copy(copy, said.source_state, said.files)
            logger.warning("%s is passed over: it is not what was copied", copy)
        except SourceUnreadable as error:
            raise OSError(f"it can't be told whether {copy} is sound: {error}") from error
        except BundleError as error:
            logger.warning("%s is passed over: %s", copy, error)
        return None

    def copies(self, system: str) -> list[UUID]:
        """The timesteps of a system that are copied."""
        with suppress(FileNotFoundError):
            return sorted(UUID(path.name) for path in self.home(system).iterdir() if _is_copy(path))
        return []

    def stage(self, system: str, timestep_id: UUID, source: Path) -> Path:
        """Copy an image directory, once; a copy that is not sound is replaced, when the new one is whole.

        Raises:
            StagingFull, NeverFits: when there is no room now, or never.
            BundleError: when a file can't be read, or changes meanwhile.
            OSError: when the copy can't be written, or one that is there can't be read.
        """
        if found := self.find(system, timestep_id, source):
            return found.directory
        files = find_sources(source)
        source_state = settled_state_of(files)
        home = self.home(system)
        partial, copy = home / f".{timestep_id.hex}.partial", home / timestep_id.hex
        damaged = home / f".{timestep_id.hex}.damaged"
        with self._reserved(partial, sum(file.size for file in files.values())):
            hashes = {name: _copy(file, partial / "files" / name) for name, file in files.items()}
            said = _Copied(files=hashes, source_state=source_state)
            _write(home / f"{timestep_id.hex}.json", said.model_dump_json(indent=1).encode())
            for directory, _, _ in os.walk(partial):
                _sync(Path(directory))
            if copy.exists():
                shutil.rmtree(damaged, ignore_errors=True)  # of an attempt that died
                copy.rename(damaged)
            (partial / "files").rename(copy)
            _sync(home)
        shutil.rmtree(damaged, ignore_errors=True)
        return copy

    def forget(self, system: str, timestep_id: UUID) -> None:
        """Delete what a copy was said to hold, once the copy is deleted."""
        (self.home(system) / f"{timestep_id.hex}.json").unlink(missing_ok=True)

    def used(self) -> int:
        """Bytes of all copies."""
        size = 0
        for file in (file for copy in self._root.glob("*/*") if _is_copy(copy) for file in copy.rglob("*")):
            with suppress(FileNotFoundError):  # purged meanwhile
                status = file.lstat()
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
        return size

    def reserved(self) -> int:
        """Bytes of the copies that are under way, once they are done."""
        sizes = 0
        for path in self._root.glob("*/.*.partial/reserved"):
            with suppress(FileNotFoundError, ValueError):
                sizes += int(path.read_text())
        return sizes

    def clean(self, system: str, older_than: float) -> None:
        """Delete what is left of copies that were never finished, or are gone, and is older than so many seconds."""
        home = self.home(system)
        gone = (path for path in home.glob("*.json") if not (home / path.stem).exists())
        damaged = (path for path in home.glob(".*.damaged") if (home / path.stem[1:]).exists())
        for path in [*home.glob(".*.partial"), *damaged, *gone]:
            with suppress(FileNotFoundError):
                if time.time() - max(inner.stat().st_mtime for inner in (path, *path.rglob("*"))) > older_than:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextmanager
    def _reserved(self, partial: Path, size: int) -> Iterator[None]:
        """Room for a copy, which others respect, until it is in place or given up."""
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            shutil.rmtree(partial, ignore_errors=True)  # of an attempt that died
            reserved, disk = self.reserved(), shutil.disk_usage(self._root)
            most = min(disk.total * (1 - _RESERVE), self._budget if self._budget is not None else disk.total)
            if size > most:
                raise NeverFits(f"a copy of {size} bytes never fits into staging, which holds {most:.0f}")
            if self._budget is not None:
                used = self.used() + reserved
                if used + size > self._budget:
                    raise StagingFull(f"staging holds {used} of {self._budget} bytes, {size} more don't fit")
            if disk.free - reserved - size < _RESERVE * disk.total:
                raise StagingFull(f"{self._root} has {disk.free} bytes free, {size} more would not leave enough")
            (partial / "files").mkdir(parents=True)
            (partial / "reserved").write_text(str(size))
        try:
            yield
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _read_said(path: Path) -> _Copied:
    """What is said of a copy; by an older release, only what its files hash to."""
    said = json.loads(path.read_text())
    return _Copied.model_validate(said if isinstance(said.get("files"), dict) else {"files": said})


def _is_copy(path: Path) -> bool:
    return len(path.name) == 32 and path.is_dir()


def _holds(copy: Mapping[str, SourceFile], source: Mapping[str, SourceFile]) -> bool:
    """Whether a copy has all that the source has (still), each file as it is there."""
    return {name: (file.size, file.mtime_ns) for name, file in source.items()}.items() <= {
        name: (file.size, file.mtime_ns) for name, file in copy.items()
    }.items()


def _copy(source: SourceFile, target: Path) -> str:
    """Copy a file with its modification time, durably; returns its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open() as file, target.open("xb") as copy:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    os.utime(target, ns=(source.mtime_ns, source.mtime_ns))
    return digest.hexdigest()


def _hash(file: SourceFile) -> str:
    with file.open() as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.new")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
