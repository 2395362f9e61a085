"""One flow run per piece of work: created once, and again only when its run ended or died without doing it."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, Literal, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import arun_deployment
from prefect.states import Crashed
from redis.exceptions import RedisError

from blocks.event_log import Entry, EventLog, UnreadableEntry
from blocks.messages import Ingested
from blocks.settings import Settings, get_settings
from flows.worker import InProcessWorker, serve

logger = logging.getLogger(__name__)

# A run that no process works on for this long (seconds) is replaced.
LOST_SECONDS = 60.0
# How many attempts of the same work are made before a person has to look.
MAX_ATTEMPTS = 50
# How often an entry in flight is looked at (seconds), and when that of a silent dispatcher is taken over.
LOOK_AGAIN_SECONDS = 15.0
TAKE_OVER_SECONDS = 300.0


class NoProgress(Exception):
    """Run after run ended without doing its work; a person has to look."""


def consumer_name(entrypoint: str) -> str:
    """Stable across restarts, so that a restarted process finds what it held."""
    return f"{entrypoint}@{get_settings().consumer}"


class Runs:
    """Creates the flow runs of one deployment, at most one live run per piece of work."""

    def __init__(self, deployment: str, client: PrefectClient, executing: Callable[[UUID], bool]) -> None:
        self._deployment = deployment
        self._client = client
        self._executing = executing

    async def drive(
        self, key: str, name: str, parameters: dict[str, Any], tags: list[str], is_done: Callable[[], bool]
    ) -> FlowRun:
        """See to it that a live run does this work, and give it back.

        Where the last run for `key` ended without doing the work, or nobody executes it any more,
        the next attempt gets a run of its own. `is_done` is asked only after a run has ended, so
        that one which ends right now is not taken for one that left its work undone.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            run = await arun_deployment(
                self._deployment,
                client=self._client,
                parameters=parameters,
                flow_run_name=name,
                tags=tags,
                idempotency_key=f"{key}:{attempt}",
                timeout=0,
                as_subflow=False,
            )
            if await self._is_live(run) or await asyncio.to_thread(is_done):
                return run
        raise NoProgress(f"{name}: {MAX_ATTEMPTS} runs ended without doing it; look at them in the Prefect UI")

    async def _is_live(self, run: FlowRun) -> bool:
        state = run.state
        if state is None or state.is_final():
            return state is None
        if state.is_scheduled() or self._executing(run.id):
            return True
        age = (datetime.now(UTC) - state.timestamp).total_seconds()
        if age < LOST_SECONDS:
            return True
        logger.warning("Flow run %s (%s) is %s, but nobody executes it: trying again", run.name, run.id, state.name)
        message = f"no process executed it any more after {age:.0f} s"
        await self._client.set_flow_run_state(run.id, Crashed(message=message), force=True)
        return False


class UploadDispatcher:
    """Gives every ingested timestep of the stream an upload-timestep run, a bounded number at a time.

    An entry stays pending until its run acknowledged it, which the run does once the outcome is
    in the stream. So nothing is lost with this process, and `limit` bounds what is in flight.
    """

    group: Literal["upload-worker"] = "upload-worker"

    def __init__(self, log: EventLog, runs: Runs, *, limit: int = 50) -> None:
        self._log = log
        self._runs = runs
        self._limit = limit
        self._consumer = consumer_name("upload-worker")
        self._looked_at: dict[str, float] = {}
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
            except NoProgress:
                logger.exception("A timestep is not uploaded")

    async def step(self, wait_seconds: float = 1.0) -> None:
        """Start what is new and there is room for, and see to what is in flight for long."""
        now = time.monotonic()
        if now - self._took_over > TAKE_OVER_SECONDS / 2:
            self._took_over = now
            await asyncio.to_thread(
                self._log.take_over, self.group, self._consumer, idle_seconds=TAKE_OVER_SECONDS, count=self._limit
            )
        entries = await asyncio.to_thread(self._log.held, self.group, self._consumer, count=self._limit)
        self._looked_at = {entry.id: self._looked_at.get(entry.id, float("-inf")) for entry in entries}
        due = [entry for entry in entries if now - self._looked_at[entry.id] > LOOK_AGAIN_SECONDS]
        room = self._limit - len(entries)
        if due:
            wait_seconds = 0
        if room > 0:
            due += await asyncio.to_thread(
                self._log.read, self.group, self._consumer, count=room, wait_seconds=wait_seconds
            )
        else:
            await asyncio.sleep(wait_seconds)
        for entry in due:
            await self._start(entry)

    async def _start(self, entry: Entry) -> None:
        if entry.type != Ingested.type:
            await asyncio.to_thread(self._log.acknowledge, self.group, entry.id)
            return
        try:
            timestep = cast(Ingested, entry.decode().data)
        except UnreadableEntry as error:
            logger.exception("Set aside: the upload-worker can't read it")
            await asyncio.to_thread(self._log.set_aside, self.group, entry, str(error))
            return
        self._looked_at[entry.id] = time.monotonic()
        await self._runs.drive(
            key=f"{timestep.timestep_id}:{entry.id}",
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


async def upload_worker(settings: Settings) -> None:
    """The entrypoint: dispatch the stream's timesteps, and execute upload runs, until a signal.

    Raises:
        MissingSetting: with what to set.
    """
    settings.require("data_dir", "prefect_api_url")
    worker = InProcessWorker(work_pool_name="upload-worker", name=consumer_name("upload-worker"))
    with closing(EventLog.from_settings(settings)) as log:
        async with get_client() as client:
            runs = Runs("upload-timestep/upload-worker", client, worker.is_executing)
            await serve(worker, UploadDispatcher(log, runs).run)


async def state_manager(settings: Settings) -> None:
    """The entrypoint: have the stream's events recorded, and execute these runs, until a signal.

    Raises:
        MissingSetting: with what to set.
    """
    settings.require("database_url", "prefect_api_url")
    worker = InProcessWorker(work_pool_name="state-manager", name=consumer_name("state-manager"))
    with closing(EventLog.from_settings(settings)) as log:
        async with get_client() as client:
            await serve(worker, lambda: keep_recording(log, client))
