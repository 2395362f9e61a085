"""The worker type as `prefect worker start` runs it: what Prefect promises of a flow holds in it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import arun_deployment
from prefect.states import Cancelling

from blocks.event_log import EventLog
from blocks.messages import Failed, Uploaded
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from flows.executions import Executions
from flows.worker import InProcessWorker
from tests import worker_flows
from tests.working import PATIENCE, announced, assert_stored, drop, final_states, flow_runs, said, until

pytest_plugins = ["tests.prefect_server"]

pytestmark = pytest.mark.long

POOL = "trial"


@contextmanager
def started(pool: str, log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker as Prefect's own command starts it, in a process of its own."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "in-process"]
    env = os.environ | {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.5"}
    with log_file.open("wb") as log:
        worker = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        yield worker
    finally:
        worker.terminate()
        try:
            worker.wait(PATIENCE)
        finally:
            worker.kill()


async def prefect_command(*arguments: str) -> str:
    """What Prefect's command line says to this."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    pipe = asyncio.subprocess.PIPE
    ran = await asyncio.create_subprocess_exec(*command, env=os.environ, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    output, _ = await asyncio.wait_for(ran.communicate(), PATIENCE)
    assert ran.returncode == 0, output.decode()
    return output.decode()


@asynccontextmanager
async def deployed(client: PrefectClient, *names: str) -> AsyncIterator[None]:
    """A pool of our type, with deployments of these flows of `worker_flows`."""
    template = InProcessWorker.get_default_base_job_template()
    await client.create_work_pool(
        WorkPoolCreate(name=POOL, type="in-process", base_job_template=template, concurrency_limit=8)
    )
    deployments = []
    try:
        for name in names:
            flow_id = await client.create_flow(getattr(worker_flows, name))
            entrypoint = f"{worker_flows.__name__}.{name}"
            deployments.append(
                await client.create_deployment(flow_id, POOL, work_pool_name=POOL, entrypoint=entrypoint, pull_steps=[])
            )
        yield
    finally:
        for deployment in deployments:
            await client.delete_deployment(deployment)
        await client.delete_work_pool(POOL)


async def run_state(client: PrefectClient, run_id: UUID, *names: str) -> State[None]:
    """The state of the run, as soon as it has one of these names."""
    async with asyncio.timeout(PATIENCE):
        while True:
            state = (await client.read_flow_run(run_id)).state
            if state is not None and state.name in names:
                return state
            await asyncio.sleep(0.2)


async def logged(client: PrefectClient, run: FlowRun, message: str) -> None:
    """Wait until the Prefect server has this message among the run's logs."""
    of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
    async with asyncio.timeout(PATIENCE):
        while True:
            if message in [log.message for log in await client.read_logs(of_run)]:
                return
            await asyncio.sleep(0.3)


def test_states_timeouts_retries_cancellation_hooks_and_logs_are_as_prefect_promises(
    run_settings: Settings, event_log: EventLog, tmp_path: Path
) -> None:
    async def start(client: PrefectClient, flow: str, deed: worker_flows.Deed) -> tuple[FlowRun, Path]:
        notes = tmp_path / f"{flow} {deed}"
        parameters = {"deed": deed, "notes": str(notes)}
        run = await arun_deployment(f"{flow}/{POOL}", client=client, parameters=parameters, timeout=0, as_subflow=False)
        return run, notes

    async def test() -> None:
        async with get_client() as client, deployed(client, "behave", "impatient", "persistent"):
            with started(POOL, tmp_path / "log") as worker:
                expected: dict[tuple[str, worker_flows.Deed], tuple[list[str], str, str]] = {
                    ("behave", "complete"): (["Running", "Completed"], "Completed", ""),
                    ("behave", "fail"): (
                        ["Running", "Failed"],
                        "Failed",
                        "Flow run encountered an exception: ValueError",
                    ),
                    ("impatient", "wait"): (["Running", "TimedOut"], "TimedOut", "Flow run exceeded timeout of 1"),
                    ("persistent", "fail at first"): (["Running", "Running", "Completed"], "Completed", ""),
                    ("behave", "exit"): (["Running", "Crashed"], "Crashed", "Execution was aborted"),
                    ("behave", "wait"): (["Running", "Cancelling"], "Cancelled", "Flow run was cancelled."),
                }
                begun = {(flow, deed): await start(client, flow, deed) for flow, deed in expected}
                run, _ = begun["behave", "wait"]
                await run_state(client, run.id, "Running")
                await client.set_flow_run_state(run.id, Cancelling())
                for which, (noted, name, message) in expected.items():
                    run, notes = begun[which]
                    state = await run_state(client, run.id, "Completed", "Failed", "TimedOut", "Crashed", "Cancelled")
                    assert state.name == name, (which, state)
                    assert (state.message or "").startswith(message), (which, state)
                    assert [word for word in notes.read_text().split() if word != "AwaitingRetry"] == noted, which
                run, _ = begun["behave", "complete"]
                await logged(client, run, "here I complete")
                # It has survived all of that, and hands back what it has under way at its end.
                assert worker.poll() is None
                run, _ = await start(client, "behave", "wait")
                await logged(client, run, "here I wait")
                worker.send_signal(signal.SIGTERM)
                worker.wait(PATIENCE)
                state = await run_state(client, run.id, "AwaitingRetry", "Crashed")
                assert (state.name, state.message) == ("AwaitingRetry", "handed back, because its worker was stopped")

    asyncio.run(test())


def test_runs_from_elsewhere_are_executed_and_retried_from_the_command_line(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, tmp_path: Path
) -> None:
    event = drop(run_settings)
    entry = event_log.entry(announced(event_log, event))
    assert entry is not None
    event_log.read("upload-worker", "somebody", count=1, wait_seconds=0.01)
    surplus = run_settings.data_dir / "prince" / event.img_dir / "surplus.tif"  # type: ignore[operator]
    surplus.touch()
    timestep = entry.decode().data.model_dump_json()

    async def test() -> None:
        with started("upload-worker", tmp_path / "log"):
            parameters = json.dumps({"timestep": timestep, "entry_id": entry.id})
            await prefect_command("deployment", "run", "upload-timestep/upload-worker", "--params", parameters)
            assert await final_states() == ["Failed"]
            surplus.unlink()
            (run,) = await flow_runs()
            await prefect_command("flow-run", "retry", str(run.id))
            await until(lambda: said(event_log, Uploaded), "the upload")
            assert await final_states() == ["Completed"]
            await until(lambda: not event_log.is_pending("upload-worker", entry.id), "acknowledging it")

    asyncio.run(test())
    assert len(said(event_log, Failed)) == 1
    assert_stored(run_settings, object_store, event)


def test_a_worker_ends_that_can_not_tell_any_more_what_it_executes(
    run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_executions: Executions) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Executions, "keep_telling", fail)

    async def test() -> None:
        async with asyncio.timeout(PATIENCE):
            await InProcessWorker(work_pool_name="upload-worker", name="without luck").start()

    with pytest.raises(RuntimeError, match="out of luck"):
        asyncio.run(test())
