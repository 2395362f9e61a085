"""What will go wrong if nobody does anything: silent systems, full disks and Redis, objects that expire or differ.

Computed from the database, and from what others have seen. Only reads.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from sqlalchemy import and_, or_
from sqlmodel import Session, col, func, select

from blocks.audit_outcome import AuditOutcome
from blocks.disk_outlook import DiskOutlook, disk_outlooks
from blocks.expiry import ExpiryRule
from blocks.flight_outcome import FlightOutcome
from blocks.redis_memory import RedisMemory
from blocks.system_seen import SystemSeen
from blocks.tables import Timestep, TimestepState, of_microscopes
from blocks.tallies import TimestepTally

# A cadence is told from so many timesteps, and not from fewer than the second number.
_TIMESTEPS = 50
_FEWEST = 6
# A system is silent after so many of its own intervals, and not sooner than after some minutes.
_INTERVALS = 3.0
_SOONEST = timedelta(minutes=10)
# After that it is no news: a system that was taken down would be an alarm for ever.
_NO_NEWS = timedelta(days=30)
# What waits for its upload for less than this may be about to begin.
_WAITS = timedelta(minutes=2)
# So long before the bucket deletes an object, somebody has to be told; and so many are counted.
_EXPIRES_WITHIN = timedelta(days=3)
_COUNTED = 10_001


@dataclass(frozen=True)
class SilentSystem:
    """A system that takes no images any more, as far as its own cadence tells."""

    system: str
    last: datetime
    cadence: timedelta
    """The median time between two of its timesteps."""


@dataclass(frozen=True)
class EarlyWarnings:
    """All that will go wrong."""

    silent: list[SilentSystem]
    disks: list[DiskOutlook]
    """Each disk, also those that last."""
    expiring: int
    """Objects that are not on tape and will be deleted by the bucket's own rules soon."""
    names: dict[str, str]
    """What people call each system."""
    flight: FlightOutcome | None
    """How the last flight check ended."""
    no_room: dict[str, str]
    """Systems whose timesteps wait for room in staging, and why."""
    unreached: dict[str, int]
    """How many timesteps wait of each system that no upload-worker reaches."""
    memory: RedisMemory | None
    """How full Redis is."""
    audits: Sequence[AuditOutcome]
    """What the last audits left."""

    @classmethod
    def of(
        cls,
        session: Session,
        systems: Sequence[SystemSeen],
        rules: Sequence[ExpiryRule],
        now: datetime,
        flight: FlightOutcome | None = None,
        not_uploading: Callable[[Iterable[str]], set[str]] = lambda _systems: set(),
        memory: RedisMemory | None = None,
        audits: Sequence[AuditOutcome] = (),
    ) -> "EarlyWarnings":
        """What will go wrong, as far as it can be told now.

        Args:
            systems: what was seen of them.
            rules: by which the bucket deletes objects.
            flight: how the last flight check ended.
            not_uploading: tells of systems which of them no upload-worker reaches.
            memory: how full Redis is.
            audits: what the last ones left.
        """
        return cls(
            silent=silent_systems(session, now),
            disks=disk_outlooks(session, systems, now),
            expiring=expiring_objects(session, rules, now),
            names={seen.name: seen.display_name for seen in systems},
            flight=flight,
            no_room={seen.name: seen.waits_for_room for seen in systems if seen.waits_for_room},
            unreached=unreached_systems(session, now, not_uploading),
            memory=memory,
            audits=audits,
        )

    @property
    def filling(self) -> list[DiskOutlook]:
        """The disks that need a hand."""
        return [disk for disk in self.disks if disk.is_filling]

    def sentences(self) -> list[str]:
        """Each warning, for a person."""
        silent = [
            f"{self.names.get(one.system, one.system)} is silent since {one.last:%Y-%m-%d %H:%M} UTC; as a rule, it "
            f"takes images every {_interval(one.cadence)}"
            for one in self.silent
        ]
        unreached = [
            f"no upload-worker reaches {self.names.get(system, system)}, of which {waiting:,} timesteps wait: is its "
            "host down, and which host names it in ARCHIVER_SYSTEMS?"
            for system, waiting in self.unreached.items()
        ]
        count = f"{self.expiring:,}" if self.expiring < _COUNTED else f"more than {_COUNTED - 1:,}"
        expiring = [f"objects not on tape that the bucket's lifecycle rules delete within 3 days: {count}"]
        flight = self.flight.warning() if self.flight else None
        memory = self.memory.warning() if self.memory else None
        audits = [warning for audit in self.audits if (warning := audit.warning())]
        waiting = [
            f"{self.names[system]} waits for room in staging, so nothing more is taken in: {why}"
            for system, why in self.no_room.items()
        ]
        return [
            *([flight] if flight else []),
            *audits,
            *unreached,
            *silent,
            *waiting,
            *(disk.sentence() for disk in self.filling),
            *([memory] if memory else []),
            *(expiring if self.expiring else []),
        ]


