"""Takes up again what was given up."""

from collections.abc import Iterator
from contextlib import closing

from sqlmodel import Session, col, select

from blocks.database import create_engine
from blocks.event_log import EventLog
from blocks.messages import Ingested, LogEvent
from blocks.settings import Settings
from blocks.tables import RejectedEventFile, Timestep, TimestepEvent, TimestepState


def backfill_failed(settings: Settings, system: str | None = None) -> Iterator[Ingested]:
    """Say once more in the stream that each failed timestep was ingested, so that it gets another upload.

    For the database nothing new is said, as the event is the same. The dispatcher sees a new entry, and
    treats it like any other: so many at a time as there are places.

    Args:
        system: only timesteps of this imaging system.

    Returns:
        What was said again, one after the other as it is done.

    Raises:
        MissingSetting: without database or Redis.
    """
    settings.require("database_url", "redis_url")
    failed = (
        select(TimestepEvent)
        .join(Timestep, col(Timestep.id) == col(TimestepEvent.timestep_id))
        .where(col(Timestep.state) == TimestepState.FAILED, col(TimestepEvent.type) == Ingested.type)
        .order_by(col(Timestep.id), col(TimestepEvent.time))
        .distinct(col(Timestep.id))
    )
    if system is not None:
        failed = failed.where(col(Timestep.system) == system)
    engine = create_engine(settings)
    try:
        with closing(EventLog.from_settings(settings)) as log, Session(engine) as session:
            for row in session.exec(failed):
                yield ingest_again(row, log)
    finally:
        engine.dispose()


def ingest_again(row: TimestepEvent, log: EventLog) -> Ingested:
    """Say once more in the stream what the history has of an ingestion; returns what it said."""
    data = Ingested.model_validate(row.data)
    subject = str(data.timestep_id)
    log.repeat(LogEvent(id=row.id, source=row.source, type=row.type, subject=subject, time=row.time, data=data))
    return data


def backfill_rejected(settings: Settings, system: str | None = None) -> Iterator[str]:
    """Have each rejected event file read again, also where nothing of it changed on disk.

    The event-ingester does so at its next rescan. A file that is as wrong as before stays rejected.

    Args:
        system: only event files of this imaging system.

    Returns:
        Each file's system and path, one after the other as it is asked for.

    Raises:
        MissingSetting: without database or Redis.
    """
    settings.require("database_url", "redis_url")
    rejected = select(RejectedEventFile).order_by(col(RejectedEventFile.system), col(RejectedEventFile.event_file))
    if system is not None:
        rejected = rejected.where(col(RejectedEventFile.system) == system)
    engine = create_engine(settings)
    try:
        with closing(EventLog.from_settings(settings)) as log, Session(engine) as session:
            for row in session.exec(rejected):
                log.register.ask_again(row.system, row.event_file)
                yield f"{row.system}/{row.event_file}"
    finally:
        engine.dispose()
