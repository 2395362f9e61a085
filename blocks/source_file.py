"""Regular files as they were when a directory was read, and proof that they still are."""

import hashlib
import io
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from blocks.fresh_stat import fresh_stat

# What changed so shortly before it was looked at (seconds) may change again and look the same, where times are coarse.
FRESH_SECONDS = 1.0


class BundleError(Exception):
    """An image directory can't be bundled as it is; the message names the file and the cause."""


class SourceUnreadable(BundleError):
    """A source file or directory can't be read now, which says nothing about what it holds."""


class SourceChanged(BundleError):
    """A source file is no longer what it was when its directory was read."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A regular file as it was when its directory was read."""

    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int
    """When something was last done to it; unlike the modification time, it can't be set."""
    inode: int

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> Self:
        """Remember a file's state.

        Raises:
            BundleError: if it is not a regular file.
        """
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path} is {_kind(status.st_mode)}; only regular files are archived")
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def is_still(self, now: os.stat_result) -> bool:
        """Whether a path of this state holds the very file, and nothing was done to it."""
        return stat.S_ISREG(now.st_mode) and SourceFile.of(self.path, now) == self

    @contextmanager
    def open(self) -> Iterator[io.FileIO]:
        """Open it for reading, and make sure that it is the same file, before and after.

        Raises:
            SourceChanged: if it vanished, or its size, times or inode are not what they were.
            SourceUnreadable: if it can't be opened.
        """
        try:
            # Should a link or a pipe stand in the file's place by now: neither follow it nor wait for a writer.
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise SourceChanged(f"{self.path} vanished after its directory was read") from error
        except OSError as error:
            raise SourceUnreadable(f"{self.path} can't be opened: {error.strerror}") from error
        with io.FileIO(handle) as file:
            self._compare(os.fstat(handle))
            yield file
            # By its path: another file may have taken its place while this one was read.
            try:
                self._compare(fresh_stat(self.path))
            except FileNotFoundError as error:
                raise SourceChanged(f"{self.path} vanished while it was read") from error

    def read_into(self, file: io.FileIO, view: memoryview) -> int:
        """Read at least one byte of the opened file into `view`; returns how many.

        Raises:
            SourceChanged: if the file ends here already.
            SourceUnreadable: if reading fails.
        """
        try:
            count = file.readinto(view)
        except OSError as error:
            raise SourceUnreadable(f"{self.path} can't be read: {error.strerror}") from error
        if not count:
            raise SourceChanged(f"{self.path} changed while it was read: it no longer has {self.size} bytes")
        return count

    def _compare(self, now: os.stat_result) -> None:
        differing = [
            f"{what} was {before}, is {after}"
            for what, before, after in (
                ("size", self.size, now.st_size),
                ("mtime_ns", self.mtime_ns, now.st_mtime_ns),
                ("ctime_ns", self.ctime_ns, now.st_ctime_ns),
                ("inode", self.inode, now.st_ino),
            )
            if before != after
        ]
        if differing:
            raise SourceChanged(f"{self.path} changed since its directory was read: {', '.join(differing)}")


def find_sources(directory: Path) -> dict[str, SourceFile]:
    """All files below a directory by their relative paths, in byte order of these.

    Raises:
        BundleError: if one of them is not a regular file (links are not followed), if a name is
            not UTF-8; SourceUnreadable if a directory can't be read.
    """
    found = dict(_walk(directory, ""))
    return {name: found[name] for name in sorted(found, key=str.encode)}


def state_of(files: Mapping[str, SourceFile]) -> str:
    """Identifies files in the state they are in: with the same state later, nothing was done to any of them since.

    It is told by one clock, that of the file system, at two moments, and by nothing else.
    """
    states = [(name, file.size, file.mtime_ns, file.ctime_ns, file.inode) for name, file in sorted(files.items())]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def settled_state_of(files: Mapping[str, SourceFile]) -> str | None:
    """Their state, if whatever is done to them from now on gives another one; None where that can't be said.

    It is too early to say so right after a change, and never said where times are in whole seconds: by a clock that is
    behind ours, a second that is not over yet looks long past.
    """
    latest = max((file.ctime_ns for file in files.values()), default=0)
    is_coarse = all(file.ctime_ns % 1_000_000_000 == 0 for file in files.values())
    return None if is_coarse or latest > (time.time() - FRESH_SECONDS) * 1e9 else state_of(files)


def _walk(directory: Path, prefix: str) -> Iterator[tuple[str, SourceFile]]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                name, path = prefix + entry.name, Path(entry.path)
                try:
                    name.encode()
                except UnicodeEncodeError as error:
                    raise BundleError(f"the name of {os.fsencode(path)!r} is not UTF-8") from error
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(path, name + "/")
                else:
                    yield name, SourceFile.of(path, fresh_stat(path))
    except OSError as error:
        raise SourceUnreadable(f"{error.filename or directory} can't be read: {error.strerror}") from error


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFDIR: "a directory",
    }
    return kinds.get(stat.S_IFMT(mode), "not a file")
