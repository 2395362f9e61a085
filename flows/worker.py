"""A Prefect worker that executes flow runs inside its own process.

The stock process worker starts a Python interpreter per flow run, which takes longer than most
of our runs do. Registered under the entry point `prefect.collections`, so that
`prefect worker start --pool upload-worker --type in-process` works too.
"""

import asyncio
import contextvars
import logging
import os
from collections.abc import Callable, Coroutine
from copy import copy
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID, uuid4

import anyio
import anyio.abc
from prefect.client.schemas.objects import FlowRun
from prefect.context import AsyncClientContext, SyncClientContext
from prefect.exceptions import Abort, Pause
from prefect.filesystems import LocalFileSystem
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.logging.loggers import PrefectLogAdapter
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult
from redis.exceptions import RedisError

from blocks.event_log import EventLog
from blocks.logs import log_about
from blocks.places import HOLD_SECONDS, Places
from blocks.settings import get_settings
from flows.engine import InProcessEngine
from flows.subject import timestep_of

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
# A run that was polled finds a place within this long (seconds) after one is free.
PLACE_SECONDS = 0.5
# What is under way may take this long (seconds) to be handed back at the end.
GRACE_SECONDS = 10.0


class InProcessResult(BaseWorkerResult):
    """How an in-process run ended: 0 when the flow engine reported its state itself."""


