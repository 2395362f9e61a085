"""The tries of a run: which of them count, and when it is given up."""

import asyncio
import errno
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry, Failed, Pending, Running

from blocks.event_log import EventLog
from blocks.messages import Failed as GivenUp
from blocks.messages import Ingested
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from flows import again, ingest, system_watch, upload
from flows.dispatch import upload_worker
from flows.watch import event_ingester
from tests.working import drop, said, when, working

pytest_plugins = ["tests.prefect_server"]

TRIES = 3
AWAY: list[State[Any]] = [Pending(), Running(), AwaitingRetry(message="SystemAway: it does not answer (try 7)")] * (
    TRIES + 2
)
HANDED_BACK: list[State[Any]] = [
    Pending(),
    Running(),
    AwaitingRetry(message="handed back, because its worker was stopped"),
] * TRIES
COUNTED: list[State[Any]] = [Pending(), Running(), AwaitingRetry(message=f"OSError: it fails (try 1 of {TRIES})")]


def failing(*_arguments: Any, **_options: Any) -> Any:
    raise OSError(errno.EIO, "Input/output error")


@pytest.fixture(autouse=True)
def few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (again, ingest, upload):
        monkeypatch.setattr(module, "TRIES", TRIES)
    monkeypatch.setattr(again, "FIRST_PAUSE", 1000.0)
    monkeypatch.setattr(upload, "upload", failing)
    monkeypatch.setattr(ingest, "find_images", failing)
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 3600.0)


async def asked_for(deployment: str, parameters: dict[str, Any], *states: State[Any]) -> UUID:
    """A run that has been through these states, and is due to be tried again."""
    async with get_client() as client:
        found = await client.read_deployment_by_name(deployment)
        run = await client.create_flow_run_from_deployment(found.id, parameters=parameters)
        for state in (*states, AwaitingRetry()):
            await client.set_flow_run_state(run.id, state, force=True)
    return run.id


async def ended(run_id: UUID, times: int) -> FlowRun:
    """The run, after so many tries, once it waits or is given up."""
    found: list[FlowRun] = []

    async def has_tried() -> bool:
        async with get_client() as client:
            found[:] = [await client.read_flow_run(run_id)]
        return found[0].run_count == times and found[0].state_name in ("AwaitingRetry", "Failed")

    await when(has_tried, "the end of its try")
    return found[0]


def test_only_those_count_that_failed_for_the_timestep_itself_since_it_was_given_up_last(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore
) -> None:
    event = drop(run_settings)
    timestep = Ingested(timestep_id=event.timestep_id, system="prince", event_file="events/1.json", event=event)
    uploads = "upload-timestep/upload-worker", {"timestep": timestep.model_dump_json()}
    (file,) = (cast(Path, run_settings.data_dir) / "prince" / "events").iterdir()
    ingests = "ingest-timestep/event-ingester", {"system": "prince", "event_file": f"events/{file.name}"}
    spent = [*COUNTED, *AWAY, *COUNTED]

    async def test() -> None:
        for asked in (uploads, ingests):
            fresh = await asked_for(*asked, *AWAY, *HANDED_BACK)
            last = await asked_for(*asked, *spent)
            retried = await asked_for(*asked, *spent, Pending(), Running(), Failed(message="OSError: it fails"))
            async with working(upload_worker if asked is uploads else event_ingester, settings=run_settings):
                for run_id, times, state, message in (
                    (fresh, 2 * TRIES + 3, "AwaitingRetry", f"Input/output error (try 1 of {TRIES})"),
                    (last, TRIES + 5, "Failed", "Input/output error"),
                    (retried, TRIES + 6, "AwaitingRetry", f"Input/output error (try 1 of {TRIES})"),
                ):
                    run = await ended(run_id, times)
                    assert run.state is not None
                    assert (run.state.name, (run.state.message or "")[-len(message) :]) == (state, message)

    asyncio.run(test())
    assert {failed.attempt for failed in said(event_log, GivenUp)} == {TRIES + 5}
