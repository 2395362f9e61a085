"""Deletes exactly the files it is told, below one directory, and never through a link.

Every step goes from an opened directory to a name in it. So whatever is moved, linked or mounted
elsewhere meanwhile, nothing is touched that is not the very file that was looked at before.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from blocks.fresh_stat import fresh_stat
from blocks.source_file import SourceFile

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class NotDeleted(Exception):
    """Something is not what it was, so it stays; the message says what."""


def delete_files(
    home: Path, directory: str, files: Mapping[str, SourceFile], fence: Callable[[], None] = lambda: None
) -> None:
    """Delete files of `home/directory`; those that are gone already are no matter.

    Args:
        home: the directory that is never left.
        directory: path below it.
        files: as they were looked at, by their paths below `directory`.
        fence: raises when this process may no longer delete; asked before every file.

    Raises:
        NotDeleted: at the first that is not the file that was looked at, or would not be below `home`.
        OSError: when their mount refuses.
    """
    gone: set[int] = set()
    for name, file in files.items():
        path = PurePosixPath(directory, name)
        fence()
        try:
            with _parent_of(home, path) as parent:
                now = fresh_stat(path.name, dir_fd=parent)
                # Where a file has several names, its time of change is when we deleted the one before.
                expected = replace(file, ctime_ns=now.st_ctime_ns) if file.inode in gone else file
                if not expected.is_still(now):
                    raise NotDeleted(f"{home / path} is not the file any more that was compared")
                os.unlink(path.name, dir_fd=parent)
                gone.add(file.inode)
        except FileNotFoundError:
            continue


def delete_empty_directories(home: Path, directory: str, names: Iterable[str]) -> None:
    """Delete `home/directory` and the directories in it that held files of these names, where they are empty.

    Raises:
        NotDeleted: when one of them is a link by now, or would not be below `home`.
        OSError: when their mount refuses.
    """
    inner = {parent for name in names for parent in PurePosixPath(directory, name).parents}
    own = {path for path in inner if path.is_relative_to(directory)} | {PurePosixPath(directory)}
    for path in sorted(own, key=lambda path: len(path.parts), reverse=True):
        try:
            with _parent_of(home, path) as parent:
                os.rmdir(path.name, dir_fd=parent)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


@contextmanager
def _parent_of(home: Path, path: PurePosixPath) -> Iterator[int]:
    """The directory that holds a path below home, reached step by step without following a link."""
    # An absolute path has the part '/', which would be opened as it is, wherever one comes from.
    if path.is_absolute() or ".." in path.parts:
        raise NotDeleted(f"{path} leads out of {home}")
    descriptor = os.open(home, _DIRECTORY)
    try:
        for part in path.parent.parts:
            try:
                inner = os.open(part, _DIRECTORY, dir_fd=descriptor)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise NotDeleted(f"{path.parent} leads through a link or a file") from error
                raise
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)
