"""The moment in which a worker takes a run: what others are told of it, and what becomes of it when the worker ends."""

import asyncio
from typing import Any, cast

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Running

from blocks.event_log import EventLog
from blocks.settings import Settings
from flows.ingest import ingest_timestep
from flows.worker import InProcessWorker

pytest_plugins = ["tests.prefect_server"]

POOL = "event-ingester"


async def made(worker: InProcessWorker, **options: Any) -> FlowRun:
    """A run of the pool."""
    deployment = await worker.client.read_deployment_by_name(f"ingest-timestep/{POOL}")
    parameters = {"system": "prince", "event_file": "events/1.json"}
    return await worker.client.create_flow_run_from_deployment(deployment.id, parameters=parameters, **options)


def test_others_are_told_of_a_run_from_a_queue_before_anything_is_asked_about_it(
    run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[bool] = []

    async def load(run: FlowRun) -> None:
        beats.append(event_log.flow_runs.is_beating(run.id))
        raise ValueError("enough")

    async def test() -> None:
        async with InProcessWorker(work_pool_name=POOL) as worker:
            monkeypatch.setattr(worker, "_load", load)
            with pytest.raises(ValueError, match="enough"):
                await worker.run(await made(worker), cast(Any, None))

    asyncio.run(test())
    assert beats == [True]


def test_a_run_whose_worker_is_stopped_before_its_first_step_is_handed_back(run_settings: Settings) -> None:
    async def test() -> None:
        async with InProcessWorker(work_pool_name=POOL) as worker:
            claim = await worker.claim()
            assert claim is not None
            run = await made(worker, state=Running())
            before = worker.free
            task = worker.begin(run, ingest_timestep, claim)
            task.cancel()  # as when the worker is stopped
            async with asyncio.timeout(20):
                await asyncio.wait([task])
                await worker._executions.wait_for_all()
            state = (await worker.client.read_flow_run(run.id)).state
            assert state is not None
            assert (state.name, state.message) == ("AwaitingRetry", "handed back, because its worker was stopped")
            assert worker.free == before

    asyncio.run(test())
