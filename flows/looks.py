"""A look at a timestep's images while its flow run is being made, so that the run can take the second look sooner."""

import time
from contextlib import suppress
from dataclasses import dataclass

from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.image_directory import SystemAway
from blocks.imaging_system import ImagingSystem

# What was seen longer ago (seconds) is forgotten: the run is executed by another process.
_REMEMBER_SECONDS = 60.0


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
