"""Tells people once a day what became of the timesteps."""

import asyncio
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from sqlalchemy import Engine, func
from sqlmodel import Session, col, select

from blocks.database import create_engine
from blocks.errors import ArchiverError
from blocks.settings import get_settings
from blocks.tables import RejectedEventFile, Timestep, TimestepState

PERIOD = timedelta(days=1)
# Not on tape for longer than this is at risk.
AT_RISK = timedelta(hours=48)
# A system that took images within this time, but none in the period, is silent.
ACTIVE = timedelta(days=7)
SHOWN = 5  # failures, rejected files

TITLE = "Timesteps of the day"


class NoNotificationBlock(ArchiverError):
    """ARCHIVER_REPORT_BLOCK names no Prefect block that can notify anybody."""


@flow(name="daily-report", flow_run_name="daily report")
async def daily_report() -> str:
    """Send the report to the notification block that the settings name; without one, only log it."""
    settings = get_settings()
    text = await asyncio.to_thread(_report, datetime.now(UTC))
    get_run_logger().info("%s\n%s", TITLE, text)
    if settings.report_block:
        await notify(settings.report_block, text)
    return text


async def notify(name: str, text: str) -> None:
    """Send a text through a block.

    Args:
        name: `type/name`, as in the Prefect UI, e.g. `slack-webhook/lab`.

    Raises:
        NoNotificationBlock: when there is no such block, or it is of another kind.
    """
    try:
        block: Any = await Block.aload(name)
    except ValueError as error:
        raise NoNotificationBlock(f"ARCHIVER_REPORT_BLOCK is {name}, which Prefect does not have: {error}") from error
    if not isinstance(block, NotificationBlock):
        raise NoNotificationBlock(f"ARCHIVER_REPORT_BLOCK is {name}, which is no notification block")
    await cast(Any, block).notify(text, TITLE)


def _report(now: datetime) -> str:
    engine = create_engine(get_settings())
    try:
        return report(engine, now)
    finally:
        engine.dispose()


def report(engine: Engine, now: datetime) -> str:
    """What happened in the day before `now`, and what somebody should look after, as lines of text."""
    with Session(engine) as session:
        return "\n".join(_lines(session, now))


def _lines(session: Session, now: datetime) -> Iterator[str]:
    start = now - PERIOD
    yield f"from {start:%Y-%m-%d %H:%M} to {now:%Y-%m-%d %H:%M} UTC"
    systems = session.exec(
        select(Timestep.system, func.count())
        .where(col(Timestep.ingested_at) >= start, col(Timestep.ingested_at) < now)
        .group_by(col(Timestep.system))
        .order_by(col(Timestep.system))
    ).all()
    each = ", ".join(f"{system} {count}" for system, count in systems)
    yield f"taken in: {sum(count for _, count in systems)}" + (f" ({each})" if each else "")
    uploaded, size = session.exec(
        select(func.count(), func.coalesce(func.sum(Timestep.size), 0)).where(
            col(Timestep.uploaded_at) >= start, col(Timestep.uploaded_at) < now
        )
    ).one()
    yield f"uploaded: {uploaded}, {float(size or 0) / 1e9:.1f} GB"
    archived = session.exec(
        select(func.count()).where(col(Timestep.archived_at) >= start, col(Timestep.archived_at) < now)
    ).one()
    yield f"on tape: {archived}"
    yield from _listed(
        "failed, and not uploaded since",
        [
            f"{system} {experiment}, position {position}: {reason}"
            for system, experiment, position, reason in session.exec(
                select(Timestep.system, Timestep.experiment_id, Timestep.position, Timestep.failed_reason)
                .where(Timestep.state == TimestepState.FAILED)
                .order_by(col(Timestep.failed_at).desc())
            )
        ],
    )
    rejected = session.exec(select(RejectedEventFile.reason).order_by(col(RejectedEventFile.rejected_at).desc())).all()
    yield from _listed("rejected event files", rejected)
    at_risk, oldest = session.exec(
        select(func.count(), func.min(Timestep.uploaded_at)).where(
            col(Timestep.uploaded_at) < now - AT_RISK, col(Timestep.archived_at).is_(None)
        )
    ).one()
    waiting = f", the oldest since {oldest:%Y-%m-%d}" if oldest else ""
    yield f"not on tape {AT_RISK / timedelta(hours=1):.0f} hours after the upload: {at_risk}{waiting}"
    last = func.max(Timestep.ingested_at)
    silent = session.exec(
        select(Timestep.system, last)
        .where(col(Timestep.ingested_at) >= now - ACTIVE, col(Timestep.ingested_at) < now)
        .group_by(col(Timestep.system))
        .having(last < start)
        .order_by(col(Timestep.system))
    ).all()
    yield from _listed("silent systems", [f"{system}, since {at:%Y-%m-%d %H:%M}" for system, at in silent])


def _listed(what: str, sentences: Sequence[str]) -> Iterator[str]:
    yield f"{what}: {len(sentences)}"
    for sentence in sentences[:SHOWN]:
        yield f"- {sentence}"
    if len(sentences) > SHOWN:
        yield f"- and {len(sentences) - SHOWN} more"
