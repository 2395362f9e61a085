"""How the whole system does: what the page, `archiver status` and Prometheus are told.

Every figure costs the same at a million timesteps: they come out of tallies and the ends of indexes.
"""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from sqlalchemy import Select
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlmodel import Session, col, func, select

from api.deps import Services
from api.filters import TIMESTEPS
from api.paging import COUNT_LIMIT
from api.routes.at_risk import DEFAULT_HOURS, not_on_tape
from api.warnings import DiskRow, FlightCheckRow, SilentSystemRow
from blocks.errors import ArchiverError
from blocks.event_log import EventLog
from blocks.tables import RejectedEventFile, Timestep, TimestepState, of_microscopes
from blocks.tallies import EventTally, TimestepTally

logger = logging.getLogger(__name__)

DEAD_LETTERS_SHOWN = 10
# The pace is that since the oldest came that waits, as before there may have been nothing to do: but of so long.
SHORTEST_PACE, LONGEST_PACE = timedelta(minutes=1), timedelta(minutes=10)


class DeadLetterRow(BaseModel):
    """An entry of the stream that was set aside, because it can't be worked on."""

    entry_id: str = Field(description="Its entry in the stream.", examples=["1795430527000-0"])
    type: str = Field(description="Of the event, if it is one.", examples=["timestep.ingested"])
    timestep_id: str = Field(description="Of the timestep, if that can be told.", examples=[""])
    reason: str = Field(description="Why.", examples=["stream entry 1795430527000-0 has no field 'event'"])


class GroupStatus(BaseModel):
    """How far one reader of the stream is."""

    group: str = Field(
        description="Who reads: also who is none of ours, as what it has not read is kept.", examples=["upload-worker"]
    )
    waiting: int = Field(description="Entries it has not taken.", examples=[3])
    has_more: bool = Field(
        description="Whether more than `waiting` are: a Redis before 7 does not count them itself.", examples=[False]
    )
    in_progress: int = Field(description="Entries it has taken and not finished.", examples=[1])
    dead_letters: int = Field(description="Entries it has set aside.", examples=[0])
    oldest_waiting_seconds: float | None = Field(
        description="Age of the oldest entry it has not finished; null when there is none.", examples=[12.5]
    )
    newest_dead_letters: list[DeadLetterRow] = Field(description="The last of those it has set aside.")


class StateStatus(BaseModel):
    """What the database says of all timesteps."""

    timesteps: dict[TimestepState, int] = Field(
        description="How many are in each state.",
        examples=[{"ingested": 4, "uploaded": 2400, "archived": 997_595, "failed": 1}],
    )
    bytes: int = Field(description="In object storage.", examples=[600_000_000_000])
    events: dict[str, int] = Field(
        description="Events recorded so far, by type.", examples=[{"timestep.ingested": 1_000_000}]
    )
    rejected: int = Field(description="Event files that can't be taken in.", examples=[0])
    at_risk: int = Field(
        description=f"Uploaded more than {DEFAULT_HOURS:g} h ago and not on tape; {COUNT_LIMIT + 1} means more.",
        examples=[0],
    )
    oldest_not_on_tape_seconds: float | None = Field(
        description="Since the upload of the one that waits longest for the tape.", examples=[86_400.0]
    )
    silent_systems: list[SilentSystemRow] = Field(
        description="Systems that have been silent for more than three of their own intervals.", examples=[[]]
    )
    unreached: dict[str, int] = Field(
        description="How many timesteps wait of each imaging system that no upload-worker reaches.", examples=[{}]
    )
    expiring: int = Field(
        description="Objects that are not on tape, and that the bucket's lifecycle rules delete within three days.",
        examples=[0],
    )
    waiting_for_room: list[str] = Field(
        description="Systems whose timesteps wait for room in staging.", examples=[["prince"]]
    )
    disks: list[DiskRow] = Field(description="The disks of the systems, and of their copies.")
    system_names: dict[str, str] = Field(
        description="What people call each imaging system, as its block says.",
        examples=[{"prince": "Prince, room 12"}],
    )
    flight_check: FlightCheckRow | None = Field(
        description="How the last flight check ended; null where nobody knows of any."
    )
    audit_differences: int = Field(description="What the last audits found and did not mend.", examples=[0])
    warnings: list[str] = Field(description="What will go wrong if nobody does anything.", examples=[[]])
    uploaded_last_hour: int = Field(description="Timesteps that arrived and are not on tape yet.", examples=[120])
    done_in_seconds: float | None = Field(
        description="Until all that is taken in, or waits to be, will be uploaded, at the pace of the last minutes; "
        "null where nothing was uploaded in them.",
        examples=[120.0],
    )


class RedisStatus(BaseModel):
    """How full Redis is, which holds the stream."""

    used_bytes: int = Field(description="Of its memory.", examples=[600_000_000])
    limit_bytes: int | None = Field(
        description="With so many, it refuses to be told more; null where it has no limit of its own.",
        examples=[1_572_864_000],
    )


