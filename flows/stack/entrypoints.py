"""The entrypoints as services: the same commands an operator would start by hand."""

import asyncio
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks.settings import Settings
from flows.stack.embedded import answers
from flows.stack.service import PROBE_INTERVAL, Service

ARCHIVER = (sys.executable, "-m", "flows.cli")
WORKERS = ("event-ingester", "upload-worker", "state-manager")  # each serves the work pool of its name
INIT_TIMEOUT = 180.0
READY_TIMEOUT = 120.0
QUESTIONS = 15  # that one client asks for a heartbeat
STOP_TIMEOUT = 12.0  # a worker hands back what it holds within ten


class _Heartbeat:
    """A worker is ready when Prefect has heard of it after it was started."""

    def __init__(self, work_pool: str, prefect_api_url: str) -> None:
        self._work_pool = work_pool
        self._prefect_api_url = prefect_api_url
        self._before: datetime | None = None

    async def prepare(self) -> None:
        """Remember the last heartbeat of the worker's former process."""
        # Prefect itself may be away just now; the worker then waits for it.
        with suppress(httpx.HTTPError):
            async with self._client() as client:
                self._before = await self._last(client)

    async def ready(self) -> None:
        """Raise if there is no later one within a few seconds."""
        # To make a client takes more processor time than to ask many times.
        async with self._client() as client:
            for _ in range(QUESTIONS):
                if await self._last(client) != self._before:
                    return
                await asyncio.sleep(PROBE_INTERVAL)
        raise TimeoutError(f"no heartbeat of a worker of the work pool {self._work_pool}")

    def _client(self) -> PrefectClient:
        with temporary_settings({PREFECT_API_URL: self._prefect_api_url}):
            return get_client()

    async def _last(self, client: PrefectClient) -> datetime | None:
        workers = await client.read_workers_for_work_pool(self._work_pool)
        return max((worker.last_heartbeat_time for worker in workers if worker.last_heartbeat_time), default=None)


def init(env: Mapping[str, str]) -> Service:
    """`archiver init`, which ends when all that the entrypoints expect is there."""
    return Service(name="init", argv=[*ARCHIVER, "init"], env=env, ready_timeout=INIT_TIMEOUT)


def entrypoints(settings: Settings, env: Mapping[str, str]) -> dict[str, Service]:
    """The services of all entrypoints by name; the settings must have nothing missing."""
    services = {
        "api": Service(
            name="api",
            argv=[*ARCHIVER, "api"],
            env=env,
            ready=answers(f"{settings.local_api_url}/health"),
            ready_timeout=READY_TIMEOUT,
            stop_timeout=STOP_TIMEOUT,
        )
    }
    for name in WORKERS:
        heartbeat = _Heartbeat(name, str(settings.prefect_api_url))
        services[name] = Service(
            name=name,
            argv=[*ARCHIVER, name],
            env=env,
            prepare=heartbeat.prepare,
            ready=heartbeat.ready,
            ready_timeout=READY_TIMEOUT,
            stop_timeout=STOP_TIMEOUT,
        )
    return services
