"""Finds the flow runs that nobody sees to, and drives them on.

A run of a killed process stays Running for ever otherwise, and takes a place of its work pool.
Safe to run in several processes: what any of them executes has a heartbeat that all can see.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
    WorkQueueFilter,
    WorkQueueFilterId,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkQueue, WorkQueueStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed
from redis.exceptions import RedisError

from blocks.event_log import EventLog
from flows.again import try_again
from flows.executions import BEAT_SECONDS
from flows.subject import timestep_of
from flows.worker import InProcessWorker

logger = logging.getLogger(__name__)

# A run without a heartbeat for this long is lost. It has to outlast a short absence of Redis.
LOST_SECONDS = 45.0
# A run that waits this long for a place (seconds) gets one before those that are begun where they are created.
OVERDUE_SECONDS = 5.0
# One that waits this long (seconds) may be in no queue any more.
STRANDED_SECONDS = 60.0
# How many runs the server is asked for at a time; it gives no more than 200.
PAGE = 200


async def keep_swept(
    worker: InProcessWorker, work_pool: str, client: PrefectClient, log: EventLog, heartbeat: Path | None = None
) -> None:
    """Find what nobody executes, and make room for what waits.

    Args:
        heartbeat: touched every time, so that a supervisor can see that this process goes its round.
    """
    trusted_from = search_at = 0.0
    while True:
        if heartbeat:
            await asyncio.to_thread(heartbeat.touch)
        await asyncio.sleep(BEAT_SECONDS)
        if not worker.is_setup:
            continue  # it still waits for the Prefect server
        try:
            await worker.ensure_queues()
            worker.overdue = await count_overdue(work_pool, client)
            # A beat that fails is missed by everybody: is Redis there?
            await asyncio.to_thread(log.redis.ping)
            if time.monotonic() >= trusted_from:
                await end_lost(await under_way(work_pool, client), client, log)
            if time.monotonic() >= search_at:
                await end_stranded(work_pool, client)
                search_at = time.monotonic() + STRANDED_SECONDS
        except (httpx.HTTPError, ObjectNotFound, RedisError) as error:
            # Heartbeats may have run out meanwhile: let everybody tell again first.
            trusted_from = time.monotonic() + 3 * BEAT_SECONDS
            logger.warning("Lost runs can't be looked for: %s: %s", type(error).__name__, error)


async def under_way(work_pool: str, client: PrefectClient) -> list[FlowRun]:
    """The pool's runs that somebody should be executing, or ending, now."""
    types = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    wanted = FlowRunFilter(state=FlowRunFilterState(type=types))
    return await _all_runs(client, flow_run_filter=wanted, work_pool_filter=_only(work_pool))


async def _all_runs(client: PrefectClient, **filters: Any) -> list[FlowRun]:
    """All that there are. One that comes or goes meanwhile may shift another out of sight, until the next time."""
    found: dict[UUID, FlowRun] = {}
    offset = 0
    while page := await client.read_flow_runs(**filters, sort=FlowRunSort.ID_DESC, limit=PAGE, offset=offset):
        found |= {run.id: run for run in page}
        if len(page) < PAGE:
            break
        offset += PAGE
    return list(found.values())


async def count_overdue(work_pool: str, client: PrefectClient) -> int:
    """How many of the pool's runs wait to be taken from their queue, longer than they should.

    Those in a queue that is paused, or polled by nobody, need no place, and of a limited one only so many do.
    """
    waiting = _waiting(OVERDUE_SECONDS)

    async def count(queues: list[WorkQueue], limit: int) -> int:
        if not queues or limit <= 0:
            return 0
        among = WorkQueueFilter(id=WorkQueueFilterId(any_=[queue.id for queue in queues]))
        return len(await client.read_flow_runs(flow_run_filter=waiting, work_queue_filter=among, limit=limit))

    queues = await client.read_work_queues(work_pool_name=work_pool)
    served = [queue for queue in queues if queue.status == WorkQueueStatus.READY]
    overdue = await count([queue for queue in served if queue.concurrency_limit is None], 10)
    for queue in served:
        if queue.concurrency_limit is not None:
            overdue += await count([queue], queue.concurrency_limit - (queue.active_slots or 0))
    return overdue


async def end_lost(runs: list[FlowRun], client: PrefectClient, log: EventLog) -> None:
    """End those of the runs that are under way for Prefect, but not for any process.

    Whoever has the run's work done makes another run. Where nobody does, the run itself is taken up again.
    """
    for run in runs:
        if run.state is None:
            continue
        age = (datetime.now(UTC) - run.state.timestamp).total_seconds()
        if age < LOST_SECONDS or await asyncio.to_thread(log.flow_runs.is_beating, run.id):
            continue
        message = f"no process executed it any more, {age:.0f} s after it was {run.state.name}"
        about = {"timestep_id": str(timestep_of(run.idempotency_key) or "")}
        logger.warning("Flow run %s (%s) is lost: %s", run.name, run.id, message, extra=about)
        state: State[None]
        if run.state.type == StateType.CANCELLING:
            state = Cancelled(message=message)
        elif await _is_followed(run, client):
            state = Crashed(message=message)
        else:
            # Soon, however often it was begun: nothing is wrong with its work.
            state = try_again(message, 1, forever=True)
        await client.set_flow_run_state(run.id, state, force=True)


async def _is_followed(run: FlowRun, client: PrefectClient) -> bool:
    """Whether another run follows when this one ends without having done its work.

    It does not when a person or the clock asked for the run, nor when the run had ended before and was retried.
    """
    if run.auto_scheduled or run.idempotency_key is None:
        return False
    return not any(state.is_final() for state in await client.read_flow_run_states(run.id))


async def end_stranded(work_pool: str, client: PrefectClient) -> None:
    """End the runs that wait in no queue, because theirs was deleted: no worker would ever be given them."""
    # They know no pool any more, but its deployments have its name.
    ours = DeploymentFilter(name=DeploymentFilterName(any_=[work_pool]))
    waiting = _waiting(STRANDED_SECONDS)
    for run in await _all_runs(client, flow_run_filter=waiting, deployment_filter=ours):
        if run.work_queue_id is None:
            logger.warning("Flow run %s (%s) waits in no work queue: it was deleted", run.name, run.id)
            await client.set_flow_run_state(run.id, Crashed(message="its work queue was deleted"), force=True)


def _waiting(seconds: float) -> FlowRunFilter:
    """Those that were due so many seconds ago, whatever their state is called."""
    due = datetime.now(UTC) - timedelta(seconds=seconds)
    return FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(before_=due),
    )


def _only(work_pool: str) -> WorkPoolFilter:
    return WorkPoolFilter(name=WorkPoolFilterName(any_=[work_pool]))