class Status(BaseModel):
    """How the whole system does. A part that can't be asked is null, and `problems` says why."""

    at: datetime = Field(description="Now.", examples=["2026-11-23T10:42:07Z"])
    problems: list[str] = Field(description="What can't be asked.", examples=[[]])
    state: StateStatus | None = Field(description="What the database says.")
    groups: list[GroupStatus] | None = Field(description="What the stream says.")
    redis: RedisStatus | None = Field(description="How full Redis is.")
    event_files_waiting: int | None = Field(
        description="Event files that are neither taken in nor rejected, as the event-ingester saw them in the last "
        "hour; null where it saw none of its systems in that time.",
        examples=[2],
    )
    oldest_event_file_seconds: dict[str, float] = Field(
        description="For how long the oldest of them has waited, of each imaging system that the event-ingester saw.",
        examples=[{"prince": 0.0}],
    )


def read_status(services: Services) -> Status:
    """Ask database and stream, of which either may be away."""
    now = datetime.now(UTC)
    status = Status(
        at=now,
        problems=[],
        state=None,
        groups=None,
        redis=None,
        event_files_waiting=None,
        oldest_event_file_seconds={},
    )
    try:
        status.groups = [_read_group(services.log, group, now) for group in services.log.group_names()]
        recent = [seen for seen in services.log.systems.all() if seen.is_recent(now)]
        status.event_files_waiting = sum(seen.waiting for seen in recent) if recent else None
        status.oldest_event_file_seconds = {seen.name: _age(seen.waiting_since, now) or 0.0 for seen in recent}
        memory = services.log.memory
        status.redis = RedisStatus(used_bytes=memory.used, limit_bytes=memory.limit)
    except (RedisError, ArchiverError) as error:
        logger.warning("The stream can't be asked how the system does: %s", error)
        status.problems.append("The stream can't be reached, or was not set up: run `archiver init`.")
    try:
        with Session(services.engine) as session:
            status.state = _read_state(services, session, status)
    except (OperationalError, NoConnectionFree) as error:
        logger.warning("The database can't be asked how the system does: %s", getattr(error, "orig", None) or error)
        status.problems.append("The database can't be reached.")
    return status


def _read_group(log: EventLog, group: str, now: datetime) -> GroupStatus:
    backlog = log.backlog(group)
    letters = log.dead_letters(group).newest(DEAD_LETTERS_SHOWN) if backlog.set_aside else []
    return GroupStatus(
        group=group,
        waiting=backlog.waiting,
        has_more=backlog.has_more,
        in_progress=backlog.in_progress,
        dead_letters=backlog.set_aside,
        oldest_waiting_seconds=_age(backlog.oldest_at, now),
        newest_dead_letters=[DeadLetterRow.model_validate(letter, from_attributes=True) for letter in letters],
    )


def _read_state(services: Services, session: Session, status: Status) -> StateStatus:
    now = status.at
    early = services.warnings.read(session, now)
    tallied = select(TimestepTally.state, TIMESTEPS, func.sum(TimestepTally.bytes))
    real = tallied.where(of_microscopes(TimestepTally)).group_by(col(TimestepTally.state))
    tallies = session.execute(real).all()
    timesteps = dict.fromkeys(TimestepState, 0) | {state: int(count) for state, count, _ in tallies}
    last_hour = col(Timestep.uploaded_at) >= now - timedelta(hours=1)
    waiting = timesteps[TimestepState.INGESTED] + (status.event_files_waiting or 0)
    oldest: datetime | None = session.execute(not_on_tape(now, func.min(Timestep.uploaded_at))).scalar()
    return StateStatus(
        timesteps=timesteps,
        bytes=sum(int(size) for _, _, size in tallies),
        events={event.type: event.events for event in session.exec(select(EventTally))},
        rejected=session.exec(select(func.count()).select_from(RejectedEventFile)).one(),
        at_risk=_count(session, not_on_tape(now - timedelta(hours=DEFAULT_HOURS), Timestep.id)),
        oldest_not_on_tape_seconds=_age(oldest, now),
        silent_systems=[SilentSystemRow.of(one) for one in early.silent],
        unreached=early.unreached,
        expiring=early.expiring,
        waiting_for_room=sorted(early.no_room),
        disks=[DiskRow.of(disk) for disk in early.disks],
        system_names=early.names,
        flight_check=FlightCheckRow.of(early.flight) if early.flight else None,
        audit_differences=sum(sum(audit.left.values()) for audit in early.audits),
        warnings=early.sentences(),
        uploaded_last_hour=_count(session, not_on_tape(now, Timestep.id).where(last_hour)),
        done_in_seconds=_done_in(waiting, session, now, status.groups),
    )


def _done_in(waiting: int, session: Session, now: datetime, groups: list[GroupStatus] | None) -> float | None:
    """In how many seconds so many timesteps will be uploaded; None where there is no pace to tell it by."""
    if not waiting:
        return 0.0
    age = next((group.oldest_waiting_seconds for group in groups or [] if group.group == "upload-worker"), None)
    over = min(max(timedelta(seconds=age or 0.0), SHORTEST_PACE), LONGEST_PACE)
    uploaded = _count(session, not_on_tape(now, Timestep.id).where(col(Timestep.uploaded_at) >= now - over))
    return waiting / uploaded * over.total_seconds() if uploaded else None


def _count(session: Session, rows: Select[Any]) -> int:
    return session.exec(select(func.count()).select_from(rows.limit(COUNT_LIMIT + 1).subquery())).one()


def _age(at: datetime | None, now: datetime) -> float | None:
    return max(0.0, (now - at).total_seconds()) if at else None
