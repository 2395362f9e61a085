"""When to look at an event file, or at a timestep's images: a look while its flow run is being made is the first."""

import time
from contextlib import suppress
from dataclasses import dataclass

from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.image_directory import SystemAway
from blocks.imaging_system import ImagingSystem

# What was seen longer ago (seconds) is forgotten: the run is executed by another process.
_REMEMBER_SECONDS = 60.0
# The coarsest times that a share gives its files, those of FAT (seconds).
_TICK_SECONDS = 2.0


@dataclass(frozen=True)
class Look:
    """The images that were there, each in its state, and when the last of them had been looked at (monotonic time)."""

    found: dict[str, tuple[int, int, int, int]]
    at: float


_looks: dict[tuple[str, str], Look] = {}


def take_look(system: ImagingSystem, event: ImagingEvent) -> None:
    """Look at the images that an event announces. What is wrong with them is for its run to say."""
    with suppress(InvalidEventFile, SystemAway, OSError):
        found = system.survey(event, headers=False).found
        now = time.monotonic()
        for key in [key for key, look in list(_looks.items()) if now - look.at > _REMEMBER_SECONDS]:
            _looks.pop(key, None)
        _looks[system.name, event.img_dir] = Look(found, now)


def look_at(system: ImagingSystem, event: ImagingEvent) -> Look | None:
    """The look that this process took, if it did lately; given out once."""
    return _looks.pop((system.name, event.img_dir), None)


def is_being_written(system: ImagingSystem, event_file: str) -> bool:
    """Whether an event file that is not valid was changed so lately that it may be in the middle of being written."""
    try:
        return abs(time.time() - (system.directory / event_file).lstat().st_mtime) < system.settle_seconds
    except FileNotFoundError:
        return False


def tick_left(system: ImagingSystem, event_file: str) -> float:
    """For how long (seconds) what is written to an event file may give it the time that it has now.

    Where times are in whole seconds, what is read within one may be overwritten and look the same for ever.
    """
    try:
        changed_at = (system.directory / event_file).lstat().st_mtime_ns
    except FileNotFoundError:
        return 0.0
    if changed_at % 1_000_000_000:
        return 0.0
    return min(max(_TICK_SECONDS - (time.time() - changed_at / 1e9), 0.0), _TICK_SECONDS)
