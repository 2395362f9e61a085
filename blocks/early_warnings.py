"""What will go wrong if nobody does anything: systems that fell silent, and disks that fill.

Each is computed from the database, and a look at the disk. Only reads.
"""

import math
import shutil
import statistics
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

from sqlmodel import Session, col, func, select

from blocks.tables import Timestep, TimestepTally

# A cadence is told from so many timesteps, and not from fewer than the second number.
_TIMESTEPS = 50
_FEWEST = 6
# A system is silent after so many of its own intervals, and not sooner than after some minutes.
_INTERVALS = 3.0
_SOONEST = timedelta(minutes=10)
# Rates are those of the last day.
_WINDOW = timedelta(hours=24)


@dataclass(frozen=True)
class SilentSystem:
    """A system that takes no images any more, as far as its own cadence tells."""

    system: str
    last: datetime
    cadence: timedelta
    """The median time between two of its timesteps."""


@dataclass(frozen=True)
class DiskOutlook:
    """How long a disk lasts. Bytes, and bytes per hour."""

    free: int
    total: int
    rate_in: float
    rate_out: float

    @property
    def hours_left(self) -> float:
        """Until it is full; infinite where more leaves than comes."""
        growth = self.rate_in - self.rate_out
        return self.free / growth if growth > 0 else math.inf


def silent_systems(session: Session, now: datetime) -> list[SilentSystem]:
    """The systems that have announced nothing for longer than their own cadence explains."""
    silent = []
    for system in session.exec(select(TimestepTally.system).distinct().order_by(TimestepTally.system)):
        stamp = col(Timestep.timestamp)
        query = select(stamp).where(Timestep.system == system).order_by(stamp.desc(), col(Timestep.id).desc())
        stamps = session.exec(query.limit(_TIMESTEPS)).all()
        gaps = [(later - earlier).total_seconds() for later, earlier in pairwise(stamps)]
        if len(stamps) < _FEWEST:
            continue
        # Several positions are imaged within one round: rounds make the cadence, not the seconds between positions.
        pauses = [gap for gap in gaps if gap > max(gaps) / 10]
        cadence = timedelta(seconds=statistics.median(pauses or gaps))
        if now - stamps[0] > max(_INTERVALS * cadence, _SOONEST):
            silent.append(SilentSystem(system, stamps[0], cadence))
    return silent


def source_outlook(session: Session, directory: Path, systems: list[str], now: datetime) -> DiskOutlook:
    """How long the disk lasts that holds the directories of these systems.

    Args:
        directory: on that disk.

    Raises:
        OSError: when it can't be asked.
    """
    return _outlook(session, directory, systems, now, ("ingested_at", "source_purged_at"))


def staging_outlook(session: Session, directory: Path, systems: list[str], now: datetime) -> DiskOutlook:
    """How long the staging disk lasts, where these systems are staged.

    Raises:
        OSError: when it can't be asked.
    """
    return _outlook(session, directory, systems, now, ("ingested_at", "staging_purged_at"))


def _outlook(
    session: Session, directory: Path, systems: list[str], now: datetime, moments: tuple[str, str]
) -> DiskOutlook:
    disk = shutil.disk_usage(directory)
    rates = []
    for moment in moments:
        column = col(getattr(Timestep, moment))
        among = (col(Timestep.system).in_(systems), column > now - _WINDOW, column <= now)
        # What is not uploaded yet has as many bytes per image as what is.
        known = select(func.sum(Timestep.size), func.sum(Timestep.image_count)).where(
            *among, col(Timestep.size).is_not(None)
        )
        size, images = session.exec(known).one()
        all_images = session.exec(select(func.sum(Timestep.image_count)).where(*among)).one() or 0
        total = float(size or 0) * (all_images / images) if images else 0.0
        rates.append(total / (_WINDOW / timedelta(hours=1)))
    return DiskOutlook(disk.free, disk.total, *rates)
