"""A Prefect worker that executes flow runs inside its own process.

The stock process worker starts a Python interpreter per flow run, which takes longer than most
of our runs do. Registered under the entry point `prefect.collections`, so that
`prefect worker start --pool upload-worker --type in-process` works too.
"""

import asyncio
import logging
import math
import os
from collections.abc import Callable, Coroutine
from typing import Any, cast
from uuid import UUID

import anyio
import anyio.abc
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow_async
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

logger = logging.getLogger(__name__)


class InProcessResult(BaseWorkerResult):
    """How an in-process run ended: 0 when the flow engine reported its state itself."""


class InProcessWorker(BaseWorker[BaseJobConfiguration, BaseVariables, InProcessResult]):
    """Executes runs of asynchronous flows in its own event loop, several at once."""

    type = "in-process"
    job_configuration = BaseJobConfiguration
    _display_name = "In-process"
    _description = "Execute flow runs inside the worker's own process, without the cost of starting another."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._executing: set[UUID] = set()
        self._slots = anyio.CapacityLimiter(math.inf)

    @property
    def executing(self) -> frozenset[UUID]:
        """The flow runs that this process executes now."""
        return frozenset(self._executing)

    async def run(
        self,
        flow_run: FlowRun,
        configuration: BaseJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> InProcessResult:
        """Execute a flow run to its end; its state is reported by the flow engine."""
        # The server hands out runs before it counts them, so now and then more than the pool's limit.
        self._slots.total_tokens = self.work_pool.concurrency_limit or math.inf
        self._executing.add(flow_run.id)
        try:
            async with self._slots:
                flow = await self._load(flow_run)
                if task_status is not None:
                    task_status.started(os.getpid())
                await run_flow_async(flow, flow_run, flow_run.parameters, return_type="state")
        finally:
            self._executing.discard(flow_run.id)
        return InProcessResult(identifier=f"{self.name}:{flow_run.id}", status_code=0)

    async def _load(self, flow_run: FlowRun) -> Flow[..., Any]:
        deployment = await self.client.read_deployment(cast(UUID, flow_run.deployment_id))
        # In a thread, because the first run of a flow imports all that it needs.
        return await asyncio.to_thread(
            load_flow_from_entrypoint, cast(str, deployment.entrypoint), use_placeholder_flow=False
        )


async def serve(worker: InProcessWorker, *companions: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a worker and what belongs to the same entrypoint until cancelled.

    What is under way then is cancelled; it is not acknowledged yet, so it is taken up again
    after the next start.
    """
    async with anyio.create_task_group() as group:
        group.start_soon(worker.start)
        for companion in companions:
            group.start_soon(companion)
