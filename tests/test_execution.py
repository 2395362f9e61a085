"""What an operator does to a run, and what happens to its process, on a real Prefect server."""

import asyncio
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import arun_deployment
from prefect.states import AwaitingRetry, Cancelling, Late
from prefect.workers.process import ProcessWorker

from blocks.event_log import EventLog
from blocks.messages import Failed, Uploaded
from blocks.object_store import ObjectStore
from blocks.places import HOLD_SECONDS, Places
from blocks.reach import Reach
from blocks.settings import Settings
from flows import dispatch, executions, sweep
from flows.dispatch import upload_worker
from flows.entrypoint import entrypoint
from flows.upload import OBJECT_STORE
from tests.working import (
    PATIENCE,
    announced,
    assert_stored,
    drop,
    final_states,
    flow_runs,
    is_done,
    said,
    start_worker,
    until,
    when,
    working,
)

pytest_plugins = ["tests.prefect_server"]
pytestmark = pytest.mark.long

SLOW = 100_000  # bytes per second


@pytest.fixture
def slow_uploads(run_settings: Settings, object_store: ObjectStore) -> None:
    """Uploads that take long enough for something to happen meanwhile."""
    slow = object_store.without_keys().model_copy(update={"bytes_per_second": SLOW})
    slow.save(OBJECT_STORE, overwrite=True)


async def fast_again(store: ObjectStore) -> None:
    await store.without_keys().asave(OBJECT_STORE, overwrite=True)


async def the_run(*names: str) -> FlowRun | None:
    """The only flow run, as soon as its state has one of these names."""
    runs = await flow_runs()
    return runs[0] if len(runs) == 1 and runs[0].state_name in names else None


async def wait_for_run(*names: str) -> FlowRun:
    async with asyncio.timeout(PATIENCE):
        while True:
            if run := await the_run(*names):
                return run
            await asyncio.sleep(0.2)


def test_cancelling_a_run_ends_its_upload_and_retrying_it_ends_well(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, slow_uploads: None
) -> None:
    event = drop(run_settings, images=3, size=1_000_000)
    announced(event_log, event)

    async def test() -> None:
        async with working(upload_worker, settings=run_settings), get_client() as client:
            run = await wait_for_run("Running")
            await until(lambda: event_log.redis.keys("*:lease:*"), "the upload")
            await client.set_flow_run_state(run.id, Cancelling())  # the UI's Cancel
            cancelled = await wait_for_run("Cancelled")
            assert cancelled.state is not None
            assert cancelled.state.message == "Flow run was cancelled."
            await until(lambda: said(event_log, Failed) and is_done(event_log), "giving up")
            assert "cancelled" in said(event_log, Failed)[0].reason
            assert said(event_log, Uploaded) == []
            # The thread that uploads has ended too: nobody holds the lease, nobody a place.
            await until(lambda: not event_log.redis.keys("*:lease:*"), "the end of the upload")
            await until(lambda: Places(event_log.redis, "upload-worker").taken() == 0, "a free place")
            await fast_again(object_store)
            await client.set_flow_run_state(run.id, AwaitingRetry(), force=True)  # the UI's Retry
            await until(lambda: said(event_log, Uploaded), "the upload")
            assert (await wait_for_run("Completed")).id == run.id

    asyncio.run(test())
    assert_stored(run_settings, object_store, event)


def test_a_run_that_fails_for_something_that_passes_waits_without_a_place(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore
) -> None:
    event = drop(run_settings)
    image = cast(Path, run_settings.data_dir) / "prince" / event.img_dir / "Img" / "1.tif"
    away = image.rename(image.with_suffix(".away"))
    announced(event_log, event)

    async def test() -> None:
        async with working(upload_worker, settings=run_settings):
            run = await wait_for_run("AwaitingRetry")
            state = cast(State[None], run.state)
            assert state.message is not None
            assert state.message.startswith("ImagesMissing: 1 of 2 images")
            assert re.search(r"\(try \d of 60\)$", state.message)
            await until(lambda: Places(event_log.redis, "upload-worker").taken() == 0, "a free place")
            assert said(event_log, Failed) == []
            wait = event_log.waits.find(event.timestep_id)
            assert wait is not None
            assert (wait.stage, wait.reason[:28]) == ("upload", "ImagesMissing: 1 of 2 images")
            away.rename(image)
            await until(lambda: said(event_log, Uploaded), "the upload")
            await until(lambda: event_log.waits.find(event.timestep_id) is None, "the end of its wait")
            ended = await wait_for_run("Completed")
            assert ended.id == run.id
            assert ended.run_count >= 2
            async with get_client() as client:
                shown = [str(artifact.data) for artifact in await client.read_artifacts()]
            assert [table for table in shown if f"/timesteps/{event.timestep_id})" in table and event.key in table]

    asyncio.run(test())
    assert_stored(run_settings, object_store, event)


