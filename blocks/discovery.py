"""Which directories are systems, and which files are event files, by their names and places alone."""

import logging
import os
import stat
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)


def discover_systems(root: Path) -> list[str]:
    """Names of the systems below a root, sorted. A root that is not mounted has none."""
    return [name for name in candidates(root) if is_system(root / name)]


def candidates(root: Path) -> list[str]:
    """Names of what may be systems below a root, sorted: none of them was looked at, as the share of one may hang."""
    try:
        return sorted(filter(_is_text, (path.name for path in root.iterdir())))
    except FileNotFoundError:
        return []


def is_system(place: Path) -> bool:
    """Whether there is a system: a directory, with a directory `events`, and no symbolic link to any."""
    events = place / "events"
    try:
        if place.is_symlink():
            if events.is_dir():
                _say_once(f"{place} is left out, because it is a symbolic link; mount or bind it there instead")
            return False
        status = events.lstat()
        if stat.S_ISLNK(status.st_mode) and events.is_dir():
            _say_once(f"{place} is left out, because {events} is a symbolic link; mount or bind it there instead")
        return stat.S_ISDIR(status.st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        # One mount that fails must not hide the others.
        logger.warning("%s is left out, because it can't be read: %s", place, error)
        return False


@cache
def _say_once(sentence: str) -> None:
    logger.warning("%s", sentence)


def is_event_file(name: str) -> bool:
    """Whether an event file may have this name; a hidden one is still being written."""
    # Of 100,000 names, most are ASCII, which is soon told.
    return name[-5:].lower() == ".json" and name[0] != "." and (name.isascii() or _is_text(name))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        _say_once(f"{os.fsencode(name)!r} is left out, because its name is not UTF-8; rename it")
        return False
    return True
