"""Whatever is killed, and when: every timestep arrives once, in time, and nobody lends a hand."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import cast
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import SecretStr
from redis.exceptions import RedisError

from blocks.event_file import ImagingEvent
from blocks.event_log import GROUPS, Backlog, EventLog
from blocks.messages import Ingested, Uploaded
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from flows import sweep
from flows.stack.up import Stack, running_stack
from flows.upload import OBJECT_STORE
from tests.working import assert_stored, drop

VICTIMS = ("postgres", "redis", "prefect", "event-ingester", "upload-worker", "state-manager", "api")
# A power failure takes what Redis has not synced to its disk, where it syncs every second.
FORGETFUL = "redis, which forgets its last second"
# From the restart of one until the next is killed (seconds), at most: it may be starting still, or at work again.
PAUSE = 6.0
# From the last kill until all is well (seconds), on a busy machine too. The test says how long it took.
PATIENCE = 240.0
SYSTEMS = ("prince", "aretha")
# Another one is another storm.
SEED = int(os.environ.get("STORM_SEED", "1"))

pytestmark = [pytest.mark.anyio, pytest.mark.soak, pytest.mark.timeout(600)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def stack(nothing_given: None, s3_endpoint: str, tmp_path: Path) -> AsyncIterator[Stack]:
    """A whole system, whose object storage is somebody else's, and is slow enough to be interrupted."""
    settings = Settings(
        home=tmp_path / "home",
        bucket=f"timesteps-{uuid4().hex[:8]}",
        AWS_ENDPOINT_URL=s3_endpoint,
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY=SecretStr("test-secret"),
    )
    async with running_stack(settings) as running:
        slow = ObjectStore.from_settings(running.settings).model_copy(update={"bytes_per_second": 500_000})
        async with prefect_of(running):
            await slow.without_keys().asave(OBJECT_STORE, overwrite=True)
        yield running


@asynccontextmanager
async def prefect_of(stack: Stack) -> AsyncIterator[PrefectClient]:
    with temporary_settings({PREFECT_API_URL: stack.settings.prefect_api_url}):
        async with get_client() as client:
            yield client


class Microscope:
    """Drops timesteps until it is stopped."""

    def __init__(self, settings: Settings, random: Random) -> None:
        self._settings = settings
        self._random = random
        self.dropped: list[tuple[str, ImagingEvent]] = []

    async def run(self) -> None:
        while True:
            system = self._random.choice(SYSTEMS)
            event = await asyncio.to_thread(drop, self._settings, system, images=3, size=100_000)
            self.dropped.append((system, event))
            await asyncio.sleep(self._random.uniform(1.0, 6.0))


async def kill(stack: Stack, victim: str) -> None:
    """End a part of the stack as a crash does, and wait until its supervisor has started it again."""
    name = victim.partition(",")[0]
    pid = await pid_of(stack, name, other_than=None)
    file = stack.settings.home / "redis" / "appendonly.aof"
    remembered = file.read_bytes()
    if victim == FORGETFUL:
        await asyncio.sleep(1)
    os.kill(pid, signal.SIGKILL)
    if victim == FORGETFUL:
        while stack.supervisor.pids[name] == pid:  # noqa: ASYNC110 -- a process ends
            await asyncio.sleep(0.01)
        file.write_bytes(remembered)
    await pid_of(stack, name, other_than=pid)


async def pid_of(stack: Stack, name: str, other_than: int | None) -> int:
    async with asyncio.timeout(60):
        while (pid := stack.supervisor.pids[name]) in (None, other_than):  # noqa: ASYNC110 -- it is being started
            await asyncio.sleep(0.05)
    return pid


async def states(stack: Stack) -> dict[str, str]:
    """What the API says of every timestep; nothing while it can't say it."""
    found: dict[str, str] = {}
    cursor: str | None = None
    async with httpx.AsyncClient(base_url=stack.api_url, trust_env=False, timeout=10) as client:
        while True:
            query = {"limit": "100", **({"cursor": cursor} if cursor else {})}
            try:
                page = (await client.get("/api/1/timesteps", params=query)).raise_for_status().json()
            except httpx.HTTPError:
                return {}
            found |= {timestep["timestep_id"]: timestep["state"] for timestep in page["data"]}
            if (cursor := page["next"]) is None:
                return found


async def what_is_missing(stack: Stack, log: EventLog, dropped: list[tuple[str, ImagingEvent]]) -> str:
    """What is still to come; nothing when all is well."""
    known = await states(stack)
    behind = Counter(known.get(str(event.timestep_id), "unknown") for _, event in dropped)
    del behind["uploaded"]
    if behind:
        return f"timesteps that are not uploaded: {dict(behind)}"
    if waiting := {group: backlog for group in GROUPS if (backlog := log.backlog(group)) != Backlog(0, 0, 0)}:
        return f"entries of the stream: {waiting}"
    async with prefect_of(stack) as client:
        for pool in ("event-ingester", "upload-worker", "state-manager"):
            for run in await sweep.under_way(pool, client):
                if not log.flow_runs.is_beating(run.id):
                    return f"nobody executes {run.name}, which is {run.state_name}"
            if overdue := await sweep.count_overdue(pool, client):
                return f"{overdue} runs of {pool} wait to be taken"
    return ""


def ids_in_stream(log: EventLog) -> Counter[tuple[str, str]]:
    """How often the stream says what of which timestep, whatever else is the same."""
    entries = cast(list[tuple[str, dict[str, str]]], log.redis.xrange(log.stream))
    return Counter((fields["type"], fields["timestep_id"]) for _, fields in entries)


async def test_every_timestep_arrives_once_whatever_is_killed_at_whatever_moment(stack: Stack) -> None:
    random = Random(SEED)
    log = EventLog.from_settings(stack.settings)
    microscope = Microscope(stack.settings, random)
    dropping = asyncio.create_task(microscope.run())
    killed: list[str] = []
    for victim in random.sample([*VICTIMS, FORGETFUL], len(VICTIMS) + 1):
        await asyncio.sleep(random.uniform(0, PAUSE))
        await kill(stack, victim)
        killed.append(victim)
    last = time.monotonic()
    dropping.cancel()
    with suppress(asyncio.CancelledError):
        await dropping

    missing, waited = "everything", 0.0
    while missing:
        await asyncio.sleep(1)
        with suppress(httpx.HTTPError, RedisError):  # what was killed last is not there yet
            missing = await what_is_missing(stack, log, microscope.dropped)
        waited = time.monotonic() - last
        assert waited < PATIENCE, f"{missing}, {waited:.0f} s after the last of {killed} (seed {SEED})"
    print(f"seed {SEED}: all of {len(microscope.dropped)} timesteps were there {waited:.0f} s after the last kill")

    ids = {str(event.timestep_id) for _, event in microscope.dropped}
    assert ids_in_stream(log) == Counter((type, id) for type in (Ingested.type, Uploaded.type) for id in ids)
    store = ObjectStore.from_settings(stack.settings)
    objects = store.client.list_objects_v2(Bucket=store.bucket_name)["Contents"]
    assert sorted(one["Key"] for one in objects) == sorted(event.key for _, event in microscope.dropped)
    for system, event in microscope.dropped:
        assert_stored(stack.settings, store, event, system)
