"""Fills a database anew: from the stream, and from the bucket where the stream was trimmed."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy import Engine
from sqlmodel import Session, col, select

from blocks.database import create_engine
from blocks.entry import Entry
from blocks.event_file import TimestepType
from blocks.event_log import EventLog
from blocks.listing import list_objects
from blocks.messages import EventData, LogEvent
from blocks.object_errors import NotStored, Refused
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.stored_timestep import NotATimestep, read_stored
from blocks.tables import Timestep
from flows.reconcile import announcement
from flows.record import apply_or_refuse

STAGE = "rebuild"
BATCH = 1000
# Of an object that is not read whole, one small piece after the other is asked for: mostly, that is waiting.
OBJECTS_AT_ONCE = 16
# Of an event that was made from an object: it stands in no stream.
NO_ENTRY = "0-0"

LOST = (
    "The bucket can't know: when and from which event file a timestep was taken in, failures, the flow runs, what was "
    "checked at the upload, purged files, timesteps that were never uploaded, rejected event files, "
    "and surf-archiver's jobs and their times. Only this bucket was read: for each former one that has objects, set "
    "ARCHIVER_BUCKET to its name and do it again."
)
NOT_READ = (
    "The images of these were not read: their SHA-256 are those of the manifests, and the tars' own is not known. "
    "`archiver rebuild --read-whole` proves the images and adds it."
)


def rebuild(settings: Settings, *, read_whole: bool = False) -> Iterator[str]:
    """Fill the database, and say what was found and what can't be known. What is recorded already stays.

    Args:
        read_whole: read the objects from their first byte to their last, also those that were recorded without that.

    Raises:
        ObjectStoreError: when the bucket can't be read.
        sqlalchemy.exc.DBAPIError: when the database is away; do it again then.
    """
    store = ObjectStore.from_settings(settings)
    engine = create_engine(settings)
    try:
        with closing(EventLog.from_settings(settings)) as log:
            yield from _from_stream(log, engine)
        yield from _from_bucket(store, engine, read_whole)
    finally:
        engine.dispose()


def _from_stream(log: EventLog, engine: Engine) -> Iterator[str]:
    recorded = 0
    for entries in log.pages(BATCH):
        refused = apply_or_refuse(engine, entries)
        recorded += len(entries) - len(refused)
        for entry, reason in refused:
            yield f"entry {entry.id} of the stream can't be recorded: {reason}"
    yield f"{recorded} events were recorded from the stream"


def _from_bucket(store: ObjectStore, engine: Engine, read_whole: bool) -> Iterator[str]:
    """What the stream does not tell any more: objects nobody recorded."""
    look = partial(_tell, store, read_whole)
    read = archived = 0
    with ThreadPoolExecutor(OBJECTS_AT_ONCE) as threads:
        for page in _objects(store):
            unknown = _unknown(engine, page, read_whole)
            for (key, _), told in zip(unknown, threads.map(look, unknown), strict=True):
                if isinstance(told, str):
                    yield f"{key} was left out: {told}"
                    continue
                entries = [Entry(NO_ENTRY, {"event": event.model_dump_json(), "type": event.type}) for event in told]
                for _, reason in apply_or_refuse(engine, entries):
                    yield f"{key} can't be recorded: {reason}"
                read += 1
                archived += len(told) - 1
    yield f"{read} timesteps were read from the bucket, {archived} of them are on tape"
    if read:
        yield LOST
    if read and not read_whole:
        yield NOT_READ


def _tell(store: ObjectStore, read_whole: bool, found: tuple[str, datetime]) -> list[LogEvent] | str:
    """What an object says: its upload, and its archive if it is tagged; or why that can't be told."""
    key, modified_at = found
    try:
        uploaded = read_stored(store, key, modified_at, whole=read_whole)
        is_on_tape = store.tags(key).get("archived") == "true"
    except (NotATimestep, NotStored, Refused) as error:
        # Another try would end at the same object: it may be archived to where it can't be read, or deleted meanwhile.
        return str(error)
    told: list[EventData] = [uploaded]
    if is_on_tape:
        told.append(announcement(key, uploaded.timestep_id, uploaded.etag))
    # Of the two ways to read an object, the one that proves more is to stand: the last word counts.
    at = modified_at + timedelta(microseconds=read_whole)
    return [LogEvent.of(data, STAGE).model_copy(update={"time": at}) for data in told]


def _objects(store: ObjectStore) -> Iterator[list[tuple[str, datetime]]]:
    """Keys of the bucket where timesteps lie, by pages, with the times they were stored."""
    for kind in TimestepType:
        for page in list_objects(store.wire, f"{kind.prefix}/"):
            yield [(found.key, found.modified_at) for found in page]


def _unknown(engine: Engine, objects: Sequence[tuple[str, datetime]], read_whole: bool) -> list[tuple[str, datetime]]:
    """Those that nobody recorded, and those that were recorded without being read if that is to be made up for."""
    rows = select(Timestep.key).where(col(Timestep.key).in_([key for key, _ in objects]))
    if read_whole:
        rows = rows.where(col(Timestep.sha256).is_not(None))
    with Session(engine) as session:
        known = set(session.exec(rows))
    return [(key, modified_at) for key, modified_at in objects if key not in known]
