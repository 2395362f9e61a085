"""What events do to the database.

The history keeps every event as it was first said, and everything else is derived from the
history of what the events are about. So neither the order nor the number of deliveries matters.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, cast
from uuid import UUID, uuid5

from sqlalchemy import delete, func, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import Session, SQLModel, col, select

from blocks.event_log import Entry
from blocks.messages import DATA_TYPES, Archived, EventData, Failed, Ingested, LogEvent, Rejected, Uploaded
from blocks.tables import Archive, ArchiveMember, RejectedEventFile, Timestep, TimestepEvent, TimestepImage

# The number of PostgreSQL's advisory lock under which one writer at a time derives; any will do.
_WRITER_LOCK = 7_303_014_002
# Namespace of the archives' ids, which follow from their paths on tape; any fixed UUID would do.
_ARCHIVE_IDS = UUID("0c8f1c7e-50ab-4c7e-8f6e-2d2f1f2c9a34")

EventFile = tuple[str, str]  # the system, and the path below its directory
Said = tuple[datetime, EventData]


def apply_events(session: Session, entries: Iterable[Entry]) -> None:
    """Record entries of the stream; doing it again, or in another order, changes nothing.

    Args:
        session: in a transaction, which the caller commits.
        entries: as the group got them.

    Raises:
        UnreadableEntry: when one of them is not an event.
        sqlalchemy.exc.DBAPIError: when the database can't store what one of them says, or is away.
    """
    events = [(entry.id, entry.decode()) for entry in entries]
    # Deriving reads what others have written, so writers take turns.
    session.execute(select(func.pg_advisory_xact_lock(_WRITER_LOCK)))
    news = _keep_history(session, events)
    archived_keys = _keep_archives(session, [event for event in news if isinstance(event.data, Archived)])
    ids = {event.data.timestep_id for event in news if isinstance(event.data, Ingested | Uploaded | Failed)}
    ids.update(session.exec(select(Timestep.id).where(col(Timestep.key).in_(archived_keys))))
    timesteps = _derive_timesteps(session, ids)
    _keep_images(session, timesteps, [event.data for event in news if isinstance(event.data, Uploaded)])
    _derive_rejections(
        session,
        {(event.data.system, event.data.event_file) for event in news if isinstance(event.data, Ingested | Rejected)},
    )


def _keep_history(session: Session, events: Iterable[tuple[str, LogEvent]]) -> list[LogEvent]:
    """Add to the history what it lacks, and return that. Of an event that was said twice, the first stands."""
    rows: dict[UUID, TimestepEvent] = {}
    said: dict[UUID, LogEvent] = {}
    for entry_id, event in events:
        row = _history_row(entry_id, event)
        if event.id not in rows or _precedence(row) < _precedence(rows[event.id]):
            rows[event.id], said[event.id] = row, event
    for known in session.exec(select(TimestepEvent).where(col(TimestepEvent.id).in_(rows))):
        if _precedence(known) <= _precedence(rows[known.id]):
            del rows[known.id]
    _upsert(session, TimestepEvent, [row.model_dump() for row in rows.values()])
    return [said[id] for id in rows]


def _history_row(entry_id: str, event: LogEvent) -> TimestepEvent:
    data = event.data
    return TimestepEvent(
        id=event.id,
        entry_id=entry_id,
        type=event.type,
        source=event.source,
        time=event.time,
        timestep_id=data.timestep_id,
        system=getattr(data, "system", None),
        event_file=getattr(data, "event_file", None),
        key=data.key if isinstance(data, Archived) else None,
        data=data.model_dump(mode="json", exclude={"images"}),
    )


def _precedence(row: TimestepEvent) -> tuple[datetime, list[int]]:
    return row.time, [int(part) for part in row.entry_id.split("-")]


def _derive_timesteps(session: Session, ids: Iterable[UUID | None]) -> dict[UUID, Timestep]:
    """Compute timesteps from their histories, and from the archives that hold their objects."""
    event = TimestepEvent
    telling = (Ingested.type, Uploaded.type, Failed.type)
    history: dict[UUID, list[Said]] = defaultdict(list)
    for id, type, at, data in session.exec(
        select(event.timestep_id, event.type, event.time, event.data)
        .where(col(event.timestep_id).in_(ids), col(event.type).in_(telling))
        .order_by(col(event.time), col(event.id))
    ):
        history[cast(UUID, id)].append((at, DATA_TYPES[type].model_validate({"images": [], **data})))
    timesteps = {id: timestep_from(said) for id, said in history.items()}

    first_archived = (
        select(ArchiveMember.key, func.min(ArchiveMember.archived_at))
        .where(col(ArchiveMember.key).in_({timestep.key for timestep in timesteps.values()}))
        .group_by(col(ArchiveMember.key))
    )
    archived_at = dict(session.exec(first_archived).all())
    for timestep in timesteps.values():
        timestep.archived_at = archived_at.get(timestep.key) if timestep.key else None
    # The state is PostgreSQL's to compute.
    _upsert(session, Timestep, [timestep.model_dump(exclude={"state"}) for timestep in timesteps.values()])
    return timesteps


def timestep_from(history: Sequence[Said]) -> Timestep:
    """What a timestep's history, oldest event first, says about it; all but its archive.

    The first ingestion stands, and the last upload. A failure counts until it is followed by an upload.
    """
    ingested = next(((at, data) for at, data in history if isinstance(data, Ingested)), None)
    uploaded = next(((at, data) for at, data in reversed(history) if isinstance(data, Uploaded)), None)
    failed = next(((at, data) for at, data in reversed(history) if isinstance(data, Failed)), None)
    _, announcement = cast(tuple[datetime, Ingested | Uploaded | Failed], ingested or uploaded or failed)
    event = announcement.event
    timestep = Timestep(
        id=announcement.timestep_id,
        system=announcement.system,
        experiment_id=event.experiment_id,
        plate=event.plate,
        cross_date=event.cross_date,
        position=event.position,
        type=event.event_type,
        timestamp=event.timestamp,
        image_count=event.img_count,
        image_dir=event.img_dir,
        announced=event.document(),
    )
    if ingested:
        timestep.ingested_at, timestep.event_file = ingested[0], ingested[1].event_file
    if uploaded:
        timestep.uploaded_at, upload = uploaded
        timestep.bucket, timestep.key = upload.bucket, upload.key
        timestep.size, timestep.etag, timestep.sha256 = upload.size, upload.etag, upload.sha256
        timestep.layout_digest, timestep.upload_started_at = upload.layout_digest, upload.started_at
        timestep.verified_at, timestep.checks = upload.proof.verified_at, upload.proof.checks
    if failed and not (uploaded and uploaded[0] >= failed[0]):
        timestep.failed_at, failure = failed
        timestep.failed_stage, timestep.failed_reason = failure.stage, failure.reason
        timestep.failed_flow_run_id = failure.flow_run_id
    return timestep


def _keep_images(session: Session, timesteps: dict[UUID, Timestep], uploads: Iterable[Uploaded]) -> None:
    """Replace the images of the timesteps whose object is what one of these uploads sent."""
    current = {
        upload.timestep_id: upload for upload in uploads if upload.sha256 == timesteps[upload.timestep_id].sha256
    }
    session.execute(delete(TimestepImage).where(col(TimestepImage.timestep_id).in_(current)))
    rows = [{"timestep_id": id, **image.model_dump()} for id, upload in current.items() for image in upload.images]
    if rows:
        session.execute(insert(TimestepImage), rows)


def _keep_archives(session: Session, notices: Iterable[LogEvent]) -> set[str]:
    """Add archives and their members; of two notices of the same, the earlier stands. Returns the keys."""
    archives: dict[str, dict[str, Any]] = {}
    members: dict[tuple[str, str], dict[str, Any]] = {}
    said = [(event.time, cast(Archived, event.data)) for event in notices]
    for at, notice in sorted(said, key=lambda said: (said[0], said[1].job_id), reverse=True):
        id = uuid5(_ARCHIVE_IDS, notice.archive)
        first = {"job_id": notice.job_id, "archived_at": at}
        archives[notice.archive] = {"id": id, "path": notice.archive, "date": notice.date, **first}
        members[notice.archive, notice.key] = {"archive_id": id, "key": notice.key, **first}
    _upsert(session, Archive, list(archives.values()), lowest=("archived_at", "job_id"))
    _upsert(session, ArchiveMember, list(members.values()), lowest=("archived_at", "job_id"))
    return {notice.key for _, notice in said}


def _derive_rejections(session: Session, files: set[EventFile]) -> None:
    """Compute which of these event files are rejected: by the last rejection, unless taken in since."""
    event = TimestepEvent
    rejected: dict[EventFile, RejectedEventFile] = {}
    for id, type, at, data in session.exec(
        select(event.id, event.type, event.time, event.data)
        .where(tuple_(event.system, event.event_file).in_(files), col(event.type).in_((Ingested.type, Rejected.type)))
        # At the same instant, the rejection comes first.
        .order_by(col(event.time), col(event.type), col(event.id))
    ):
        file = (data["system"], data["event_file"])
        if type == Ingested.type:
            rejected.pop(file, None)
        else:
            said = Rejected.model_validate(data)
            rejected[file] = RejectedEventFile(id=id, rejected_at=at, **said.model_dump())
    gone = files - rejected.keys()
    row = RejectedEventFile
    session.execute(delete(row).where(tuple_(row.system, row.event_file).in_(gone)))
    _upsert(session, row, [rejection.model_dump() for rejection in rejected.values()])


def _upsert(
    session: Session, table: type[SQLModel], rows: Sequence[dict[str, Any]], lowest: Sequence[str] = ()
) -> None:
    """Insert rows, or replace those with the same primary key: all, or only by a lower value of some columns."""
    if not rows:
        return
    statement = insert(table)
    columns = table.__table__.columns  # type: ignore[attr-defined]
    session.execute(
        statement.on_conflict_do_update(
            index_elements=[name for name in rows[0] if columns[name].primary_key],
            set_={name: statement.excluded[name] for name in rows[0] if not columns[name].primary_key},
            where=tuple_(*(statement.excluded[name] for name in lowest)) < tuple_(*(columns[name] for name in lowest))
            if lowest
            else None,
        ),
        rows,
    )
