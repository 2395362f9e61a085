"""Hosts that reach some of the systems each: whose runs go where, and what holds up what."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import WorkQueueFilter, WorkQueueFilterName
from prefect.client.schemas.objects import State, WorkQueue, WorkQueueStatus

from blocks import reach
from blocks.event_log import EventLog
from blocks.messages import LogEvent
from blocks.object_store import ObjectStore
from blocks.reach import Reach, queue_of
from blocks.settings import Settings, get_settings
from flows import dispatch, sweep
from flows.dispatch import UploadDispatcher
from flows.ingest import ingest_timestep
from flows.queues import polled_queues
from flows.runs import Runs
from flows.upload import upload_timestep
from flows.worker import InProcessWorker
from tests.dispatching import GROUP, StandIn, append, step
from tests.events import announced, ingested
from tests.working import assert_stored, drop, until, when

pytest_plugins = ["tests.prefect_server"]

POOL = "upload-worker"


def of(system: str, priority: int = 0) -> LogEvent:
    timestep = ingested(announced(), system).model_copy(update={"priority": priority})
    return LogEvent.of(timestep, "test")


def reaches_prince(system: str) -> bool:
    return system == "prince"


def test_a_host_names_the_systems_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIVER_SYSTEMS", "prince, aretha,")
    settings = Settings()
    assert settings.systems == ("prince", "aretha")
    assert [settings.reaches(system) for system in ("prince", "aretha", "miles")] == [True, True, False]
    assert polled_queues(settings) == ["default", "prince", "aretha"]
    monkeypatch.setenv("ARCHIVER_SYSTEMS", "")
    everything = Settings()
    assert everything.reaches("miles")
    assert polled_queues(everything) == []


def test_a_system_whose_name_prefect_refuses_has_a_queue_all_the_same(prefect: str, event_log: EventLog) -> None:
    append(event_log, of("50 % <prince> & co"))

    async def test() -> list[str | None]:
        async with get_client() as client:
            ours = Runs("upload-timestep/upload-worker", client, event_log)
            await step(UploadDispatcher(event_log, ours, lambda _system: False))
            return [run.work_queue_name for run in await client.read_flow_runs()]

    assert asyncio.run(test()) == ["50 _ _prince_ _ co"]


# --- what holds up what


def test_higher_priorities_come_first(event_log: EventLog) -> None:
    low, high, also_low, also_high = append(event_log, of("prince"), of("miles", 5), of("aretha"), of("miles", 5))

    async def test() -> list[str]:
        stand_in = StandIn(places=4)
        await step(UploadDispatcher(event_log, cast(Runs, stand_in)))
        return stand_in.driven

    driven = asyncio.run(test())
    assert driven[:2] == [high, also_high]
    assert sorted(driven[2:]) == [low, also_low]


def test_what_can_not_be_begun_here_waits_in_its_queue_a_few_at_a_time_and_holds_up_no_other(
    event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "HELD_AT_MOST", 10)
    elsewhere = append(event_log, *(of("aretha", 9) for _ in range(50)))
    paused = append(event_log, *(of("miles", 9) for _ in range(50)))
    reached = append(event_log, *(of("prince") for _ in range(5)))

    async def test() -> None:
        stand_in = StandIn()
        stand_in.paused = {"miles"}
        dispatcher = UploadDispatcher(event_log, cast(Runs, stand_in), lambda system: system != "aretha")
        for _ in range(3):
            await step(dispatcher)
        assert sorted(stand_in.driven) == reached
        for system in (elsewhere, paused):
            assert len([id for id in stand_in.queued if id in system]) == dispatch.AHEAD_ELSEWHERE
        # What another host has done makes room for more, and what is paused no longer is begun here.
        done = [id for id in stand_in.queued if id in elsewhere]
        event_log.acknowledge(GROUP, *done)
        for id in done:
            dispatcher._in_flight.look_at_once(id)
        stand_in.paused = set()
        await step(dispatcher)
        assert len([id for id in stand_in.queued if id in elsewhere]) == 2 * dispatch.AHEAD_ELSEWHERE
        assert {id for id in paused if id not in stand_in.queued} <= {*stand_in.driven}

    asyncio.run(test())


def test_many_runs_of_a_share_that_is_away_hold_up_no_other_system(
    event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "IN_FLIGHT_AT_MOST", 3)
    append(event_log, *(of("aretha") for _ in range(10)))

    async def test() -> None:
        stand_in = StandIn()
        dispatcher = UploadDispatcher(event_log, cast(Runs, stand_in))
        await step(dispatcher)
        assert len(stand_in.driven) == 3
        reached = append(event_log, *(of("prince") for _ in range(2)))
        await step(dispatcher)
        assert sorted(stand_in.driven[3:]) == reached

    asyncio.run(test())


def test_who_is_there_is_told_and_forgotten(event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Reach(event_log.redis, event_log.stream)
    assert told.unreached(POOL, ["prince", "aretha"]) == {"prince", "aretha"}
    told.tell(POOL, "host a", ["default", "prince"])
    told.tell("event-ingester", "host b", [])
    assert told.unreached(POOL, ["prince", "aretha"]) == {"aretha"}
    assert told.sharing(POOL, "host d", ["prince"]) == told.sharing(POOL, "host d", []) == 1
    assert told.sharing(POOL, "host d", ["aretha"]) == told.sharing(POOL, "host a", ["prince"]) == 0
    told.tell(POOL, "host c", [])
    assert told.unreached(POOL, ["prince", "aretha"]) == set()
    assert told.sharing(POOL, "host d", ["aretha"]) == 1
    monkeypatch.setattr(reach, "GONE_SECONDS", -1.0)
    assert told.unreached(POOL, ["prince", "aretha"]) == {"prince", "aretha"}


# --- with a Prefect server


@pytest.fixture
def no_queues(prefect: str) -> Iterator[None]:
    """Only the pool's own queue, before and afterwards."""

    async def clear() -> None:
        async with get_client() as client:
            for queue in await client.read_work_queues(work_pool_name=POOL):
                if queue.name != "default":
                    await client.delete_work_queue_by_id(queue.id)

    asyncio.run(clear())
    yield
    asyncio.run(clear())


