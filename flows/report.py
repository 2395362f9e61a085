"""Tells people once a day what became of the timesteps."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta

from prefect import flow, get_run_logger
from sqlalchemy import Engine, func
from sqlmodel import Session, col, select

from blocks.audit_outcome import AuditOutcome
from blocks.database import create_engine
from blocks.early_warnings import EarlyWarnings
from blocks.event_log import EventLog
from blocks.expiry import ExpiryRule, ExpiryRules
from blocks.flight_outcome import FlightOutcome
from blocks.object_store import ObjectStore
from blocks.redis_answers import AUDITS, FLIGHTS, MEMORY, SYSTEMS, UPLOADERS, RedisAnswers
from blocks.redis_memory import RedisMemory
from blocks.settings import get_settings
from blocks.system_seen import SystemSeen
from blocks.tables import RejectedEventFile, Timestep, TimestepState, of_microscopes
from flows.notification import notify

PERIOD = timedelta(days=1)
# Not on tape for longer than this is at risk.
AT_RISK = timedelta(hours=48)
SHOWN = 5  # failures, rejected files

TITLE = "Timesteps of the day"


@flow(name="daily-report", flow_run_name="daily report")
async def daily_report() -> str:
    """Send the report to the notification block that the settings name; without one, only log it."""
    settings = get_settings()
    text = await asyncio.to_thread(_report, datetime.now(UTC))
    get_run_logger().info("%s\n%s", TITLE, text)
    if settings.report_block:
        await notify(settings.report_block, TITLE, text)
    return text


def _report(now: datetime) -> str:
    settings = get_settings()
    rules = ExpiryRules(ObjectStore.from_settings(settings)).read()
    engine = create_engine(settings)
    try:
        with closing(EventLog.from_settings(settings)) as log:
            redis = RedisAnswers()
            return report(
                engine,
                now,
                redis.ask(log.systems.all, [], SYSTEMS),
                rules,
                redis.ask(log.flights.last, None, FLIGHTS),
                lambda systems: redis.ask(lambda: log.reach.not_uploading(systems), set(), UPLOADERS),
                redis.ask(lambda: log.memory, None, MEMORY),
                redis.ask(log.audits.last, [], AUDITS),
                redis.missing,
            )
    finally:
        engine.dispose()


def report(
    engine: Engine,
    now: datetime,
    systems: Sequence[SystemSeen] = (),
    rules: Sequence[ExpiryRule] = (),
    flight: FlightOutcome | None = None,
    not_uploading: Callable[[Iterable[str]], set[str]] = lambda _systems: set(),
    memory: RedisMemory | None = None,
    audits: Sequence[AuditOutcome] = (),
    missing: Sequence[str] = (),
) -> str:
    """What happened in the day before `now`, and what somebody should look after, as lines of text.

    Args:
        systems: what was seen of them last.
        rules: by which the bucket deletes objects.
        flight: how the last flight check ended.
        not_uploading: tells of systems which of them no upload-worker reaches.
        memory: how full Redis is.
        audits: what the last ones left.
        missing: what could not be asked, because Redis is away.
    """
    with Session(engine) as session:
        early = EarlyWarnings.of(session, systems, rules, now, flight, not_uploading, memory, audits)
        lines = [*_lines(session, now, early)]
    if missing:
        lines.append(f"Redis can't be asked, so some warnings may be missing: {', '.join(missing)}")
    return "\n".join(lines)


def _lines(session: Session, now: datetime, early: EarlyWarnings) -> Iterator[str]:
    start = now - PERIOD
    is_real = of_microscopes(Timestep)
    yield f"from {start:%Y-%m-%d %H:%M} to {now:%Y-%m-%d %H:%M} UTC"
    systems = session.exec(
        select(Timestep.system, func.count())
        .where(is_real, col(Timestep.ingested_at) >= start, col(Timestep.ingested_at) < now)
        .group_by(col(Timestep.system))
        .order_by(col(Timestep.system))
    ).all()
    each = ", ".join(f"{early.names.get(system, system)} {count}" for system, count in systems)
    yield f"taken in: {sum(count for _, count in systems)}" + (f" ({each})" if each else "")
    uploaded, size = session.exec(
        select(func.count(), func.coalesce(func.sum(Timestep.size), 0)).where(
            is_real, col(Timestep.uploaded_at) >= start, col(Timestep.uploaded_at) < now
        )
    ).one()
    yield f"uploaded: {uploaded}, {float(size or 0) / 1e9:.1f} GB"
    archived = session.exec(
        select(func.count()).where(is_real, col(Timestep.archived_at) >= start, col(Timestep.archived_at) < now)
    ).one()
    yield f"on tape: {archived}"
    yield from _listed(
        "failed, and not uploaded since",
        [
            f"{early.names.get(system, system)} {experiment}, position {position}: {reason}"
            for system, experiment, position, reason in session.exec(
                select(Timestep.system, Timestep.experiment_id, Timestep.position, Timestep.failed_reason)
                .where(is_real, Timestep.state == TimestepState.FAILED)
                .order_by(col(Timestep.failed_at).desc())
            )
        ],
    )
    rejected = session.exec(select(RejectedEventFile.reason).order_by(col(RejectedEventFile.rejected_at).desc())).all()
    yield from _listed("rejected event files", rejected)
    at_risk, oldest = session.exec(
        select(func.count(), func.min(Timestep.uploaded_at)).where(
            is_real, col(Timestep.uploaded_at) < now - AT_RISK, col(Timestep.archived_at).is_(None)
        )
    ).one()
    waiting = f", the oldest since {oldest:%Y-%m-%d}" if oldest else ""
    yield f"not on tape {AT_RISK / timedelta(hours=1):.0f} hours after the upload: {at_risk}{waiting}"
    warnings = early.sentences()
    yield from _listed("early warnings", warnings, shown=len(warnings))


def _listed(what: str, sentences: Sequence[str], shown: int = SHOWN) -> Iterator[str]:
    yield f"{what}: {len(sentences)}"
    for sentence in sentences[:shown]:
        yield f"- {sentence}"
    if len(sentences) > shown:
        yield f"- and {len(sentences) - shown} more"
