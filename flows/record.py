"""The last stage: the stream's events, recorded in the database."""

import asyncio
import gc
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Literal

import psycopg
import psycopg.errors
from prefect import flow, get_run_logger
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError
from sqlmodel import Session

from blocks.database import create_engine
from blocks.event_log import Entry, EventLog, UnreadableEntry
from blocks.settings import Settings, get_settings
from flows.apply import apply_events

logger = logging.getLogger(__name__)

GROUP: Literal["state-manager"] = "state-manager"

# What another consumer held this long without a sign of life is taken over.
TAKE_OVER_SECONDS = 60
# A run ends after this long even if more is waiting; the next one goes on.
LONGEST_RUN_SECONDS = 30

# What PostgreSQL answers to values it can't hold. Anything else it says is about itself.
_UNSTORABLE = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)


@flow(name="record-events", flow_run_name="record events of {consumer}", persist_result=False)
async def record_events(consumer: str, limit: int = 1000) -> int:
    """Record what waits in the stream; returns how many events that were.

    Args:
        consumer: the stable name under which the stream hands out entries.
        limit: at most this many entries per transaction.
    """
    recorded = await asyncio.to_thread(record, get_settings(), consumer, limit)
    get_run_logger().info("recorded %d events", recorded)
    return recorded


def record(settings: Settings, consumer: str, limit: int) -> int:
    """Record what waits in the stream that the settings name, in the database that they name."""
    engine = create_engine(settings)
    try:
        with closing(EventLog.from_settings(settings)) as log:
            return record_waiting(log, engine, consumer, limit)
    finally:
        engine.dispose()


@contextmanager
def _without_collection() -> Iterator[None]:
    """Let no garbage be looked for meanwhile.

    A batch makes a hundred thousand objects, which makes Python look through everything there is, all of
    Prefect, again and again: half of the time it would take. They are freed without that.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collection()
def record_waiting(log: EventLog, engine: Engine, consumer: str, limit: int, *, linger_seconds: float = 0.2) -> int:
    """Record what the consumer holds, what others left lying, and what is new.

    Raises:
        sqlalchemy.exc.DBAPIError: when the database is away; the entries stay with the consumer.
    """
    deadline = time.monotonic() + LONGEST_RUN_SECONDS
    recorded = 0
    log.take_over(GROUP, consumer, idle_seconds=TAKE_OVER_SECONDS, count=limit)
    while time.monotonic() < deadline and (entries := log.held(GROUP, consumer, count=limit)):
        recorded += record_batch(log, engine, entries)
    read = partial(_read, log, consumer, limit, linger_seconds)
    with ThreadPoolExecutor(1, "read-ahead") as ahead:
        entries = read()
        while entries and time.monotonic() < deadline:
            # Of a backlog, the next batch is read while PostgreSQL works on this one. A run that ends leaves it with
            # the consumer, for the next run.
            coming = ahead.submit(read) if len(entries) == limit else None
            recorded += record_batch(log, engine, entries)
            entries = coming.result() if coming else read()
    return recorded


def _read(log: EventLog, consumer: str, limit: int, wait_seconds: float) -> list[Entry]:
    entries = log.read(GROUP, consumer, count=limit, wait_seconds=wait_seconds)
    for entry in entries:
        with suppress(UnreadableEntry):  # it is set aside in its turn
            entry.decode()
    return entries


def record_batch(log: EventLog, engine: Engine, entries: Sequence[Entry]) -> int:
    """Record entries and acknowledge them, set the unrecordable aside; returns how many were recorded.

    Raises:
        sqlalchemy.exc.DBAPIError: when the database is away; the entries stay with the consumer.
    """
    refused = apply_or_refuse(engine, entries)
    for entry, reason in refused:
        about = {"timestep_id": entry.fields.get("timestep_id")}
        logger.warning("Set aside stream entry %s, which can't be recorded: %s", entry.id, reason, extra=about)
        log.dead_letters(GROUP).add(entry, reason)
    log.acknowledge(GROUP, *(entry.id for entry in entries))
    return len(entries) - len(refused)


def apply_or_refuse(engine: Engine, entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """Apply entries in one transaction; when that fails for what one of them says, each half of them by itself.

    Returns:
        Those that can never be applied, each with the reason.

    Raises:
        sqlalchemy.exc.DBAPIError, psycopg.Error: when the database is away.
    """
    try:
        with Session(engine) as session, session.begin():
            apply_events(session, entries)
    except Exception as error:
        reason = _guilt(error)
        if reason is None:
            raise
        if len(entries) == 1:
            return [(entries[0], reason)]
        half = len(entries) // 2
        return [*apply_or_refuse(engine, entries[:half]), *apply_or_refuse(engine, entries[half:])]
    return []


def _guilt(error: Exception) -> str | None:
    """Why an entry can never be recorded; None when the trouble is not its fault and passes."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(cause, psycopg.Error):
        return str(cause) if isinstance(cause, _UNSTORABLE) else None
    if isinstance(error, SQLAlchemyError) and not isinstance(error, StatementError):
        return None
    if isinstance(error, OSError | MemoryError):
        return None
    return f"{type(error).__name__}: {error}"