async def queue_named(client: PrefectClient, name: str) -> WorkQueue:
    wanted = WorkQueueFilter(name=WorkQueueFilterName(any_=[name]))
    (queue,) = await client.read_work_queues(work_pool_name=POOL, work_queue_filter=wanted)
    return queue


@pytest.mark.usefixtures("no_queues")
def test_a_paused_or_limited_queue_is_heeded_where_runs_are_begun(
    run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.runs.KNOWN_SECONDS", 0.0)

    async def test() -> None:
        async with get_client() as client:
            ours = Runs("upload-timestep/upload-worker", client, event_log)
            assert not await ours.has_to_queue("prince")
            await client.create_work_queue("prince", work_pool_name=POOL)
            await client.create_work_queue("aretha", work_pool_name=POOL, concurrency_limit=1)
            assert not await ours.has_to_queue("prince")
            assert await ours.has_to_queue("aretha")
            await client.update_work_queue((await queue_named(client, "prince")).id, is_paused=True)
            assert await ours.has_to_queue("prince")
            assert not await ours.has_to_queue()

    asyncio.run(test())


@pytest.mark.usefixtures("no_queues")
def test_runs_that_nobody_may_take_now_are_left_no_place(
    run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "OVERDUE_SECONDS", 0.0)
    append(event_log, *(of(system) for system in ("prince", "aretha", "miles", "miles", "miles") for _ in range(2)))

    async def polled(client: PrefectClient, name: str) -> None:
        """Some worker asks for the queue's runs, and does nothing."""

        async def is_ready() -> bool:
            return (await queue_named(client, name)).status == WorkQueueStatus.READY

        await client.get_scheduled_flow_runs_for_work_pool(POOL, work_queue_names=[name])
        await when(is_ready, "that the server noticed it")

    async def test() -> None:
        async with get_client() as client:
            ours = Runs("upload-timestep/upload-worker", client, event_log)
            await step(UploadDispatcher(event_log, ours, lambda _system: False))
            assert len(await client.read_flow_runs()) == 10
            assert await sweep.count_overdue(POOL, client) == 0  # nobody polls
            await polled(client, "prince")
            assert await sweep.count_overdue(POOL, client) == 2
            await polled(client, "miles")
            assert await sweep.count_overdue(POOL, client) == 8
            await client.update_work_queue((await queue_named(client, "miles")).id, concurrency_limit=1)
            assert await sweep.count_overdue(POOL, client) == 3
            await client.update_work_queue((await queue_named(client, "miles")).id, is_paused=True)
            assert await sweep.count_overdue(POOL, client) == 2

    asyncio.run(test())


@pytest.mark.usefixtures("no_queues")
def test_a_worker_makes_the_queues_that_it_polls(run_settings: Settings, event_log: EventLog) -> None:
    async def test() -> None:
        async with get_client() as client, InProcessWorker(POOL, work_queues=["default", "prince"], name="host a"):
            assert (await queue_named(client, "prince")).name == "prince"
            told = Reach(event_log.redis, event_log.stream)
            await until(lambda: told.unreached(POOL, ["prince", "aretha"]) == {"aretha"}, "that it is told")

    asyncio.run(test())


@pytest.mark.usefixtures("no_queues")
def test_prefects_own_command_serves_the_queue_of_a_system(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, tmp_path: Path
) -> None:
    here, there = drop(run_settings, "prince"), drop(run_settings, "aretha")
    for event, system in ((here, "prince"), (there, "aretha")):
        event_log.append(LogEvent.of(ingested(event, system), "test"))

    async def test() -> None:
        async with get_client() as client:
            ours = Runs("upload-timestep/upload-worker", client, event_log)
            await step(UploadDispatcher(event_log, ours, lambda _system: False))

            async def is_done() -> bool:
                states = {run.work_queue_name: run.state_name for run in await client.read_flow_runs()}
                # The other one is left for whoever reaches that.
                assert states["prince"] in ("Scheduled", "Late")
                return states["aretha"] == "Completed"

            await when(is_done, "the upload")

    worker = start_prefect_worker("aretha", tmp_path / "log")
    try:
        asyncio.run(test())
    finally:
        worker.terminate()
        worker.wait(20)
    assert_stored(run_settings, object_store, there, "aretha")


def start_prefect_worker(system: str, log_file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "in-process"]
    env = os.environ | {"PREFECT_WORKER_QUERY_SECONDS": "0.5", "ARCHIVER_SYSTEMS": system}
    with log_file.open("wb") as log:
        return subprocess.Popen([*command, "--work-queue", queue_of(system)], env=env, stdout=log, stderr=log)


def test_a_run_that_a_host_can_not_do_is_left_to_others(
    run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVER_SYSTEMS", "prince")
    get_settings.cache_clear()

    async def test() -> list[State[Any]]:
        timestep: Any = ingested(announced(), "aretha").model_dump_json()
        return [
            await upload_timestep(timestep, return_state=True),
            await ingest_timestep("aretha", "events/1.json", return_state=True),
        ]

    for state in asyncio.run(test()):
        assert state.name == "AwaitingRetry"
        assert (state.message or "").startswith("this host does not reach aretha")
