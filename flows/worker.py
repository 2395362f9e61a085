"""A Prefect worker that executes flow runs inside its own process.

The stock process worker starts a Python interpreter per flow run, which takes longer than most
of our runs do. Registered under the entry point `prefect.collections`, so that
`prefect worker start --pool upload-worker --type in-process` works too.
"""

import asyncio
import contextvars
import logging
import math
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast
from uuid import UUID, uuid4

import anyio
import anyio.abc
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.context import AsyncClientContext, SyncClientContext
from prefect.exceptions import ObjectAlreadyExists
from prefect.flows import Flow
from prefect.logging.loggers import PrefectLogAdapter
from prefect.states import AwaitingRetry
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult
from redis.exceptions import RedisError

from blocks.event_log import EventLog
from blocks.logs import log_about
from blocks.places import Places
from blocks.settings import get_settings
from flows.engine import HANDED_BACK
from flows.executions import Executions
from flows.loading import load
from flows.neighbours import Neighbours
from flows.subject import timestep_of
from flows.threads import use_many_threads

logger = logging.getLogger(__name__)

# A run that was polled finds a place within this long (seconds) after one is free.
PLACE_SECONDS = 0.5
# Between two looks into its queues of a worker that has no place for what is in them (seconds).
FULL_SECONDS = 20.0
# Between two looks whether the Prefect server is there (seconds).
PREFECT_SECONDS = 2.0
# What is under way may take this long (seconds) to be handed back at the end.
GRACE_SECONDS = 10.0


class InProcessResult(BaseWorkerResult):
    """How an in-process run ended: 0 when the flow engine reported its state itself."""