def silent_systems(session: Session, now: datetime) -> list[SilentSystem]:
    """The systems that have announced nothing for longer than their own cadence explains."""
    silent = []
    systems = select(TimestepTally.system).where(of_microscopes(TimestepTally)).distinct()
    for system in session.exec(systems.order_by(TimestepTally.system)):
        stamp = col(Timestep.timestamp)
        # A wrong clock tells of the future, once perhaps: such a stamp would be the last one for ever.
        query = select(stamp).where(Timestep.system == system, stamp <= now)
        stamps = session.exec(query.order_by(stamp.desc(), col(Timestep.id).desc()).limit(_TIMESTEPS)).all()
        gaps = [(later - earlier).total_seconds() for later, earlier in pairwise(stamps)]
        if len(stamps) < _FEWEST:
            continue
        # Several positions are imaged within one round: rounds make the cadence, not the seconds between positions.
        pauses = [gap for gap in gaps if gap > max(gaps) / 10]
        cadence = timedelta(seconds=statistics.median(pauses or gaps))
        silent_for = now - stamps[0] - max(_INTERVALS * cadence, _SOONEST)
        if timedelta() < silent_for < _NO_NEWS:
            silent.append(SilentSystem(system, stamps[0], cadence))
    return silent


def unreached_systems(
    session: Session, now: datetime, not_uploading: Callable[[Iterable[str]], set[str]]
) -> dict[str, int]:
    """How many timesteps wait of each system that no upload-worker reaches, where they do so for a while."""
    waiting = select(TimestepTally.system, func.sum(TimestepTally.timesteps)).where(
        TimestepTally.state == TimestepState.INGESTED, of_microscopes(TimestepTally)
    )
    counts = {system: int(count) for system, count in session.exec(waiting.group_by(TimestepTally.system)) if count}
    unreached = {}
    for system in sorted(not_uploading(counts)) if counts else ():
        oldest = select(func.min(Timestep.ingested_at)).where(
            Timestep.system == system, Timestep.state == TimestepState.INGESTED
        )
        since = session.exec(oldest).one()
        if since is not None and since < now - _WAITS:
            unreached[system] = counts[system]
    return unreached


def expiring_objects(session: Session, rules: Sequence[ExpiryRule], now: datetime) -> int:
    """How many objects are not on tape and will be deleted soon; 10,001 means more."""
    if not rules:
        return 0
    doomed = [
        and_(
            col(Timestep.key).startswith(rule.prefix, autoescape=True),
            col(Timestep.uploaded_at) < rule.dooms_before(now + _EXPIRES_WITHIN),
        )
        for rule in rules
    ]
    rows = select(Timestep.id).where(
        col(Timestep.uploaded_at).is_not(None),
        col(Timestep.archived_at).is_(None),
        of_microscopes(Timestep),
        or_(*doomed),
    )
    return session.exec(select(func.count()).select_from(rows.limit(_COUNTED).subquery())).one()


def _interval(cadence: timedelta) -> str:
    seconds = cadence.total_seconds()
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
