"""One flow run per piece of work: created once, and again only when its run ended or died without doing it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import arun_deployment
from redis.exceptions import RedisError

from blocks.event_log import Entry, EventLog, UnreadableEntry
from blocks.messages import Ingested
from blocks.settings import Settings, get_settings
from flows.sweep import keep_swept
from flows.worker import InProcessWorker, serve

logger = logging.getLogger(__name__)

# Between two attempts of the same work (seconds): the first pause, doubled each time, up to the longest.
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 600.0
# How often an entry in flight is looked at (seconds), and when that of a silent dispatcher is taken over.
LOOK_AGAIN_SECONDS = 15.0
TAKE_OVER_SECONDS = 300.0
# How many entries of the stream one dispatcher holds at most, most of them waiting for their next attempt.
HELD_AT_MOST = 1000


def consumer_name(entrypoint: str) -> str:
    """Stable across restarts, so that a restarted process finds what it held."""
    return f"{entrypoint}@{get_settings().consumer}"


class Runs:
    """Creates the flow runs of one deployment, at most one live run per piece of work."""

    def __init__(self, deployment: str, client: PrefectClient, log: EventLog) -> None:
        self._deployment = deployment
        self._client = client
        self._log = log

    async def drive(
        self, work: str, name: str, parameters: dict[str, Any], tags: list[str], is_done: Callable[[], bool]
    ) -> bool:
        """See to it that a run does this work. Called again and again, until the work is done.

        Where the last run ended without doing it, the next attempt gets a run of its own, after a
        pause that grows with every attempt. What killed its process may pass, so there is no last one.

        Args:
            work: identifies the work, for ever.
            is_done: asked only after a run has ended, so that one which ends right now is not taken
                for one that left its work undone.

        Returns:
            Whether a run is under way; if not, the next attempt waits for its time.
        """
        attempt = await asyncio.to_thread(self._log.attempt, work)
        run = await self._run(work, attempt, name, parameters, tags)
        if run.state is None or not run.state.is_final():
            return True
        pause = min(FIRST_PAUSE * 2.0 ** (attempt - 1), LONGEST_PAUSE)
        too_early = (datetime.now(UTC) - run.state.timestamp).total_seconds() < pause
        if too_early or await asyncio.to_thread(is_done):
            return False
        logger.info("Attempt %d of %s, after its run ended as %s", attempt + 1, name, run.state.name)
        await asyncio.to_thread(self._log.begin_attempt, work, attempt + 1)
        run = await self._run(work, attempt + 1, name, parameters, tags)
        return run.state is None or not run.state.is_final()

    async def _run(self, work: str, attempt: int, name: str, parameters: dict[str, Any], tags: list[str]) -> FlowRun:
        """The run of an attempt, which is created only once."""
        return await arun_deployment(
            self._deployment,
            client=self._client,
            parameters=parameters,
            flow_run_name=name,
            tags=tags,
            idempotency_key=f"{work}:{attempt}",
            timeout=0,
            as_subflow=False,
        )


@dataclass
class _Look:
    """When an entry was last looked at, and whether a run was under way for it."""

    at: float = float("-inf")
    is_live: bool = True


class UploadDispatcher:
    """Gives every ingested timestep of the stream an upload-timestep run, a bounded number at a time.

    An entry stays pending until its run acknowledged it, which the run does once the outcome is
    in the stream. So nothing is lost with this process, and `limit` bounds the live runs: an entry
    that waits for its next attempt keeps no other from being uploaded.
    """

    group: Literal["upload-worker"] = "upload-worker"

    def __init__(self, log: EventLog, runs: Runs, *, limit: int = 50) -> None:
        self._log = log
        self._runs = runs
        self._limit = limit
        self._consumer = consumer_name("upload-worker")
        self._looks: dict[str, _Look] = {}
        self._took_over = float("-inf")

    async def run(self) -> None:
        """Dispatch until cancelled."""
        while True:
            try:
                await self.step()
            except (httpx.HTTPError, RedisError) as error:
                # The entries wait in the stream.
                logger.warning("Timesteps wait, because a service is away: %s: %s", type(error).__name__, error)
                await asyncio.sleep(2)

    async def step(self, wait_seconds: float = 1.0) -> None:
        """Start what is new and there is room for, and see to what is in flight for long."""
        now = time.monotonic()
        if now - self._took_over > TAKE_OVER_SECONDS / 2:
            self._took_over = now
            await asyncio.to_thread(
                self._log.take_over, self.group, self._consumer, idle_seconds=TAKE_OVER_SECONDS, count=self._limit
            )
        entries = await asyncio.to_thread(self._log.held, self.group, self._consumer, count=HELD_AT_MOST)
        self._looks = {entry.id: self._looks.get(entry.id, _Look()) for entry in entries}
        for entry in entries:
            if now - self._looks[entry.id].at > LOOK_AGAIN_SECONDS:
                await self._start(entry)
                wait_seconds = 0
        room = self._limit - sum(look.is_live for look in self._looks.values())
        if room <= 0 or len(entries) >= HELD_AT_MOST:
            await asyncio.sleep(wait_seconds)
            return
        for entry in await asyncio.to_thread(
            self._log.read, self.group, self._consumer, count=room, wait_seconds=wait_seconds
        ):
            await self._start(entry)

    async def _start(self, entry: Entry) -> None:
        if entry.type != Ingested.type:
            await asyncio.to_thread(self._log.acknowledge, self.group, entry.id)
            self._looks.pop(entry.id, None)
            return
        try:
            timestep = cast(Ingested, entry.decode().data)
        except UnreadableEntry as error:
            logger.exception("Set aside: the upload-worker can't read it")
            await asyncio.to_thread(self._log.dead_letters(self.group).add, entry, str(error))
            self._looks.pop(entry.id, None)
            return
        look = self._looks[entry.id] = _Look(at=time.monotonic())
        look.is_live = await self._runs.drive(
            work=f"{timestep.timestep_id}:{entry.id}",
            name=f"upload {timestep.title}",
            # As text: Prefect resolves `$ref` and `__prefect_kind` in parameters, wherever they stand.
            parameters={"timestep": timestep.model_dump_json(), "entry_id": entry.id},
            tags=[timestep.system, timestep.event.experiment_id],
            is_done=lambda: not self._log.is_pending(self.group, entry.id),
        )


async def keep_recording(log: EventLog, client: PrefectClient, *, linger_seconds: float = 0.3) -> None:
    """Run record-events whenever the stream has something for the state-manager, until cancelled."""
    consumer = consumer_name("state-manager")
    while True:
        await asyncio.sleep(linger_seconds)
        try:
            if not await asyncio.to_thread(log.has_work, "state-manager"):
                continue
            run = await arun_deployment(
                "record-events/state-manager",
                client=client,
                parameters={"consumer": consumer},
                timeout=120,
                poll_interval=0.3,
                as_subflow=False,
            )
        except (httpx.HTTPError, RedisError) as error:
            logger.warning("Events wait in the stream, because a service is away: %s: %s", type(error).__name__, error)
            await asyncio.sleep(2)
            continue
        if run.state is None or not run.state.is_completed():
            logger.error("Flow run %s did not record its events: %s", run.name, run.state)
            await asyncio.sleep(5)


@dataclass(frozen=True)
class Entrypoint:
    """A worker with the name of its entrypoint and work pool, and its connections."""

    name: str
    worker: InProcessWorker
    client: PrefectClient
    log: EventLog

    async def serve(self, companion: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Execute the pool's runs, and run the companion beside them, until a signal."""
        beat = get_settings().heartbeat_file
        await serve(self.worker, companion, lambda: keep_swept(self.worker, self.name, self.client, self.log, beat))


@asynccontextmanager
async def entrypoint(name: str, settings: Settings) -> AsyncIterator[Entrypoint]:
    """What an entrypoint works with, for as long as it runs.

    Raises:
        MissingSetting: with what to set.
    """
    settings.require("prefect_api_url")
    worker = InProcessWorker(work_pool_name=name, name=consumer_name(name))
    with closing(EventLog.from_settings(settings)) as log:
        async with get_client() as client:
            yield Entrypoint(name, worker, client, log)


async def upload_worker(settings: Settings) -> None:
    """The entrypoint: dispatch the stream's timesteps, and execute upload runs, until a signal."""
    settings.require("data_dir", "aws_access_key_id", "aws_secret_access_key")
    async with entrypoint("upload-worker", settings) as this:
        runs = Runs("upload-timestep/upload-worker", this.client, this.log)
        await this.serve(UploadDispatcher(this.log, runs).run)


async def state_manager(settings: Settings) -> None:
    """The entrypoint: have the stream's events recorded, and execute these runs, until a signal."""
    settings.require("database_url")
    async with entrypoint("state-manager", settings) as this:
        await this.serve(lambda: keep_recording(this.log, this.client))
