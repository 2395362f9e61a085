"""Finds the flow runs that nobody sees to, and drives them on.

A run of a killed process stays Running for ever otherwise, and takes a place of its work pool.
Safe to run in several processes: what any of them executes has a heartbeat that all can see.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Cancelled, Crashed
from redis.exceptions import RedisError

from blocks.event_log import EventLog
from flows.subject import timestep_of
from flows.worker import BEAT_SECONDS, InProcessWorker

logger = logging.getLogger(__name__)

# A run without a heartbeat for this long is lost. It has to outlast a short absence of Redis.
LOST_SECONDS = 45.0
# A run that waits this long for a place (seconds) gets one before those that are begun where they are created.
OVERDUE_SECONDS = 5.0


async def keep_swept(
    worker: InProcessWorker, work_pool: str, client: PrefectClient, log: EventLog, heartbeat: Path | None = None
) -> None:
    """Find what nobody executes, cancel what should not be executed, and make room for what waits.

    Args:
        heartbeat: touched every time, so that a supervisor can see that this process goes its round.
    """
    trusted_from = 0.0
    while True:
        if heartbeat:
            await asyncio.to_thread(heartbeat.touch)
        await asyncio.sleep(BEAT_SECONDS)
        try:
            worker.overdue = await count_overdue(work_pool, client)
            runs = await under_way(work_pool, client)
            for run in runs:
                # Normally an event tells the worker at once; but the server may have been away.
                if run.state_type == StateType.CANCELLING:
                    worker.cancel(run.id)
            # A beat that fails is missed by everybody: is Redis there?
            await asyncio.to_thread(log.redis.ping)
            if time.monotonic() >= trusted_from:
                await end_lost(runs, client, log)
        except (httpx.HTTPError, RedisError) as error:
            # Heartbeats may have run out meanwhile: let everybody tell again first.
            trusted_from = time.monotonic() + 3 * BEAT_SECONDS
            logger.warning("Lost runs can't be looked for: %s: %s", type(error).__name__, error)


async def under_way(work_pool: str, client: PrefectClient) -> list[FlowRun]:
    """The pool's runs that somebody should be executing, or ending, now."""
    types = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    return await client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=types)), work_pool_filter=_only(work_pool)
    )


async def count_overdue(work_pool: str, client: PrefectClient) -> int:
    """How many of the pool's runs wait to be taken from its queue, longer than they should."""
    before = datetime.now(UTC) - timedelta(seconds=OVERDUE_SECONDS)
    waiting = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(before_=before),
    )
    return len(await client.read_flow_runs(flow_run_filter=waiting, work_pool_filter=_only(work_pool), limit=10))


async def end_lost(runs: list[FlowRun], client: PrefectClient, log: EventLog) -> None:
    """End those of the runs that are under way for Prefect, but not for any process."""
    for run in runs:
        if run.state is None:
            continue
        age = (datetime.now(UTC) - run.state.timestamp).total_seconds()
        if age < LOST_SECONDS or await asyncio.to_thread(log.flow_runs.is_beating, run.id):
            continue
        message = f"no process executed it any more, {age:.0f} s after it was {run.state.name}"
        about = {"timestep_id": str(timestep_of(run.idempotency_key) or "")}
        logger.warning("Flow run %s (%s) is lost: %s", run.name, run.id, message, extra=about)
        is_unwanted = run.state.type == StateType.CANCELLING
        await client.set_flow_run_state(
            run.id, Cancelled(message=message) if is_unwanted else Crashed(message=message), force=True
        )


def _only(work_pool: str) -> WorkPoolFilter:
    return WorkPoolFilter(name=WorkPoolFilterName(any_=[work_pool]))
