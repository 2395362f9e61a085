"""Finds the flow runs whose process is gone, and says so to Prefect.

A run of a killed process stays Running for ever otherwise, and takes a place of its work pool.
Safe to run in several processes: what any of them executes has a heartbeat that all can see.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed
from redis.exceptions import RedisError

from blocks.event_log import EventLog
from flows.worker import InProcessWorker

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
# A run without a heartbeat for this long is lost. It has to outlast a short absence of Redis.
LOST_SECONDS = 60.0


async def keep_swept(
    worker: InProcessWorker, work_pool: str, client: PrefectClient, log: EventLog, heartbeat: Path | None = None
) -> None:
    """Tell what this worker executes, and crash what nobody executes, until cancelled.

    Args:
        heartbeat: touched every time, so that a supervisor can see that this process goes its round.
    """
    trusted_from = 0.0
    while True:
        if heartbeat:
            await asyncio.to_thread(heartbeat.touch)
        try:
            await asyncio.to_thread(log.beat, worker.executing, seconds=LOST_SECONDS)
            if time.monotonic() >= trusted_from:
                await crash_lost(work_pool, client, log)
        except (httpx.HTTPError, RedisError) as error:
            # Heartbeats may have run out meanwhile: let everybody tell again first.
            trusted_from = time.monotonic() + 3 * BEAT_SECONDS
            logger.warning("Lost runs can't be looked for: %s: %s", type(error).__name__, error)
        await asyncio.sleep(BEAT_SECONDS)


async def crash_lost(work_pool: str, client: PrefectClient, log: EventLog) -> None:
    """Crash the pool's runs that are under way for Prefect, but not for any process."""
    under_way = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    runs = await client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=under_way)),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[work_pool])),
    )
    for run in runs:
        if run.state is None:
            continue
        age = (datetime.now(UTC) - run.state.timestamp).total_seconds()
        if age < LOST_SECONDS or await asyncio.to_thread(log.is_beating, run.id):
            continue
        message = f"no process executed it any more, {age:.0f} s after it was {run.state.name}"
        logger.warning("Flow run %s (%s) is lost: %s", run.name, run.id, message)
        await client.set_flow_run_state(run.id, Crashed(message=message), force=True)
