"""What events do to the database.

The history keeps every event as it was first said, and everything else is derived from the
history of what the events are about. So neither the order nor the number of deliveries matters.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, cast
from uuid import UUID, uuid5

from sqlalchemy import ColumnElement, delete, func, tuple_, update
from sqlmodel import Session, SQLModel, col, select

from blocks.bulk import among, copy, upsert
from blocks.event_log import Entry
from blocks.messages import (
    DATA_TYPES,
    Archived,
    Cleared,
    EventData,
    Ingested,
    LogEvent,
    Rejected,
    SourcePurged,
    StagingPurged,
    Uploaded,
)
from blocks.replaced import replaced_objects
from blocks.tables import Archive, ArchiveMember, RejectedEventFile, Timestep, TimestepEvent, TimestepImage
from flows.history import keep_history
from flows.timestep_row import TELLING, timestep_row

# The number of PostgreSQL's advisory lock under which one writer at a time derives; any will do.
_WRITER_LOCK = 7_303_014_002
# Namespace of the archives' ids, which follow from their paths on tape; any fixed UUID would do.
_ARCHIVE_IDS = UUID("0c8f1c7e-50ab-4c7e-8f6e-2d2f1f2c9a34")


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
    news, event_files = keep_history(session, events)
    ids = {event.data.timestep_id for event in news}
    uploads = [event.data for event in news if isinstance(event.data, Uploaded)]
    with_images = _with_images(session, uploads)
    timesteps = _derive_timesteps(session, [event for event in news if isinstance(event.data, TELLING)])
    _derive_purged(session, ids)
    _keep_images(session, timesteps, uploads, with_images)
    archived_keys = _keep_archives(session, [event for event in news if isinstance(event.data, Archived)])
    _derive_archived(session, archived_keys | {row["key"] for row in timesteps.values() if row["key"]})
    _derive_rejections(session, event_files)


def _derive_timesteps(session: Session, news: Sequence[LogEvent]) -> dict[UUID, dict[str, Any]]:
    """Compute the rows of timesteps from their histories; all but what purges and archives say about them.

    Args:
        news: what the history did not say before.

    Returns:
        The rows. What was withdrawn has none any more.
    """
    history: dict[UUID, list[tuple[datetime, UUID, EventData]]] = defaultdict(list)
    for new in news:
        history[cast(UUID, new.data.timestep_id)].append((new.time, new.id, new.data))
    event = TimestepEvent
    for id, type, at, event_id, data in session.exec(
        select(event.timestep_id, event.type, event.time, event.id, event.data).where(  # type: ignore[call-overload]
            among(event.timestep_id, history),
            col(event.type).in_([data.type for data in TELLING]),
            ~among(event.id, [new.id for new in news]),
        )
    ):
        history[id].append((at, event_id, DATA_TYPES[type].model_validate({"images": [], **data})))
    rows = {}
    for id, said in history.items():
        in_order = sorted(said, key=lambda one: one[:2])
        if row := timestep_row([(at, data) for at, _, data in in_order]):
            rows[id] = row
    upsert(session, Timestep, list(rows.values()))
    if withdrawn := history.keys() - rows.keys():
        _delete(session, TimestepImage, among(TimestepImage.timestep_id, withdrawn))
        _delete(session, Timestep, among(Timestep.id, withdrawn))
    return rows


def _derive_archived(session: Session, keys: set[str]) -> None:
    """Tell the timesteps with these objects when an archive first had them, as they are now."""
    first = (
        select(func.min(ArchiveMember.archived_at)).where(col(ArchiveMember.key) == col(Timestep.key)).scalar_subquery()
    )
    replaced = replaced_objects(session, keys)
    _set_archived(session, first, among(Timestep.key, keys), ~among(Timestep.id, replaced))
    for id, since in replaced.items():
        # An archive keeps one member per key, whatever its bytes were. The history has every notice; one that does not
        # name the object's ETag may be late, and about the other.
        event = TimestepEvent
        notices = select(func.min(event.time)).where(
            event.type == Archived.type,
            col(event.key) == col(Timestep.key),
            event.time > since,
            col(event.data)["etag"].as_string() == col(Timestep.etag),
        )
        _set_archived(session, notices.scalar_subquery(), col(Timestep.id) == id)


def _set_archived(session: Session, first: Any, *which: Any) -> None:
    session.execute(
        update(Timestep)
        .where(*which, col(Timestep.archived_at).is_distinct_from(first))
        .values(archived_at=first)
        .execution_options(synchronize_session=False)
    )


def _derive_purged(session: Session, ids: Iterable[UUID | None]) -> None:
    """Tell the timesteps when their files were last deleted."""
    event = TimestepEvent
    last = (
        select(
            col(event.timestep_id).label("id"),
            *(
                func.max(event.time).filter(col(event.type) == kind.type).label(name)
                for name, kind in (("source_purged_at", SourcePurged), ("staging_purged_at", StagingPurged))
            ),
        )
        .where(among(event.timestep_id, ids), col(event.type).in_((SourcePurged.type, StagingPurged.type)))
        .group_by(col(event.timestep_id))
        .subquery()
    )
    session.execute(
        update(Timestep)
        .where(col(Timestep.id) == last.c.id)
        .values(source_purged_at=last.c.source_purged_at, staging_purged_at=last.c.staging_purged_at)
        .execution_options(synchronize_session=False)
    )


def _with_images(session: Session, uploads: Iterable[Uploaded]) -> set[UUID]:
    """Those of the timesteps whose images are recorded already, also where their rows were deleted by hand."""
    ids = among(TimestepImage.timestep_id, [upload.timestep_id for upload in uploads])
    return set(session.exec(select(TimestepImage.timestep_id).where(ids).distinct()))


def _keep_images(
    session: Session, timesteps: dict[UUID, dict[str, Any]], uploads: Iterable[Uploaded], with_images: set[UUID]
) -> None:
    """Replace the images of the timesteps whose object is what one of these uploads sent."""
    # Not by the SHA-256 alone: of objects that were found in the bucket, it is not known.
    current = {
        upload.timestep_id: upload
        for upload in uploads
        if (row := timesteps.get(upload.timestep_id)) and (upload.sha256, upload.etag) == (row["sha256"], row["etag"])
    }
    if not current:
        return
    if replaced := current.keys() & with_images:
        _delete(session, TimestepImage, among(TimestepImage.timestep_id, replaced))
    images = ((id, image) for id, upload in current.items() for image in upload.images)
    copy(session, TimestepImage, ((id, image.name, image.offset, image.size, image.sha256) for id, image in images))


def _delete(session: Session, table: type[SQLModel], which: ColumnElement[bool]) -> None:
    session.execute(delete(table).where(which).execution_options(synchronize_session=False))


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
    upsert(session, Archive, list(archives.values()), lowest=("archived_at", "job_id"))
    upsert(session, ArchiveMember, list(members.values()), lowest=("archived_at", "job_id"))
    return {notice.key for _, notice in said}


def _derive_rejections(session: Session, files: set[tuple[str, str]]) -> None:
    """Compute which of these event files are rejected: by the last rejection, unless it is over.

    It is over when the file was taken in since, or when its episode was cleared, whenever that was said.
    """
    event = TimestepEvent
    systems, paths = {system for system, _ in files}, {path for _, path in files}
    of_them = (among(event.system, systems), among(event.event_file, paths), event.type == Rejected.type)
    # Hardly any ever was.
    files = files.intersection(session.exec(select(event.system, event.event_file).where(*of_them)))
    if not files:
        return
    telling = (Ingested.type, Rejected.type, Cleared.type)
    rejections: dict[tuple[str, str], tuple[datetime, UUID, Rejected]] = {}
    cleared: set[UUID] = set()
    for id, type, at, data in session.exec(
        select(event.id, event.type, event.time, event.data)
        .where(tuple_(col(event.system), col(event.event_file)).in_(files), col(event.type).in_(telling))
        # At the same instant, the rejection comes first.
        .order_by(col(event.time), col(event.type) != Rejected.type, col(event.id))
    ):
        file = (data["system"], data["event_file"])
        if type == Rejected.type:
            rejections[file] = (at, id, Rejected.model_validate(data))
        elif type == Ingested.type:
            rejections.pop(file, None)
        else:
            cleared.add(Cleared.model_validate(data).episode)
    rows = {
        file: {"id": id, "rejected_at": at, **_rejection_row(said)}
        for file, (at, id, said) in rejections.items()
        if said.episode not in cleared
    }
    row = RejectedEventFile
    session.execute(delete(row).where(tuple_(col(row.system), col(row.event_file)).in_(files - rows.keys())))
    upsert(session, row, list(rows.values()))


def _rejection_row(said: Rejected) -> dict[str, Any]:
    event = said.event
    return {
        **said.model_dump(exclude={"episode", "event"}),
        "experiment_id": event and event.experiment_id,
        "position": event and event.position,
        "type": event and event.event_type,
        "timestamp": event and event.timestamp,
    }
