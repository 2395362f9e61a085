"""What the database and the bucket tell differently."""

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, Select, collate
from sqlmodel import Session, col, select

from blocks import incomplete_uploads
from blocks.event_file import TimestepType
from blocks.event_log import GROUPS, EventLog, Group
from blocks.findings import Finding, NotFixed
from blocks.incomplete_uploads import IncompleteUpload
from blocks.listing import list_objects
from blocks.messages import Ingested
from blocks.object_store import ObjectStore
from blocks.synthetic_timestep import SYSTEM as FLIGHT_CHECK
from blocks.tables import Timestep, TimestepEvent, of_microscopes
from blocks.tape_copy import announced_on_tape
from flows.abandoned import OUR_KEY, abort_unless_wanted
from flows.backfill import ingest_again
from flows.side_by_side import side_by_side


@dataclass(frozen=True)
class _Object:
    """An object as one side tells it."""

    key: str
    size: int
    etag: str
    at: datetime
    timestep_id: UUID | None = None
    is_archived: bool = False
    is_tagged: bool = False
    """Its tag alone says that it is on tape, and its system does not trust that."""
    has_source: bool = False
    is_synthetic: bool = False


def _in_bytes(found: _Object) -> bytes:
    """As a bucket orders what it lists."""
    return found.key.encode()


def audit_bucket(
    store: ObjectStore, log: EventLog, engine: Engine, grace: timedelta, trusting: Collection[str] = ()
) -> Iterator[Finding]:
    """Objects without a row, and objects that changed or went before they were archived.

    Args:
        trusting: systems that take an object's tag alone for a tape copy.

    Raises:
        ObjectStoreError: when the bucket can't be listed.
    """
    latest = datetime.now(UTC) - grace
    for recorded, stored in side_by_side(_recorded(store.bucket_name, engine, trusting), _stored(store), _in_bytes):
        if recorded is None and stored is not None:
            if stored.at < latest:
                yield Finding(
                    "object without a row",
                    stored.key,
                    "the state-manager may lag, or the database be older than the bucket; run `archiver rebuild`",
                )
        elif recorded is not None and recorded.at < latest and not recorded.is_archived and not recorded.is_synthetic:
            if recorded.is_tagged:
                if stored is None or (stored.size, stored.etag) != (recorded.size, recorded.etag):
                    yield Finding(
                        "object gone or changed that a tag alone says is on tape",
                        recorded.key,
                        "see whether the tape archive has it, and have it announced by the webhook; or set "
                        "purge_trusts_tags, if the tag is proof enough",
                    )
            elif stored is None:
                fix = _Repeat(log, engine, recorded.timestep_id) if recorded.has_source else None
                action = "upload it again" if fix else "its source was deleted; look for other copies at once"
                yield Finding("object gone before it was archived", recorded.key, action, fix)
            elif (stored.size, stored.etag) != (recorded.size, recorded.etag):
                yield Finding(
                    "object changed before it was archived",
                    f"{stored.key}: {stored.size} bytes, ETag {stored.etag}; uploaded were {recorded.size}, "
                    f"{recorded.etag}",
                    "find out who wrote it, remove it, and run this again",
                )


def audit_timesteps(log: EventLog, engine: Engine, grace: timedelta) -> Iterator[Finding]:
    """Timesteps without an object, and events that nobody could work on."""
    latest = datetime.now(UTC) - grace
    waiting = (
        select(Timestep.id, Timestep.system, Timestep.failed_reason)
        .where(col(Timestep.uploaded_at).is_(None), col(Timestep.ingested_at) < latest, of_microscopes(Timestep))
        .order_by(col(Timestep.timestamp), col(Timestep.id))
        .execution_options(yield_per=1000)
    )
    # What still stands in the stream will get its turn. In this order: what is uploaded is in the stream before the
    # upload-worker has done with it, and in the database before the state-manager has.
    groups: tuple[Group, ...] = ("upload-worker", "state-manager")
    under_way = {entry.fields.get("timestep_id") for group in groups for entry in log.unacknowledged(group)}
    with closing(Session(engine)) as session:
        for id, system, reason in session.exec(waiting):
            if str(id) not in under_way:
                subject = f"{system} {id}" + (f", {reason}" if reason else "")
                yield Finding("timestep without an object", subject, "upload it again", _Repeat(log, engine, id))
    for group in GROUPS:
        if aside := log.backlog(group).set_aside:
            yield Finding("events set aside", f"{aside} of {group}", "mend the cause, then run `archiver replay`")


def audit_leftovers(store: ObjectStore, log: EventLog, older_than: timedelta) -> Iterator[Finding]:
    """Uploads that were begun and never completed.

    Raises:
        ObjectStoreError: when the bucket can't be asked.
    """
    before = datetime.now(UTC) - older_than
    for upload in incomplete_uploads.find(store.wire):
        if OUR_KEY.fullmatch(upload.key) and upload.begun_at < before:
            yield Finding(
                "upload never completed",
                f"{upload.key}, begun {upload.begun_at:%Y-%m-%d %H:%M}",
                "abort it, unless somebody goes on with it",
                fix=partial(_abort, upload, store, log),
            )


def _abort(upload: IncompleteUpload, store: ObjectStore, log: EventLog) -> None:
    if not abort_unless_wanted(upload, store, log):
        raise NotFixed("somebody goes on with it")


@dataclass(frozen=True)
class _Repeat:
    """Says once more in the stream that a timestep was ingested, so that it is uploaded."""

    log: EventLog
    engine: Engine
    timestep_id: UUID | None

    def __call__(self) -> None:
        event = TimestepEvent
        query = select(event).where(event.timestep_id == self.timestep_id, event.type == Ingested.type)
        with Session(self.engine) as session:
            row = session.exec(query.order_by(col(event.time))).first()
            if row is None:
                raise NotFixed("its history does not tell what was ingested")
            ingest_again(row, self.log)


def _recorded(bucket: str, engine: Engine, trusting: Collection[str]) -> Iterator[_Object]:
    names = ("key", "size", "etag", "uploaded_at", "id", "archived_at", "source_purged_at", "system")
    columns: list[Any] = [*(getattr(Timestep, name) for name in names), announced_on_tape()]
    query: Select[Any] = (
        select(*columns)
        .where(col(Timestep.uploaded_at).is_not(None), col(Timestep.bucket) == bucket)
        # In the order of their bytes, as a bucket lists them.
        .order_by(collate(columns[0], "C"))
        .execution_options(yield_per=1000)
    )
    with closing(Session(engine)) as session:
        for key, size, etag, at, id, archived_at, purged_at, system, is_announced in session.execute(query):
            is_archived = archived_at is not None and (is_announced or system in trusting)
            is_tagged = archived_at is not None and not is_archived
            has_source, is_synthetic = purged_at is None, system == FLIGHT_CHECK
            yield _Object(key, size, etag, at, id, is_archived, is_tagged, has_source, is_synthetic)


def _stored(store: ObjectStore) -> Iterator[_Object]:
    for prefix in sorted(f"{kind.prefix}/" for kind in TimestepType):
        for page in list_objects(store.wire, prefix):
            for found in page:
                if OUR_KEY.fullmatch(found.key):
                    yield _Object(found.key, found.size, found.etag, found.modified_at)
