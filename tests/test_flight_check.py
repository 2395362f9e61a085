"""The flight check on the real stack: what it finds, whom it tells, and that nothing of it is left."""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from prefect import State
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.deployments import arun_deployment
from sqlalchemy import Engine

from api.app import create_app
from blocks import synthetic_files
from blocks.event_log import EventLog
from blocks.messages import EventData, Failed, Ingested, LogEvent, Rejected, Uploaded, Withdrawn
from blocks.object_store import ObjectStore
from blocks.settings import Settings, get_settings
from blocks.synthetic_timestep import SYSTEM, announcement
from blocks.tables import Timestep
from flows import recording, system_watch
from flows.dispatch import upload_worker
from flows.flight import Flight
from flows.flight_check import TITLE, flight_check
from flows.recording import state_manager
from flows.watch import event_ingester
from tests.events import failed
from tests.receiver import receiving
from tests.test_withdrawal import left
from tests.working import PATIENCE, drop, said, until, working

pytest_plugins = ["tests.prefect_server"]

WITHOUT_UPLOADS = (event_ingester, state_manager)
ENTRYPOINTS = (*WITHOUT_UPLOADS, upload_worker)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 1.0)
    monkeypatch.setattr(recording, "RECORD_SECONDS", 0.2)


@pytest.fixture
def told(run_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What people are told, through a real block."""
    with receiving() as (url, got):
        block = CustomWebhookNotificationBlock(name="lab", url=url, json_data={"t": "{{subject}}", "text": "{{body}}"})
        asyncio.run(cast(Any, block).asave("lab", overwrite=True))
        monkeypatch.setenv("ARCHIVER_REPORT_BLOCK", "custom-webhook/lab")
        get_settings.cache_clear()
        yield got


async def check(**limits: float) -> State[Any]:
    return cast(State[Any], await flight_check(**limits, return_state=True))


def sentence(state: State[Any], name: str) -> str:
    assert state.name == name, state.message
    return str(state.message)


def metrics(client: TestClient) -> dict[str, float]:
    lines = [line.split() for line in client.get("/metrics").text.splitlines() if line.startswith("archiver_flight")]
    return {name.removeprefix("archiver_flight_check_"): float(value) for name, value in lines}


def test_a_timestep_goes_the_whole_way_and_nothing_of_it_is_left(
    run_settings: Settings, object_store: ObjectStore, engine: Engine, event_log: EventLog
) -> None:
    async def test() -> None:
        drop(run_settings)
        async with working(*ENTRYPOINTS, settings=run_settings):
            run = await arun_deployment("flight-check/event-ingester", timeout=PATIENCE, as_subflow=False)
            assert run.state is not None
            assert "3 images went the whole way" in sentence(run.state, "Completed")
            assert run.name == "flight check"
            assert run.tags == ["flight-check"]
            await until(lambda: len(said(event_log, Uploaded)) == 2, "a microscope's timestep beside it")

    asyncio.run(test())
    flown = {one.timestep_id for one in said(event_log, Withdrawn)}
    assert len(flown) == 1
    remaining = left(run_settings, object_store, engine, event_log)
    (real,) = (one for one in said(event_log, Ingested) if one.system == "prince")
    assert remaining["objects"] == [real.event.key]
    assert "files" not in remaining
    with TestClient(create_app(run_settings)) as client:
        assert client.get("/api/1/status").json()["state"]["flight_check"]["verdict"] == "good"
        assert metrics(client)["failed"] == 0
        assert metrics(client)["last_good_seconds"] > 0
        gone = client.get(f"/api/1/timesteps/{flown.pop()}")
        assert "a flight check withdrew it" in gone.json()["detail"]


@pytest.mark.long
def test_a_stage_that_does_not_answer_is_told_to_everybody_until_it_does(
    run_settings: Settings,
    object_store: ObjectStore,
    engine: Engine,
    event_log: EventLog,
    told: list[dict[str, Any]],
) -> None:
    async def test() -> None:
        async with working(*WITHOUT_UPLOADS, settings=run_settings):
            why = sentence(await check(upload_seconds=3), "Failed")
            assert why.startswith("the timestep was ingested, but not uploaded within 3 s: is an upload-worker")
            assert [one["t"] for one in told] == [TITLE]
            assert why in told[0]["text"]
            with TestClient(create_app(run_settings)) as client:
                (warning,) = client.get("/api/1/status").json()["state"]["warnings"]
                assert why in warning
                assert metrics(client) == {"failed": 1, "last_good_seconds": 0}
            sentence(await check(upload_seconds=1), "Failed")
            assert len(told) == 1  # it is no news
        async with working(*ENTRYPOINTS, settings=run_settings):
            sentence(await check(), "Completed")
            # What was asked for before is not uploaded after all.
            await until(lambda: event_log.backlog("upload-worker").in_progress == 0, "giving up")
        assert told[1]["text"].startswith("It is good again: ")

    asyncio.run(test())
    assert left(run_settings, object_store, engine, event_log) == {}
    assert len(said(event_log, Uploaded)) == 1
    assert said(event_log, Failed) == []


@pytest.mark.long
def test_altered_bytes_and_a_killed_process_are_found_and_the_next_one_is_good(
    run_settings: Settings,
    object_store: ObjectStore,
    engine: Engine,
    event_log: EventLog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = Flight._recorded
    altered = ""

    async def alter(flight: Flight) -> Timestep:
        nonlocal altered
        row = await recorded(flight)
        altered = str(row.key)
        where = {"Bucket": object_store.bucket_name, "Key": altered}
        object = object_store.client.get_object(**where)  # type: ignore[arg-type]
        content = bytearray(object["Body"].read())
        content[-20_000] ^= 1
        object_store.client.put_object(**where, Body=bytes(content), Metadata=object["Metadata"])  # type: ignore[arg-type]
        return row

    async def test() -> None:
        async with working(*ENTRYPOINTS, settings=run_settings):
            with monkeypatch.context() as patch:
                patch.setattr(Flight, "_recorded", alter)
                why = sentence(await check(), "Failed")
            assert why.startswith(f"{altered} is not what was sent")
            # Cancelled in the UI, or its process was stopped.
            task = asyncio.create_task(check())
            await until(lambda: len(said(event_log, Uploaded)) == 2, "an upload")
            task.cancel()
            await asyncio.wait([task])
            assert "files" in left(run_settings, object_store, engine, event_log)
            sentence(await check(), "Completed")

    asyncio.run(test())
    assert left(run_settings, object_store, engine, event_log) == {"objects": [altered]}


@pytest.mark.parametrize(
    ("code", "name", "what"),
    [(errno.EROFS, "NotPossible", "or pause the schedule of this deployment"), (errno.ENOSPC, "Failed", "not full?")],
)
def test_where_nothing_can_be_written(
    run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch, code: int, name: str, what: str
) -> None:
    def refuse(home: Path, timestep_id: object) -> None:
        raise OSError(code, "No", str(home))

    monkeypatch.setattr(synthetic_files, "drop", refuse)
    assert sentence(asyncio.run(check()), name).endswith(what)
    last = event_log.flights.last()
    assert last is not None
    assert (last.warning() is None) == (name == "NotPossible")


def test_what_is_rejected_or_given_up_is_told_at_once(
    run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic_files, "drop", lambda home, timestep_id: None)
    ingested = Flight._ingested

    def after(said: Callable[[UUID], EventData], step: Callable[[Flight], Awaitable[None]]) -> None:
        async def say_and_go_on(flight: Flight) -> None:
            event_log.append(LogEvent.of(said(flight._timestep_id), "test"))
            await step(flight)

        monkeypatch.setattr(Flight, "_ingested", say_and_go_on)

    async def is_ingested(flight: Flight) -> None:
        """As if it were."""

    after(unreadable, ingested)
    assert sentence(asyncio.run(check()), "Failed") == "the timestep was not taken in: we may not read it"
    after(given_up, is_ingested)
    assert sentence(asyncio.run(check()), "Failed").endswith("its upload was given up: KeyTaken")


def unreadable(timestep_id: UUID) -> Rejected:
    return Rejected(
        timestep_id=None,
        system=SYSTEM,
        event_file=synthetic_files.event_file(timestep_id),
        reason="we may not read it",
        fingerprint="",
    )


def given_up(timestep_id: UUID) -> Failed:
    return failed(announcement(timestep_id), "KeyTaken", system=SYSTEM)