class InProcessWorker(BaseWorker[BaseJobConfiguration, BaseVariables, InProcessResult]):
    """Executes runs of asynchronous flows in its own event loop, several at once.

    Runs come from the pool's queue, as with every worker, or are begun at once by who creates them
    in this process: see `claim` and `begin`. Both take a place of the pool, of which there are as
    many as its concurrency limit says, over all processes.
    """

    type = "in-process"
    job_configuration = BaseJobConfiguration
    _display_name = "In-process"
    _description = "Execute flow runs inside the worker's own process, without the cost of starting another."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._log = EventLog.from_settings(get_settings())
        self._executions = Executions(self._log.flow_runs, Places(self._log.redis, self._work_pool_name))
        self._begun: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._companions: list[asyncio.Task[None]] = []
        self._context = contextvars.copy_context()
        # How many runs wait in the pool's queue for longer than they should: they get places first.
        self.overdue = 0
        self._polled_at = -math.inf
        self.neighbours = Neighbours(self._log.reach, self._work_pool_name, self.name, self._work_queues)

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """Takes no job variables: a run has the environment of its worker.

        The Prefect server checks the variables' schema anew for each run, which took a twentieth of its time.
        """
        return {"job_configuration": {"env": {}}, "variables": {"type": "object", "additionalProperties": False}}

    # --- the life of the worker

    async def setup(self) -> None:
        """Connect, once there is something to connect to, and begin to tell what is executed."""
        use_many_threads(asyncio.get_running_loop())
        await _wait_for_prefect()
        await super().setup()
        # One client for all runs: to connect takes longer than most of what they ask.
        await self._exit_stack.enter_async_context(AsyncClientContext())
        self._exit_stack.enter_context(SyncClientContext())
        self._context = contextvars.copy_context()
        await self.ensure_queues()
        executions = self._executions
        for companion in (
            executions.keep_telling(),
            executions.keep_cancelling(self.client),
            self.neighbours.keep_telling(),
        ):
            self._companions.append(asyncio.create_task(companion))
        cast(anyio.abc.TaskGroup, self._runs_task_group).start_soon(self._heed_companions)

    async def _heed_companions(self) -> None:
        """End the worker with what one of its companions failed for: others would take its runs for dead."""
        ended, _ = await asyncio.wait(self._companions, return_when=asyncio.FIRST_COMPLETED)
        for companion in ended:
            if not companion.cancelled():
                companion.result()

    async def teardown(self, *exc_info: Any) -> None:
        """Hand back what is under way; a worker that ends by itself, after a single poll, finishes it."""
        is_stopped = any(exc_info)
        with anyio.CancelScope(shield=True):
            if is_stopped:
                for task in self._begun:
                    task.cancel()
                cast(anyio.abc.TaskGroup, self._runs_task_group).cancel_scope.cancel()
            # Before the connections are closed that it takes.
            with anyio.move_on_after(GRACE_SECONDS if is_stopped else math.inf):
                await self._executions.wait_for_all()
            for companion in self._companions:
                companion.cancel()
            await asyncio.wait(self._companions)
        await super().teardown(*exc_info)
        self._log.close()

    async def ensure_queues(self) -> None:
        """Have the queues that this worker polls: while one is missing, the server hands out the runs of none."""
        known = {queue.name for queue in await self.client.read_work_queues(work_pool_name=self._work_pool_name)}
        for name in self._work_queues - known:
            with suppress(ObjectAlreadyExists):  # another worker was faster
                await self.client.create_work_queue(name, work_pool_name=self._work_pool_name)

    @property
    def pool(self) -> str:
        """The name of its work pool."""
        return self._work_pool_name

    @property
    def free(self) -> float:
        """How many more runs are this worker's share of the places in its pool, if others are there for the same."""
        limit = self.work_pool.concurrency_limit
        if limit is None:
            return math.inf
        return math.ceil(limit / (1 + self.neighbours.count)) - len(self._executions)

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        # A worker without a free place asks only so often that its queues count as served.
        if self.free <= 0 and time.monotonic() < self._polled_at + FULL_SECONDS:
            return []
        self._polled_at = time.monotonic()
        found = await super()._get_scheduled_flow_runs()
        if not self.neighbours.count:
            return found
        # What is more than its share would wait here for a place, while another worker has one.
        new = [one for one in found if one.flow_run.id not in self._submitting_flow_run_ids]
        return new[: max(int(min(self.free, len(new))), 0)]

    # --- runs that are begun where they are created

    async def claim(self) -> UUID | None:
        """Take a place for a run that is about to be created here; None if the run has to queue."""
        if not self.is_setup or self._work_pool is None or self.work_pool.is_paused or self.free <= 0:
            return None
        limit = self.work_pool.concurrency_limit
        claim = uuid4()
        free_for_us = None if limit is None else limit - self.overdue
        return claim if await self._executions.take_place(claim, free_for_us) else None

    async def give_back(self, claim: UUID) -> None:
        """Give a claimed place back that no run needs."""
        await self._executions.give_back(claim)

    def begin(self, flow_run: FlowRun, flow: Flow[..., Any], claim: UUID) -> asyncio.Task[None]:
        """Execute a run that was created for a claimed place; the task ends with it, and never fails."""
        self._executions.add(flow_run.id)
        task = asyncio.create_task(self._execute_claimed(flow_run, flow, claim), context=self._context.copy())
        self._begun.add(task)

        def end(_: asyncio.Task[None]) -> None:
            self._begun.discard(task)
            if flow_run.id in self._executions:
                # It was cancelled before its first step, so nothing in it could see to its run.
                self._ending.add(ending := asyncio.create_task(self._hand_back(flow_run, claim)))
                ending.add_done_callback(self._ending.discard)

        task.add_done_callback(end)
        return task

    async def _hand_back(self, flow_run: FlowRun, claim: UUID) -> None:
        try:
            await self.client.set_flow_run_state(flow_run.id, AwaitingRetry(message=HANDED_BACK), force=True)
        except Exception:
            # The sweep will find that nobody executes it.
            logger.exception("Flow run %s (%s) was lost", flow_run.name, flow_run.id)
        finally:
            await self._executions.remove(flow_run.id, claim)

    async def _execute_claimed(self, flow_run: FlowRun, flow: Flow[..., Any], claim: UUID) -> None:
        _log_about(flow_run)
        try:
            async with self._handed_back_when_stopped(flow_run):
                await self._executions.tell([flow_run.id])
            await self._executions.execute(flow_run, flow, is_new=True)
        except Exception:
            # Its state is unknown now. If it is still Running, the sweep will find that nobody executes it.
            logger.exception("Flow run %s (%s) was lost", flow_run.name, flow_run.id)
        finally:
            await self._executions.remove(flow_run.id, claim)

    @asynccontextmanager
    async def _handed_back_when_stopped(self, flow_run: FlowRun) -> AsyncIterator[None]:
        """What happens before the flow engine has the run, and says by itself what becomes of it."""
        try:
            yield
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await self.client.set_flow_run_state(flow_run.id, AwaitingRetry(message=HANDED_BACK), force=True)
            raise

    # --- runs from the pool's queue

    async def run(
        self,
        flow_run: FlowRun,
        configuration: BaseJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> InProcessResult:
        """Execute a flow run to its end; its state is reported by the flow engine."""
        self._executions.add(flow_run.id)
        try:
            async with self._handed_back_when_stopped(flow_run):
                # At once: by its state's time, and another clock, it may be taken for lost.
                await self._executions.tell([flow_run.id])
                flow = await self._load(flow_run)
                if task_status is not None:
                    task_status.started(os.getpid())
                # The server hands out runs before it counts them, so now and then more than the pool's limit.
                await self._wait_for_place(flow_run.id)
                # A queue gives out runs without their states, which the flow engine has to know at their end.
                flow_run = await self.client.read_flow_run(flow_run.id)
            await self._executions.execute(flow_run, flow, is_new=False)
        finally:
            await self._executions.remove(flow_run.id, flow_run.id)
        return InProcessResult(identifier=f"{self.name}:{flow_run.id}", status_code=0)

    async def _wait_for_place(self, flow_run_id: UUID) -> None:
        while True:
            try:
                if await self._executions.take_place(flow_run_id, self.work_pool.concurrency_limit):
                    return
            except RedisError as error:
                # The run must not end for that: nobody would make another, where a person has retried it.
                logger.warning("Flow run %s waits for Redis: %s: %s", flow_run_id, type(error).__name__, error)
            await asyncio.sleep(PLACE_SECONDS)

    async def _load(self, flow_run: FlowRun) -> Flow[..., Any]:
        deployment = await self.client.read_deployment(cast(UUID, flow_run.deployment_id))
        return await load(cast(str, deployment.entrypoint))

    async def _submit_run(self, flow_run: FlowRun) -> None:
        _log_about(flow_run)
        await super()._submit_run(flow_run)

    def get_flow_run_logger(self, flow_run: FlowRun) -> PrefectLogAdapter:
        """Names the timestep as well, where the run is about one."""
        log = super().get_flow_run_logger(flow_run)
        if timestep_id := timestep_of(flow_run.idempotency_key):
            log.extra = {**(log.extra or {}), "timestep_id": str(timestep_id)}
        return log


def _log_about(flow_run: FlowRun) -> None:
    if timestep_id := timestep_of(flow_run.idempotency_key):
        log_about(timestep_id)


async def _wait_for_prefect() -> None:
    # Without one, a worker would end, and whatever starts it again waits longer each time.
    async with get_client() as client:
        while error := await client.api_healthcheck():
            logger.warning("Waiting for the Prefect server: %s: %s", type(error).__name__, error)
            await asyncio.sleep(PREFECT_SECONDS)
