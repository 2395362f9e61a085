"""Learns from the objects' tags what surf-archiver has put on tape without telling anybody."""

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID, uuid5

from prefect import flow, get_run_logger
from sqlalchemy import Engine, Select, tuple_
from sqlmodel import Session, col, select

from blocks.database import create_engine
from blocks.event_log import EventLog
from blocks.messages import Archived, LogEvent
from blocks.object_errors import ObjectStoreError, Refused
from blocks.object_store import ObjectStore
from blocks.settings import Settings, get_settings
from blocks.surf_archiver import archive_of
from blocks.tables import Timestep, of_microscopes

logger = logging.getLogger(__name__)

STAGE = "reconcile-archive"
# Namespace of what stands for surf-archiver's job, which the tags do not tell; any fixed UUID would do.
_UNTOLD_JOBS = UUID("3b0f6c55-7a0e-4ac3-9b0b-5d9a0d6fbb1e")

# What a store answers of an object that is gone. Where a bucket keeps versions, what was deleted has a marker in its
# place, which takes no such request.
_GONE = ("NoSuchKey", "404", "MethodNotAllowed", "405")

_OBJECT: tuple[Any, ...] = (Timestep.bucket, Timestep.key, Timestep.etag)

PAGE = 500
REQUESTS_AT_ONCE = 8


@dataclass(frozen=True)
class Reconciled:
    """How many objects were looked at, and what came of it."""

    asked: int
    archived: int
    gone: int


@flow(name="reconcile-archive", flow_run_name="reconcile with the tape archive")
async def reconcile_archive() -> None:
    """Ask the tags of every object that is not known to be on tape, and tell the stream of those that are."""
    settings = get_settings()
    with closing(EventLog.from_settings(settings)) as log:
        found = await asyncio.to_thread(reconcile, settings, log)
    get_run_logger().info("%d objects: %d are on tape now, %d are gone", found.asked, found.archived, found.gone)


def reconcile(settings: Settings, log: EventLog) -> Reconciled:
    """Tell the stream which objects are tagged as archived; doing it again changes nothing.

    Raises:
        ObjectStoreError: when the tags can't be asked. Those of one object cost the others nothing: it is raised after
            all were asked.
    """
    store = ObjectStore.from_settings(settings)
    engine = create_engine(settings)
    asked = archived = gone = 0
    refused: list[Refused] = []
    try:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            for page in _not_archived(engine):
                asked += len(page)
                tags = threads.map(lambda row: _tags(store, row[1], row[2]), page)
                for (timestep_id, _, key, etag), tagged in zip(page, tags, strict=True):
                    if isinstance(tagged, Refused):
                        refused.append(tagged)
                        logger.error("Timestep %s: it can't be told whether it is on tape: %s", timestep_id, tagged)
                    elif tagged is None:
                        gone += 1
                        logger.warning("Timestep %s is not on tape, and %s is not in its bucket", timestep_id, key)
                    elif tagged.get("archived") == "true":
                        archived += 1
                        log.append(LogEvent.of(announcement(key, timestep_id, etag), STAGE))
    finally:
        engine.dispose()
    if refused:
        raise ObjectStoreError(
            f"{len(refused)} of {asked} objects can't be asked whether they are on tape, the first one: {refused[0]}"
        )
    return Reconciled(asked, archived, gone)


def announcement(key: str, timestep_id: UUID | None, etag: str | None) -> Archived:
    """What surf-archiver would have said of a tagged object, as far as it can be told: learned today."""
    archive = archive_of(key)
    return Archived(
        timestep_id=timestep_id,
        job_id=uuid5(_UNTOLD_JOBS, archive),
        date=datetime.now(UTC).date(),
        archive=archive,
        key=key,
        etag=etag,
    )


def _not_archived(engine: Engine) -> Iterator[list[tuple[UUID, str, str, str | None]]]:
    """The objects that are not known to be on tape, by pages of their timesteps, buckets, keys and ETags."""
    after: tuple[datetime, UUID] | None = None
    while True:
        rows: Select[Any] = select(Timestep.uploaded_at, Timestep.id, *_OBJECT).where(
            col(Timestep.uploaded_at).is_not(None),
            col(Timestep.archived_at).is_(None),
            of_microscopes(Timestep),
        )
        if after:
            rows = rows.where(tuple_(col(Timestep.uploaded_at), col(Timestep.id)) > after)
        with Session(engine) as session:
            page = session.execute(rows.order_by(col(Timestep.uploaded_at), col(Timestep.id)).limit(PAGE)).all()
        if not page:
            return
        yield [(id, bucket, key, etag) for _, id, bucket, key, etag in page if bucket and key]
        after = cast(tuple[datetime, UUID], tuple(page[-1])[:2])


def _tags(store: ObjectStore, bucket: str, key: str) -> dict[str, str] | Refused | None:
    """The tags; None of an object that is gone, or whose bucket is, where that is a former one."""
    try:
        return store.of_bucket(bucket).tags(key)
    except Refused as error:
        is_gone = error.code in _GONE or (error.code == "NoSuchBucket" and bucket != store.bucket_name)
        return None if is_gone else error