def test_a_run_of_a_killed_worker_is_found_and_its_work_done_by_another(
    run_settings: Settings,
    event_log: EventLog,
    object_store: ObjectStore,
    slow_uploads: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, name, seconds in (
        (sweep, "LOST_SECONDS", 2.0),
        (sweep, "BEAT_SECONDS", 0.5),
        (dispatch, "TAKE_OVER_SECONDS", 1.0),
    ):
        monkeypatch.setattr(module, name, seconds)
    event = drop(run_settings, images=3, size=1_000_000)
    announced(event_log, event)

    async def test() -> None:
        killed = start_worker(tmp_path / "worker.log", consumer="a host that dies")
        try:
            run = await wait_for_run("Running")
            await until(lambda: event_log.redis.keys("*:lease:*"), "the upload")
        finally:
            killed.kill()
            killed.wait()
        await fast_again(object_store)
        # As their time does.
        event_log.redis.delete(*event_log.redis.keys("*:lease:*"), f"{event_log.stream}:executing:{run.id}")
        event_log.redis.delete("places:upload-worker")
        async with working(upload_worker, settings=run_settings):
            await until(lambda: said(event_log, Uploaded) and is_done(event_log), "the upload by another worker")
            assert await final_states() == ["Completed", "Crashed"]

    asyncio.run(test())
    assert len(said(event_log, Uploaded)) == 1
    assert_stored(run_settings, object_store, event)


def test_runs_that_wait_since_long_are_executed_though_there_is_a_backlog(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "BEAT_SECONDS", 0.5)
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    late, awaiting, *backlog = [drop(run_settings) for _ in range(12)]
    # Nobody works on these two any more: their entries are acknowledged, as after a retry by hand.
    ids = [announced(event_log, event) for event in (late, awaiting)]
    event_log.read("upload-worker", "somebody", count=2, wait_seconds=0.01)
    event_log.acknowledge("upload-worker", *ids)
    for event in backlog:
        announced(event_log, event)

    async def test() -> None:
        async with get_client() as client:
            deployment = await client.read_deployment_by_name("upload-timestep/upload-worker")
            states: list[State[None]] = [Late(scheduled_time=long_ago), AwaitingRetry(scheduled_time=long_ago)]
            for id, state in zip(ids, states, strict=True):
                parameters = {"timestep": _ingested(event_log, id), "entry_id": id}
                await client.create_flow_run_from_deployment(deployment.id, parameters=parameters, state=state)
            async with working(upload_worker, settings=run_settings):
                await until(lambda: len(said(event_log, Uploaded)) == 12 and is_done(event_log), "uploading all")
                assert await final_states() == ["Completed"] * 12

    asyncio.run(test())
    for event in (late, awaiting):
        assert_stored(run_settings, object_store, event)


def test_two_workers_share_the_places_of_their_pool_and_upload_each_timestep_once(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, tmp_path: Path
) -> None:
    events = [drop(run_settings, images=1) for _ in range(12)]
    most = 0

    async def test() -> None:
        nonlocal most
        workers = [start_worker(tmp_path / f"{name}.log", consumer=name) for name in ("one", "two")]
        try:
            async with get_client() as client:
                await when(lambda: _polling(client, 2), "both workers")
            for event in events:
                entry_id = announced(event_log, event)
                # Redis delivers an entry again when its consumer seems to be gone.
                event_log.redis.xclaim(event_log.stream, "upload-worker", "upload-worker@two", 0, [entry_id])
            while not (len(said(event_log, Uploaded)) >= 12 and is_done(event_log)):
                most = max(most, Places(event_log.redis, "upload-worker").taken())
                await asyncio.sleep(0.02)
            assert await final_states() == ["Completed"] * 12
        finally:
            for one in workers:
                one.terminate()
            for one in workers:
                one.wait(20)

    asyncio.run(asyncio.wait_for(test(), 2 * PATIENCE))
    assert 1 <= most <= 4
    assert sorted(one.timestep_id for one in said(event_log, Uploaded)) == sorted(one.timestep_id for one in events)


async def _polling(client: PrefectClient, number: int) -> bool:
    workers = await client.read_workers_for_work_pool("upload-worker")
    return sum(worker.name.endswith(("@one", "@two")) for worker in workers) == number


def test_the_flows_run_on_a_pool_of_processes_too(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, tmp_path: Path
) -> None:
    event = drop(run_settings)
    entry_id = announced(event_log, event)
    event_log.read("upload-worker", "somebody", count=1, wait_seconds=0.01)
    parameters = {"timestep": _ingested(event_log, entry_id), "entry_id": entry_id}

    async def test() -> None:
        async with get_client() as client:
            ours = await client.read_deployment_by_name("upload-timestep/upload-worker")
            template = ProcessWorker.get_default_base_job_template()
            await client.create_work_pool(WorkPoolCreate(name="isolated", type="process", base_job_template=template))
            deployment = await client.create_deployment(
                ours.flow_id, "isolated", work_pool_name="isolated", entrypoint=ours.entrypoint, pull_steps=[]
            )
            try:
                await arun_deployment(
                    "upload-timestep/isolated", client=client, parameters=parameters, timeout=0, as_subflow=False
                )
                with (tmp_path / "log").open("wb") as log:
                    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "isolated", "--run-once"]
                    ran = await asyncio.create_subprocess_exec(*command, env=os.environ, stdout=log, stderr=log)
                    assert await asyncio.wait_for(ran.wait(), PATIENCE) == 0, (tmp_path / "log").read_text()
                assert await final_states() == ["Completed"], (tmp_path / "log").read_text()
            finally:
                await client.delete_deployment(deployment)
                await client.delete_work_pool("isolated")

    asyncio.run(test())
    assert len(said(event_log, Uploaded)) == 1
    assert not event_log.is_pending("upload-worker", entry_id)
    assert_stored(run_settings, object_store, event)


