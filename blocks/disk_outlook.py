"""How long the disks last: what comes, what leaves, what is free, and whether uploads catch up before it is full."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlmodel import Session, col, func, select

from blocks.messages import Ingested, SourcePurged, StagingPurged, Uploaded
from blocks.system_seen import Disk, SystemSeen
from blocks.tables import Timestep, TimestepEvent, TimestepState
from blocks.tallies import TimestepTally

# Rates are those of the last day, in bytes per hour.
_WINDOW = timedelta(hours=24)
# A disk that is full sooner than this needs somebody's eye, and one that is full later than that does not yet.
_SOON = timedelta(hours=72)
_LATE = timedelta(days=30)
# With less free than both of these, a part of it and bytes, it is full: then nothing more comes, at whatever rate.
_FULL_PART = 0.01
_FULL_BYTES = 10e9

# Bytes per system and type of event.
_Bytes = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class DiskOutlook:
    """How long a disk lasts. Bytes, and bytes per hour."""

    directory: str
    systems: tuple[str, ...]
    """Those whose files it holds, or whose copies."""
    free: int
    total: int
    rate_in: float
    rate_out: float
    waiting: float
    """What of these systems is taken in and not uploaded."""
    upload_rate: float

    @property
    def hours_left(self) -> float:
        """Until it is full; infinite where no less leaves than comes."""
        growth = self.rate_in - self.rate_out
        return self.free / growth if growth > 0 else math.inf

    @property
    def hours_to_upload(self) -> float:
        """Until what waits is uploaded, at the present rate; nothing of it can be deleted sooner."""
        if not self.waiting:
            return 0.0
        return self.waiting / self.upload_rate if self.upload_rate else math.inf

    @property
    def is_full(self) -> bool:
        """Whether there is hardly room for a timestep more."""
        return self.free < min(_FULL_PART * self.total, _FULL_BYTES)

    @property
    def is_filling(self) -> bool:
        """Whether it is full, or will be soon, or before the uploads catch up."""
        if self.is_full:
            return True
        soon = max(_SOON / timedelta(hours=1), min(self.hours_to_upload, _LATE / timedelta(hours=1)))
        return self.hours_left < soon

    def sentence(self) -> str:
        """All of it, for a person."""
        uploads = "never" if math.isinf(self.hours_to_upload) else f"in {self.hours_to_upload:.0f} hours"
        when = "is full" if self.is_full else f"will be full in {self.hours_left:.0f} hours"
        return (
            f"{self.directory} {when}: {_size(self.free)} of {_size(self.total)} "
            f"are free, {_size(self.rate_in)} come and {_size(self.rate_out)} leave per hour; what waits for its "
            f"upload ({_size(self.waiting)}) is done {uploads}"
        )


def disk_outlooks(session: Session, systems: Iterable[SystemSeen], now: datetime) -> list[DiskOutlook]:
    """How long each disk lasts that one of these systems lives on, one after the other by their directories."""
    sources: dict[str, list[str]] = {}
    copies: dict[str, list[str]] = {}
    disks: dict[str, Disk] = {}
    for seen in systems:
        if not seen.is_recent(now):
            continue
        for disk, users in ((seen.source, sources), (seen.staging, copies)):
            if disk:
                users.setdefault(disk.device, []).append(seen.name)
                disks.setdefault(disk.device, disk)
    moved, waiting = _moved(session, now), _waiting(session)
    outlooks = []
    for device, disk in disks.items():
        source, copy = sources.get(device, []), copies.get(device, [])
        users_of_it = sorted({*source, *copy})
        outlooks.append(
            DiskOutlook(
                directory=disk.directory,
                systems=tuple(users_of_it),
                free=disk.free,
                total=disk.total,
                rate_in=_rate(moved, Ingested.type, [*source, *copy]),
                rate_out=_rate(moved, SourcePurged.type, source) + _rate(moved, StagingPurged.type, copy),
                waiting=sum(waiting.get(system, 0.0) for system in users_of_it),
                upload_rate=_rate(moved, Uploaded.type, users_of_it),
            )
        )
    return sorted(outlooks, key=lambda one: one.directory)


def _rate(moved: _Bytes, type: str, systems: Iterable[str]) -> float:
    return sum(moved.get((system, type), 0.0) for system in systems) / (_WINDOW / timedelta(hours=1))


def _moved(session: Session, now: datetime) -> _Bytes:
    """What was taken in, uploaded and deleted in the last day."""
    size, images = col(Timestep.size), col(Timestep.image_count)
    types = [data.type for data in (Ingested, Uploaded, SourcePurged, StagingPurged)]
    # For each timestep once, also where files that came again were deleted again.
    events = (
        select(TimestepEvent.timestep_id, TimestepEvent.type)
        .where(col(TimestepEvent.type).in_(types), col(TimestepEvent.time) > now - _WINDOW)
        .where(col(TimestepEvent.time) <= now)
        .distinct()
        .subquery()
    )
    query = (
        select(Timestep.system, events.c.type, func.sum(size), func.sum(images).filter(size.is_(None)))
        .join(events, events.c.timestep_id == col(Timestep.id))
        .group_by(col(Timestep.system), events.c.type)
    )
    average = _image_sizes(session)
    return {
        (system, type): float(known or 0) + float(unknown or 0) * average.get(system, 0.0)
        for system, type, known, unknown in session.exec(query)
    }


def _waiting(session: Session) -> dict[str, float]:
    """What is taken in and not uploaded, of each system."""
    images = (
        select(TimestepTally.system, func.sum(TimestepTally.images))
        .where(TimestepTally.state == TimestepState.INGESTED)
        .group_by(TimestepTally.system)
    )
    average = _image_sizes(session)
    return {system: float(count) * average.get(system, 0.0) for system, count in session.exec(images)}


def _image_sizes(session: Session) -> dict[str, float]:
    """What an image of each system takes up, as a rule: known of those that are uploaded."""
    stored = (
        select(TimestepTally.system, func.sum(TimestepTally.bytes), func.sum(TimestepTally.images))
        .where(col(TimestepTally.state).in_([TimestepState.UPLOADED, TimestepState.ARCHIVED]))
        .group_by(TimestepTally.system)
    )
    return {system: float(size) / float(images) for system, size, images in session.exec(stored) if images}


def _size(bytes: float) -> str:
    return f"{bytes / 1e9:.1f} GB"
