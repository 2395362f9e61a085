"""Copies of timesteps on a disk of ours, for sources that are slow, or about to run full.

A copy is there as a whole or not at all: `<root>/<system>/<timestep_id>` comes by a rename, once all of it is
durable, with `<timestep_id>.json` beside it, which says what its files hash to, and how the source was.
"""

import fcntl
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import UUID

from blocks import replaced_copies
from blocks.errors import ArchiverError
from blocks.settings import Settings
from blocks.source_file import BundleError, SourceUnreadable, find_sources, settled_state_of
from blocks.staged_copy import CopyRecord, copy_file, hash_file, holds, sync

logger = logging.getLogger(__name__)

# So much of the disk always stays free, whatever the budget says.
_RESERVE = 0.05
# A timestep's id, as its copy has it for a name.
_COPY = re.compile("[0-9a-f]{32}")


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


class CopyOfAnother(ArchiverError):
    """The copy that has a timestep's id was made of something else; the message says of what."""


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

    def find(self, system: str, timestep_id: UUID, source: Path, announcement: str | None = None) -> Copy | None:
        """The copy of a timestep, if there is one that still is what was copied, and what the source holds.

        Each file is read for that: a copy must never get between the source and the proof of an upload.
        Another copy is passed over, but stays: it may hold the only image of its kind.

        Args:
            source: the image directory; it may be gone.
            announcement: identifies what was announced: a copy of anything else is not this timestep's.

        Raises:
            OSError: when the copy, or a source that is there, can't be read, so that this can't be told.
        """
        copy = self.home(system) / timestep_id.hex
        if not copy.is_dir():
            return None
        said = CopyRecord.read(self._record(system, timestep_id))
        if not said.is_of(announcement):
            logger.warning("%s is passed over: it was made of %s, for another event", copy, said.source)
            return None
        try:
            files = find_sources(copy)
            if source.is_dir() and not holds(files, find_sources(source)):
                logger.warning("%s is passed over: %s was changed since it was copied", copy, source)
                return None
            if {name: hash_file(file) for name, file in files.items()} == said.files:
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

    def stage(self, system: str, timestep_id: UUID, source: Path, announcement: str | None = None) -> Path:
        """Copy an image directory, once; a copy that is not sound is replaced, when the new one is whole.

        One that held more than the new one does is only set aside.

        Args:
            announcement: identifies what was announced.

        Raises:
            StagingFull, NeverFits: when there is no room now, or never.
            CopyOfAnother: when there is a copy of something else, which has to stay.
            BundleError: when a file can't be read, or changes meanwhile.
            OSError: when the copy can't be written, or one that is there can't be read.
        """
        if found := self.find(system, timestep_id, source, announcement):
            return found.directory
        home = self.home(system)
        partial, copy = home / f".{timestep_id.hex}.partial", home / timestep_id.hex
        before = self._before(copy, announcement)
        files = find_sources(source)
        source_state = settled_state_of(files)
        with self._reserved(partial, sum(file.size for file in files.values())):
            hashes = {name: copy_file(file, partial / "files" / name) for name, file in files.items()}
            said = CopyRecord(files=hashes, source_state=source_state, source=str(source), announcement=announcement)
            for directory, _, _ in os.walk(partial):
                sync(Path(directory))
            if copy.exists():
                replaced_copies.set_aside(copy, before)
            said.write(self._record(system, timestep_id))
            (partial / "files").rename(copy)
            sync(home)
        # Should another process have copied at the same time, what is there may not be what was copied here.
        if holds(find_sources(copy), files):
            self.drop_replaced(system, timestep_id, hashes.values())
        return copy

    def drop_replaced(self, system: str, timestep_id: UUID, held: Collection[str]) -> None:
        """Delete the copies that were set aside, where all that they held is known to be elsewhere.

        Args:
            held: SHA-256 of each file that is.
        """
        replaced_copies.drop(self.home(system), timestep_id, held)

    def replaced(self, system: str) -> list[Path]:
        """The copies that were set aside, as they hold what nobody is known to have."""
        return sorted(replaced_copies.find(self.home(system)))

    def forget(self, system: str, timestep_id: UUID) -> None:
        """Delete what a copy was said to hold, once the copy is deleted."""
        self._record(system, timestep_id).unlink(missing_ok=True)

    def used(self) -> int:
        """Bytes of all copies."""
        size = 0
        places = (path for path in self._root.glob("*/*") if _is_copy(path) or path.suffix == ".damaged")
        for file in (file for place in places for file in place.rglob("*")):
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
        for path in [*home.glob(".*.partial"), *gone]:
            with suppress(FileNotFoundError):
                if time.time() - max(inner.stat().st_mtime for inner in (path, *path.rglob("*"))) > older_than:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _record(self, system: str, timestep_id: UUID) -> Path:
        return self.home(system) / f"{timestep_id.hex}.json"

    def _before(self, copy: Path, announcement: str | None) -> CopyRecord | None:
        """What is said of a copy that is not sound, as far as that can be read.

        Raises:
            CopyOfAnother: when it is of something else.
        """
        try:
            said = CopyRecord.read(copy.with_name(f"{copy.name}.json"))
        except FileNotFoundError:
            return None
        if copy.is_dir() and not said.is_of(announcement):
            raise CopyOfAnother(f"{copy} is the copy of {said.source}, which was announced under the same id")
        return said

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
            is_new = not partial.parent.exists()
            (partial / "files").mkdir(parents=True)
            if is_new:
                # That it is there at all, before a copy in it is told to be durable.
                sync(self._root)
            (partial / "reserved").write_text(str(size))
        try:
            yield
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_copy(path: Path) -> bool:
    return _COPY.fullmatch(path.name) is not None and path.is_dir()