@dataclass
class _Execution:
    """A run under way: what executes it, and what ends it early."""

    engine: InProcessEngine | None = None
    scope: anyio.CancelScope | None = None
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True
        if self.engine:
            self.engine.cancel()
        if self.scope:
            self.scope.cancel()


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
        self._places = Places(self._log.redis, self._work_pool_name)
        self._executing: dict[UUID, _Execution] = {}
        self._held: set[UUID] = set()
        self._begun: set[asyncio.Task[None]] = set()
        self._heart: asyncio.Task[None] | None = None
        self._context = contextvars.copy_context()
        self._ended = asyncio.Event()
        # How many runs wait in the pool's queue for longer than they should: they get places first.
        self.overdue = 0

    # --- the life of the worker

    async def setup(self) -> None:
        """Connect, and begin to tell what is executed."""
        await super().setup()
        # One client for all runs: to connect takes longer than most of what they ask.
        await self._exit_stack.enter_async_context(AsyncClientContext())
        self._exit_stack.enter_context(SyncClientContext())
        self._context = contextvars.copy_context()
        self._heart = asyncio.create_task(self._beat())

    async def teardown(self, *exc_info: Any) -> None:
        """Hand back what is under way."""
        with anyio.CancelScope(shield=True):
            for task in self._begun:
                task.cancel()
            if self._begun:
                await asyncio.wait(self._begun, timeout=GRACE_SECONDS)
            if self._heart:
                self._heart.cancel()
                await asyncio.wait([self._heart])
        await super().teardown(*exc_info)
        self._log.close()

    async def _beat(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._log.flow_runs.beat, frozenset(self._executing), seconds=HOLD_SECONDS)
                await asyncio.to_thread(self._places.keep, frozenset(self._held))
            except RedisError as error:
                logger.warning("Nobody can be told what is executed here: %s: %s", type(error).__name__, error)
            await asyncio.sleep(BEAT_SECONDS)

    @property
    def executing(self) -> frozenset[UUID]:
        """The flow runs that this process executes now."""
        return frozenset(self._executing)

    async def wait_for_end(self) -> None:
        """Wait until a run ends here."""
        self._ended.clear()
        await self._ended.wait()

    def cancel(self, flow_run_id: UUID) -> None:
        """End a run that is executed here, as a person wishes; its state becomes Cancelled."""
        if execution := self._executing.get(flow_run_id):
            execution.cancel()

    # --- runs that are begun where they are created

    async def claim(self) -> UUID | None:
        """Take a place for a run that is about to be created here; None if the run has to queue."""
        if not self.is_setup or self._work_pool is None or self.work_pool.is_paused:
            return None
        limit = self.work_pool.concurrency_limit
        claim = uuid4()
        free_for_us = None if limit is None else limit - self.overdue
        if not await asyncio.to_thread(self._places.take, claim, free_for_us):
            return None
        self._held.add(claim)
        return claim

    async def give_back(self, claim: UUID) -> None:
        """Give a claimed place back that no run needs."""
        self._held.discard(claim)
        await asyncio.to_thread(self._places.give_back, claim)

    def begin(self, flow_run: FlowRun, flow: Flow[..., Any], claim: UUID) -> asyncio.Task[None]:
        """Execute a run that was created for a claimed place; the task ends with it, and never fails."""
        self._executing[flow_run.id] = _Execution()
        task = asyncio.create_task(self._execute_claimed(flow_run, flow, claim), context=self._context.copy())
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return task

    async def _execute_claimed(self, flow_run: FlowRun, flow: Flow[..., Any], claim: UUID) -> None:
        _log_about(flow_run)
        self._observe(flow_run.id)
        try:
            await asyncio.to_thread(self._log.flow_runs.beat, [flow_run.id], seconds=HOLD_SECONDS)
            await self._execute(flow_run, flow, is_named=True)
        except Exception:
            # Its state is unknown now. If it is still Running, the sweep will find that nobody executes it.
            logger.exception("Flow run %s (%s) was lost", flow_run.name, flow_run.id)
        finally:
            self._end(flow_run.id)
            with anyio.CancelScope(shield=True):
                await self.give_back(claim)
            self._ended.set()

    # --- runs from the pool's queue

    async def run(
        self,
        flow_run: FlowRun,
        configuration: BaseJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> InProcessResult:
        """Execute a flow run to its end; its state is reported by the flow engine."""
        self._executing[flow_run.id] = _Execution()
        try:
            flow = await self._load(flow_run)
            if task_status is not None:
                task_status.started(os.getpid())
            # The server hands out runs before it counts them, so now and then more than the pool's limit.
            await self._wait_for_place(flow_run.id)
            await self._execute(flow_run, flow, is_named=False)
        finally:
            self._end(flow_run.id)
            with anyio.CancelScope(shield=True):
                await self.give_back(flow_run.id)
            self._ended.set()
        return InProcessResult(identifier=f"{self.name}:{flow_run.id}", status_code=0)

    async def _wait_for_place(self, flow_run_id: UUID) -> None:
        while not await asyncio.to_thread(self._places.take, flow_run_id, self.work_pool.concurrency_limit):  # noqa: ASYNC110 -- a place may become free in another process
            await asyncio.sleep(PLACE_SECONDS)
        self._held.add(flow_run_id)

    async def _load(self, flow_run: FlowRun) -> Flow[..., Any]:
        deployment = await self.client.read_deployment(cast(UUID, flow_run.deployment_id))
        return await load(cast(str, deployment.entrypoint))

    async def _submit_run(self, flow_run: FlowRun) -> None:
        _log_about(flow_run)
        await super()._submit_run(flow_run)
        # Prefect leaves the cancellation of a run that began to its process, and no longer listens.
        if flow_run.id in self._executing:
            self._observe(flow_run.id)

    def get_flow_run_logger(self, flow_run: FlowRun) -> PrefectLogAdapter:
        """Names the timestep as well, where the run is about one."""
        log = super().get_flow_run_logger(flow_run)
        if timestep_id := timestep_of(flow_run.idempotency_key):
            log.extra = {**(log.extra or {}), "timestep_id": str(timestep_id)}
        return log

    # --- both

    async def _execute(self, flow_run: FlowRun, flow: Flow[..., Any], *, is_named: bool) -> None:
        execution = self._executing[flow_run.id]
        engine = InProcessEngine(flow, flow_run, is_named=is_named)
        with anyio.CancelScope() as scope:
            execution.engine, execution.scope = engine, scope
            if execution.is_cancelled:
                execution.cancel()
            try:
                await engine.run()
            except (Abort, Pause) as signal:
                logger.info("Flow run %s goes on later or elsewhere: %s", flow_run.name, signal)

    def _end(self, flow_run_id: UUID) -> None:
        self._executing.pop(flow_run_id, None)
        if self._cancelling_observer is not None:
            self._cancelling_observer.remove_in_flight_flow_run_id(flow_run_id)

    def _observe(self, flow_run_id: UUID) -> None:
        if self._cancelling_observer is not None:
            self._cancelling_observer.add_in_flight_flow_run_id(flow_run_id)

    async def _cancel_run(self, flow_run_id: UUID) -> None:
        if flow_run_id in self._executing:
            self.cancel(flow_run_id)
        else:
            await super()._cancel_run(flow_run_id)


def _log_about(flow_run: FlowRun) -> None:
    if timestep_id := timestep_of(flow_run.idempotency_key):
        log_about(timestep_id)


async def load(entrypoint: str) -> Flow[..., Any]:
    """The flow of a deployment, ready to be executed many times."""
    if entrypoint not in _flows:
        # In a thread, because a flow imports all that it needs.
        flow: Flow[..., Any] = await asyncio.to_thread(
            load_flow_from_entrypoint, entrypoint, use_placeholder_flow=False
        )
        if flow.persist_result is False and flow.result_storage is None:
            # Prefect would ask the server where to store results, in each run, and let all others wait for the answer.
            flow = copy(flow)
            flow.result_storage = LocalFileSystem(basepath=str(PREFECT_LOCAL_STORAGE_PATH.value()))
        _flows[entrypoint] = flow
    return _flows[entrypoint]


_flows: dict[str, Flow[..., Any]] = {}


async def serve(worker: InProcessWorker, *companions: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a worker and what belongs to the same entrypoint until cancelled.

    What is under way then is handed back; it is not acknowledged yet, so it is taken up again by
    whichever worker is there.
    """
    async with anyio.create_task_group() as group:
        group.start_soon(worker.start)
        for companion in companions:
            group.start_soon(companion)
