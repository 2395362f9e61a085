"""What every entrypoint that is a worker has: its name, its work pool, its connections, and its life."""

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass

import anyio
from prefect.client.orchestration import PrefectClient, get_client

from blocks.event_log import EventLog
from blocks.settings import Settings, get_settings
from flows.runs import Runs
from flows.sweep import keep_swept
from flows.worker import InProcessWorker

Companion = Callable[[], Coroutine[None, None, None]]


def consumer_name(entrypoint: str) -> str:
    """Stable across restarts, so that a restarted process finds what it held."""
    return f"{entrypoint}@{get_settings().consumer}"


@dataclass(frozen=True)
class Entrypoint:
    """A worker with the name of its entrypoint and work pool, and its connections."""

    name: str
    worker: InProcessWorker
    client: PrefectClient
    log: EventLog

    def runs(self, deployment: str) -> Runs:
        """The runs of a deployment of this pool, executed here where there is a place."""
        return Runs(deployment, self.client, self.log, self.worker)

    async def serve(self, *companions: Companion) -> None:
        """Execute the pool's runs, and run the companions beside them, until cancelled.

        What is under way then is handed back; it is not acknowledged yet, so it is taken up again by whichever worker
        is there.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(self.worker.start)
            beat = get_settings().heartbeat_file
            group.start_soon(keep_swept, self.worker, self.name, self.client, self.log, beat)
            for companion in companions:
                group.start_soon(companion)


@asynccontextmanager
async def entrypoint(name: str, settings: Settings, work_queues: Sequence[str] = ()) -> AsyncIterator[Entrypoint]:
    """What an entrypoint works with, for as long as it runs.

    Args:
        work_queues: those of its pool that it polls; all if none is named.

    Raises:
        MissingSetting: with what to set.
    """
    settings.require("prefect_api_url")
    worker = InProcessWorker(
        work_pool_name=name,
        work_queues=list(work_queues),
        name=consumer_name(name),
        heartbeat_interval_seconds=10,
    )
    with closing(EventLog.from_settings(settings)) as log:
        async with get_client() as client:
            yield Entrypoint(name, worker, client, log)
