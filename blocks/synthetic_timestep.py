"""The timestep that a flight check sends. All of it, to the last pixel, follows from its id alone.

So whoever takes one back needs no memory to know it, and can't mistake a microscope's timestep for one.
"""

import hashlib
import struct
from typing import Literal
from uuid import UUID

from blocks.event_file import ImagingEvent, TimestepType

# The name of its directory below ARCHIVER_DATA_DIR, of its experiment and of its type: none of them a microscope's.
SYSTEM: Literal["flight-check"] = "flight-check"

IMAGES = 3
_SIDE = 128


def announcement(timestep_id: UUID) -> ImagingEvent:
    """What its event file says. It was taken on a day whose figures nobody looks at."""
    return ImagingEvent.model_validate(
        {
            "timestep_id": timestep_id,
            "plate": 0,
            "cross_date": "1970-01-01",
            "position": 0,
            "timestamp": "1970-01-01T00:00:00Z",
            "img_count": IMAGES,
            "img_dir": timestep_id.hex,
            "experiment_id": SYSTEM,
            "event_type": TimestepType.FLIGHT_CHECK,
        }
    )


def is_synthetic(system: str, event: ImagingEvent) -> bool:
    """Whether a timestep is one of a flight check, and can't be anything else."""
    return system == SYSTEM and event.document() == announcement(event.timestep_id).document()


def is_reserved(system: str, event: ImagingEvent) -> bool:
    """Whether a timestep claims to be one of a flight check, by its system or its type."""
    return system == SYSTEM or event.event_type == TimestepType.FLIGHT_CHECK


def images(timestep_id: UUID) -> dict[str, bytes]:
    """Its images, by their paths below the image directory."""
    names = (f"Img/Img_r01_c{column + 1:02d}.tif" for column in range(IMAGES))
    return {name: _tiff(hashlib.shake_256(timestep_id.bytes + name.encode()).digest(_SIDE * _SIDE)) for name in names}


def _tiff(pixels: bytes) -> bytes:
    """A square greyscale TIFF of one strip."""
    tags = {
        256: _SIDE,  # columns
        257: _SIDE,  # rows
        258: 8,  # bits
        259: 1,  # not compressed
        262: 1,  # 0 is black
        273: 8,  # where the strip begins
        277: 1,  # samples
        278: _SIDE,  # rows of the strip
        279: len(pixels),
    }
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + fields + bytes(4)