def _ingested(log: EventLog, entry_id: str) -> str:
    entry = log.entry(entry_id)
    assert entry is not None
    return entry.decode().data.model_dump_json()


def test_a_place_is_held_by_one_and_given_back_or_run_out(event_log: EventLog) -> None:
    places = Places(event_log.redis, "a pool")
    one, two, three = uuid4(), uuid4(), uuid4()
    assert [places.take(holder, 2) for holder in (one, two, three, one)] == [True, True, False, True]
    places.give_back(one)
    assert places.take(three, 2)
    # Time passes, and only one says that it is still there.
    event_log.redis.zadd("places:a pool", {str(two): 0, str(three): 0})
    places.keep([three])
    assert [places.take(holder, 2) for holder in (one, two)] == [True, False]
    assert places.take(two, None)
    assert HOLD_SECONDS > 3 * executions.BEAT_SECONDS


def test_no_run_is_begun_at_once_in_a_pool_that_is_paused_or_has_overdue_runs(
    run_settings: Settings, event_log: EventLog
) -> None:
    async def test() -> None:
        async with entrypoint("upload-worker", run_settings) as this, this.worker:
            ours = this.worker
            first = await ours.claim()
            assert first is not None
            ours.overdue = 3
            assert await ours.claim() is None
            ours.overdue = 2
            second = await ours.claim()
            assert second is not None
            await ours.give_back(first)
            await ours.give_back(second)
            ours.work_pool.is_paused = True
            assert await ours.claim() is None

    asyncio.run(test())


def test_a_worker_leaves_those_who_reach_the_same_systems_their_share_of_the_places(
    run_settings: Settings, event_log: EventLog
) -> None:
    told = Reach(event_log.redis, event_log.stream)
    told.tell("upload-worker", "a host with the same share", ["default", "prince"])
    told.tell("upload-worker", "a host with another share", ["default", "aretha"])

    async def test() -> None:
        queues = ["default", "prince"]
        async with entrypoint("upload-worker", run_settings, queues) as this, this.worker, get_client() as client:
            ours = this.worker
            await until(lambda: ours.neighbours.count == 1, "that they know of each other")
            deployment = await client.read_deployment_by_name("upload-timestep/upload-worker")
            runs = [await client.create_flow_run_from_deployment(deployment.id) for _ in range(2)]
            under_way = [uuid4(), uuid4()]
            ours._executions.add(under_way[0])
            assert ours.free == 1
            assert len(await ours._get_scheduled_flow_runs()) == 1
            ours._executions.add(under_way[1])
            assert await ours.claim() is None
            assert await ours._get_scheduled_flow_runs() == []
            for run in runs:
                await client.delete_flow_run(run.id)
            for one in under_way:
                await ours._executions.remove(one, one)

    asyncio.run(test())
