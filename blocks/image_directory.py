"""Where a timestep's images may be: inside of their system's directory, and reached by no link."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from blocks.errors import ArchiverError
from blocks.event_file import InvalidEventFile

# What is wrong with a file, or with where it points. Any other error is the mount's, and passes.
_FAULTS = {
    errno.EACCES,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENODEV,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EPERM,
}


class NotAllowed(InvalidEventFile):
    """We may not read an event file or its images: for good, or until a ticket of a share is renewed."""


class SystemAway(ArchiverError):
    """A system's directory is not there. That is not the fault of its events."""


@contextmanager
def faults(sentence: str, *more: int) -> Iterator[None]:
    """Take an OSError for the event's fault where it is one that the mount can't be blamed for, or one of these more.

    Raises:
        InvalidEventFile: with the sentence and the cause.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FAULTS.union(more):
            raise
        kind = NotAllowed if isinstance(error, PermissionError) else InvalidEventFile
        raise kind(f"{sentence}: {error.strerror}") from error


def image_directory(system: Path, img_dir: str) -> Path:
    """The directory that an event announces.

    Args:
        system: the system's directory.
        img_dir: below it, without '..'.

    Raises:
        InvalidEventFile: when it does not exist, or leaves the system's directory.
        SystemAway: when the whole system is not there.
        OSError: when its mount fails.
    """
    home = system.resolve()
    if not (home / "events").is_dir():
        raise SystemAway(f"{system} is not there; is the share of {system.name} mounted?")
    with faults(f"its image directory {img_dir} can't be read", errno.ENOENT):
        # Not Path.resolve: before Python 3.13 it reports a loop of links as a RuntimeError.
        real = Path(os.path.realpath(system / img_dir, strict=True))
    # The path has no '..', so only a symbolic link can make the two differ.
    if real != home / img_dir:
        raise InvalidEventFile(f"its image directory {img_dir} leads through a symbolic link")
    if not real.is_dir():
        raise InvalidEventFile(f"its image directory {img_dir} is not a directory")
    # By whatever name: many a share takes EVENTS for the same directory.
    if (home / PurePosixPath(img_dir).parts[0]).samefile(home / "events"):
        raise InvalidEventFile(f"its image directory {img_dir} is the directory of the event files")
    return system / img_dir
