"""A microscope that is not there: drops timesteps the way a real one does."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import numpy
import tifffile

CROSS_DATE = datetime(2026, 11, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Plan:
    """What to drop: `timesteps` in all, for the systems in turn, of `images` with `image_bytes` of pixels each."""

    systems: list[str]
    timesteps: int
    images: int
    image_bytes: int


@dataclass(frozen=True)
class Dropped:
    """A timestep that was dropped: where it is and what it holds."""

    timestep_id: UUID
    system: str
    event_file: Path
    image_dir: Path
    images: int
    bytes: int
    at: datetime


def drop_timestep(
    root: Path, system: str, *, images: int, image_bytes: int, timestamp: datetime, plate: int = 4, position: int = 1
) -> Dropped:
    """Write the images of one timestep, then announce it.

    Args:
        root: the directory that holds the systems.
        system: name of the imaging system.
        images: how many TIFFs, laid out on a grid.
        image_bytes: size of one image's pixels.
        timestamp: when the timestep was taken; names the image directory.
        plate: number of the plate.
        position: number of the position on the plate.
    """
    timestep_id = uuid4()
    directory = root / system
    img_dir = f"{timestamp:%Y%m%d_%H%M%S}_Plate{plate:03d}_{timestep_id.hex[:8]}"
    (directory / img_dir / "Img").mkdir(parents=True)
    (directory / "events").mkdir(exist_ok=True)

    side = max(1, math.isqrt(image_bytes))
    pixels = numpy.random.default_rng(timestep_id.int).integers(0, 256, (side, side), dtype=numpy.uint8)
    columns = math.ceil(math.sqrt(images))
    total = 0
    for number in range(images):
        row, column = divmod(number, columns)
        path = directory / img_dir / "Img" / f"Img_r{row + 1:02d}_c{column + 1:02d}.tif"
        # Shifted, so that no two images are alike.
        tifffile.imwrite(path, numpy.roll(pixels, number, axis=0))
        total += path.stat().st_size

    event = {
        "timestep_id": str(timestep_id),
        "plate": plate,
        "cross_date": f"{CROSS_DATE:%Y-%m-%d}",
        "position": position,
        "timestamp": timestamp.isoformat(),
        "img_count": images,
        "img_dir": img_dir,
    }
    event_file = directory / "events" / f"{img_dir}.json"
    partial = event_file.with_name(f".{event_file.name}.partial")
    partial.write_text(json.dumps(event, indent=2))
    partial.rename(event_file)
    return Dropped(timestep_id, system, event_file, directory / img_dir, images, total, datetime.now(UTC))


def drop_timesteps(root: Path, plan: Plan, *, interval_seconds: float = 0.0) -> Iterator[Dropped]:
    """Drop the timesteps of a plan, waiting `interval_seconds` between two."""
    start = datetime.now(UTC).replace(microsecond=0)
    for number in range(plan.timesteps):
        if number and interval_seconds:
            time.sleep(interval_seconds)
        yield drop_timestep(
            root,
            plan.systems[number % len(plan.systems)],
            images=plan.images,
            image_bytes=plan.image_bytes,
            timestamp=start + timedelta(seconds=number),
            position=number // len(plan.systems) + 1,
        )
