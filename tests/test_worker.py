"""Flow runs of the real deployments, executed by the in-process worker: files in; objects and stream entries out."""

import asyncio
import errno
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow_async
from prefect.states import AwaitingRetry
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import Engine

from blocks import remembered
from blocks.entry import Entry
from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.messages import Cleared, Failed, Ingested, LogEvent, Rejected, Uploaded
from blocks.object_store import ObjectStore
from blocks.settings import MissingSetting, Settings, get_settings
from flows import ingest, looks, system_watch, upload
from flows.audit import audit
from flows.dispatch import upload_worker
from flows.purge import purge_timesteps
from flows.record import record_waiting
from flows.upload import OBJECT_STORE
from flows.watch import event_ingester
from tests.images import tiff
from tests.working import (
    AT,
    PATIENCE,
    announced,
    assert_stored,
    drop,
    final_states,
    flow_runs,
    is_done,
    said,
    start_worker,
    unpacked,
    until,
    working,
)

pytest_plugins = ["tests.prefect_server"]

# What Prefect would resolve, hydrate, refuse or alter if it came across it in a run's parameters.
ODD = {
    "$ref": {"block_document_id": str(uuid4())},
    "a reference": {"$ref": "#/definitions/position"},
    "json": {"__prefect_kind": "json", "value": '{"a": 1}'},
    "jinja": {"__prefect_kind": "jinja", "template": "{{ 1 + 1 }}"},
    "variable": {"__prefect_kind": "workspace_variable", "variable_name": "secret"},
    "template": "{{ prefect.variables.secret }} {timestep} %s",
    "beyond 64 bits": 10**30,
    "a NUL": "\0",
    "deep": json.loads("[" * 60 + "]" * 60),
    "large": "é" * 60_000,
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 1.0)


def test_whatever_a_microscope_says_arrives_unchanged_in_one_run_per_stage(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore
) -> None:
    dropped = [drop(run_settings), drop(run_settings, metadata=ODD), drop(run_settings, experiment_id="a.b", **ODD)]
    other = drop(run_settings, "are{tha} %s", event_type="video")

    async def test() -> None:
        async with working(event_ingester, upload_worker, settings=run_settings):
            await until(lambda: len(said(event_log, Uploaded)) == 4 and is_done(event_log), "uploading all")
            assert await final_states() == ["Completed"] * 8
        assert {f"upload prince 20261101_004 {AT}", f"upload are{{tha}} %s 20261101_004 {AT}"} <= {
            run.name for run in await flow_runs()
        }

    asyncio.run(test())
    for event in dropped:
        assert_stored(run_settings, object_store, event)
    assert_stored(run_settings, object_store, other, "are{tha} %s")
    assert said(event_log, Failed) == []


def test_an_upload_that_failed_says_why_and_ends_well_when_it_is_retried(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore
) -> None:
    event = drop(run_settings)
    surplus = cast(Path, run_settings.data_dir) / "prince" / event.img_dir / "surplus.tif"
    surplus.touch()
    announced(event_log, event)

    async def test() -> None:
        async with working(upload_worker, settings=run_settings):
            await until(lambda: said(event_log, Failed) and is_done(event_log), "the failure")
            (failure,) = said(event_log, Failed)
            assert (failure.timestep_id, failure.stage, failure.attempt) == (event.timestep_id, "upload", 1)
            assert "announces 2 images, but 3 are in" in failure.reason
            surplus.unlink()
            async with get_client() as client:
                assert await final_states() == ["Failed"]
                await client.set_flow_run_state(failure.flow_run_id, AwaitingRetry(), force=True)  # the UI's Retry
            await until(lambda: said(event_log, Uploaded), "the upload")
            assert await final_states() == ["Completed"]

    asyncio.run(test())
    assert_stored(run_settings, object_store, event)


def test_an_entry_is_acknowledged_only_once_the_outcome_is_in_the_stream(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = drop(run_settings)
    announced(event_log, event)
    append, lost = EventLog.append, threading.Event()

    def away_once(log: EventLog, said: LogEvent) -> str:
        if said.type == Uploaded.type and not lost.is_set():
            lost.set()
            raise RedisConnectionError("Redis is away")
        return append(log, said)

    monkeypatch.setattr(EventLog, "append", away_once)

    async def test() -> None:
        async with working(upload_worker, settings=run_settings):
            await until(lost.is_set, "an upload whose outcome was lost")
            assert event_log.backlog("upload-worker").in_progress == 1
            assert said(event_log, Uploaded) == []
            await until(lambda: is_done(event_log), "another attempt")
            assert await final_states() == ["Completed"]

    asyncio.run(test())
    (uploaded,) = said(event_log, Uploaded)
    assert uploaded.timestep_id == event.timestep_id
    assert_stored(run_settings, object_store, event)


def test_uploads_run_side_by_side_up_to_the_limit_of_their_pool(
    run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [drop(run_settings, images=1) for _ in range(9)]
    for event in events:
        announced(event_log, event)
    real, lock = upload.upload, threading.Lock()
    now: Counter[str] = Counter()

    def counted(*args: Any) -> Uploaded:
        with lock:
            now["running"] += 1
            now["most"] = max(now["most"], now["running"])
        time.sleep(2)
        try:
            return real(*args)
        finally:
            with lock:
                now["running"] -= 1

    monkeypatch.setattr(upload, "upload", counted)

    async def test() -> None:
        async with working(upload_worker, settings=run_settings):
            await until(lambda: len(said(event_log, Uploaded)) == 9 and is_done(event_log), "uploading all")
            assert await final_states() == ["Completed"] * 9

    asyncio.run(test())
    assert 2 <= now["most"] <= 4  # as prefect.yaml says


@pytest.mark.long
def test_a_worker_that_is_stopped_hands_back_what_it_had_under_way(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, tmp_path: Path
) -> None:
    event = drop(run_settings, images=3, size=1_000_000)
    announced(event_log, event)
    slow = object_store.model_copy(update={"bytes_per_second": 100_000})
    asyncio.run(slow.without_keys().asave(OBJECT_STORE, overwrite=True))

    async def is_running() -> bool:
        return [run.state_name for run in await flow_runs()] == ["Running"]

    async def test() -> None:
        worker = start_worker(tmp_path / "worker.log")
        try:
            async with asyncio.timeout(PATIENCE):
                while not await is_running():
                    assert worker.poll() is None, (tmp_path / "worker.log").read_text()
                    await asyncio.sleep(0.2)
            await asyncio.sleep(1)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(15) == 0, (tmp_path / "worker.log").read_text()
        finally:
            worker.kill()
        assert said(event_log, Uploaded, Failed) == []
        assert event_log.backlog("upload-worker").in_progress == 1
        (run,) = await flow_runs()
        assert run.state is not None
        assert (run.state.name, run.state.message) == ("AwaitingRetry", "handed back, because its worker was stopped")
        await object_store.without_keys().asave(OBJECT_STORE, overwrite=True)
        assert event_log.redis.keys("*:lease:*") == []
        async with working(upload_worker, settings=run_settings):
            await until(lambda: is_done(event_log), "the upload by the next worker")

    asyncio.run(test())
    (uploaded,) = said(event_log, Uploaded)
    assert uploaded.timestep_id == event.timestep_id
    assert said(event_log, Failed) == []
    assert_stored(run_settings, object_store, event)


def test_a_timestep_that_is_not_complete_is_waited_for_without_taking_a_place(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "SHORTEST_PAUSE", 0.5)
    event = drop(run_settings, images=3)
    images = cast(Path, run_settings.data_dir) / "prince" / event.img_dir / "Img"
    (images / "1.tif").rename(images / "late")
    (images / "2.tif").write_bytes((images / "2.tif").read_bytes()[:-1])

    find_images, failures = ingest.find_images, [OSError(errno.EIO, "Input/output error")]

    async def fails_once(*args: Any, **options: Any) -> list[str]:
        if failures:
            raise failures.pop()
        return await find_images(*args, **options)

    monkeypatch.setattr(ingest, "find_images", fails_once)

    async def waiting() -> FlowRun:
        async with asyncio.timeout(PATIENCE):
            while True:
                for run in await flow_runs():
                    if run.state_name == "AwaitingImages":
                        return run
                await asyncio.sleep(0.1)

    async def test() -> None:
        async with working(event_ingester, settings=run_settings):
            run = await waiting()
            async with get_client() as client:
                states = await client.read_flow_run_states(run.id)
            assert any("Input/output error (try 1 of 60)" in (state.message or "") for state in states)
            assert run.state is not None
            assert "2 of 3 images are in" in str(run.state.message)
            assert "missing: Img/1.tif; Img/2.tif has 3037 bytes, but its header says 3038" in str(run.state.message)
            wait = event_log.waits.find(event.timestep_id)
            assert wait is not None
            assert wait.reason.startswith("waiting, as 2 of 3 images are in")
            (images / "late").rename(images / "1.tif")
            (images / "2.tif").write_bytes(tiff(os.urandom(3000)))
            await until(lambda: said(event_log, Ingested), "taking it in")
            assert await final_states() == ["Completed"]

    asyncio.run(test())
    assert said(event_log, Rejected) == []
    assert event_log.waits.find(event.timestep_id) is None


def test_what_did_not_come_in_time_is_rejected_or_accepted_as_the_systems_block_says(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "SECONDS", 0.1)
    dropped = {name: drop(run_settings, name, images=3) for name in ("nina", "ella")}
    for name, event in dropped.items():
        ImagingSystem(image_deadline_seconds=1, strictness="strict" if name == "ella" else "accept").save(
            name, overwrite=True
        )
        directory = cast(Path, run_settings.data_dir) / name / event.img_dir
        (directory / "Img" / "1.tif").write_bytes(b"")
        (directory / "3.tif").write_bytes(tiff())

    async def test() -> None:
        async with working(event_ingester, upload_worker, settings=run_settings):
            await until(lambda: said(event_log, Rejected) and said(event_log, Uploaded), "both verdicts")
            assert await final_states() == ["Completed", "Completed", "Failed"]
            await ImagingSystem(image_deadline_seconds=1, strictness="accept").asave("ella", overwrite=True)
            (failed,) = [run for run in await flow_runs() if run.state_name == "Failed"]
            async with get_client() as client:
                await client.set_flow_run_state(failed.id, AwaitingRetry(), force=True)  # the UI's Retry
            await until(lambda: said(event_log, Cleared), "taking it in after all")

    asyncio.run(test())
    (rejected,) = said(event_log, Rejected)
    (cleared,) = said(event_log, Cleared)
    assert rejected.timestep_id == cleared.timestep_id == dropped["ella"].timestep_id
    warning = f"it announces 3 images, but 4 are in {dropped['nina'].img_dir}"
    taken_in = said(event_log, Ingested)[0]
    assert taken_in.warnings[0].startswith(warning)
    assert taken_in.warnings[1:] == ["Img/1.tif is empty"]
    metadata = unpacked(object_store, dropped["nina"].key)["./metadata.json"]
    assert json.loads(metadata)["archiver:warnings"] == taken_in.warnings


def test_what_is_set_in_a_systems_block_counts_from_then_on(
    run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "SECONDS", 0.1)
    drop(run_settings, "miles")

    async def test() -> None:
        async with working(event_ingester, settings=run_settings):
            await until(lambda: len(said(event_log, Ingested)) == 1, "taking the first in")
            await ImagingSystem(priority=5, display_name="Miles, room 12").asave("miles", overwrite=True)
            await until(lambda: event_log.systems.all()[0].display_name != "miles", "taking the name up")
            drop(run_settings, "miles")
            await until(lambda: len(said(event_log, Ingested)) == 2, "taking the second in")

    asyncio.run(test())
    assert [timestep.priority for timestep in said(event_log, Ingested)] == [0, 5]
    assert [(seen.name, seen.display_name) for seen in event_log.systems.all()] == [("miles", "Miles, room 12")]


def test_a_system_that_stages_waits_for_room_and_then_is_uploaded_from_the_copy(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "LONGEST_PAUSE", 1.0)
    other = cast(Path, run_settings.staging_dir) / "bowie" / uuid4().hex
    other.mkdir(parents=True)
    (other / "image.tif").write_bytes(bytes(5000))
    monkeypatch.setenv("ARCHIVER_STAGING_BUDGET_BYTES", "10000")
    get_settings.cache_clear()
    ImagingSystem(staging="always").save("bowie", overwrite=True)
    event = drop(run_settings, "bowie")
    source = cast(Path, run_settings.data_dir) / "bowie" / event.img_dir

    async def waiting() -> None:
        async with asyncio.timeout(PATIENCE):
            while True:
                if [run.state_name for run in await flow_runs()] == ["AwaitingSpace"]:
                    return
                await asyncio.sleep(0.1)

    async def test() -> None:
        async with working(event_ingester, settings=run_settings):
            await waiting()
            assert said(event_log, Ingested) == []
            assert "staging holds 5000 of 10000 bytes" in (event_log.systems.all()[0].waits_for_room or "")
            monkeypatch.setenv("ARCHIVER_STAGING_BUDGET_BYTES", "1000000")
            get_settings.cache_clear()
            await until(lambda: said(event_log, Ingested), "taking it in")
        source.rename(source.with_name("away"))
        async with working(upload_worker, settings=run_settings):
            await until(lambda: said(event_log, Uploaded), "the upload")

    asyncio.run(test())
    source.with_name("away").rename(source)
    assert_stored(run_settings, object_store, event, "bowie")


def test_a_system_that_stages_names_the_setting_that_it_lacks(
    run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ARCHIVER_STAGING_DIR", raising=False)
    get_settings.cache_clear()
    ImagingSystem(staging="always").save("billie", overwrite=True)
    event = drop(run_settings, "billie")
    with pytest.raises(MissingSetting, match="ARCHIVER_STAGING_DIR"):
        asyncio.run(ingest.ingest_timestep("billie", f"events/{event.timestep_id.hex}.json"))


def test_an_event_file_that_is_overwritten_just_now_is_waited_for_and_not_rejected(
    run_settings: Settings, event_log: EventLog
) -> None:
    ImagingSystem(settle_seconds=2.0).save("dinah", overwrite=True)
    event = drop(run_settings, "dinah")
    path = cast(Path, run_settings.data_dir) / "dinah" / "events" / f"{event.timestep_id.hex}.json"
    content = path.read_text()

    async def ingest_once(name: str = path.name) -> str | None:
        return (await ingest.ingest_timestep("dinah", f"events/{name}", return_state=True)).name

    async def test() -> None:
        path.write_text(content[:50])
        assert await ingest_once() == "AwaitingEventFile"
        assert said(event_log, Rejected) == []
        os.utime(path, (time.time() - 3, time.time() - 3))
        assert await ingest_once() == "Failed"
        assert len(said(event_log, Rejected)) == 1
        path.write_text(content)
        assert await ingest_once() == "Completed"
        # As on a share with times in whole seconds, where this one is not over yet.
        again = drop(run_settings, "dinah")
        there = path.with_name(f"{again.timestep_id.hex}.json")
        second = int(time.time()) + 1
        os.utime(there, (second, second))
        run = asyncio.create_task(ingest_once(there.name))
        await asyncio.sleep(1.2)
        there.write_text(there.read_text().replace('"position": 7', '"position": 8'))
        os.utime(there, (second, second))
        assert await run == "Completed"
        assert said(event_log, Ingested)[-1].event.position == 8

    asyncio.run(test())


def test_the_deadline_for_images_counts_from_the_first_look_at_them(
    run_settings: Settings, event_log: EventLog
) -> None:
    ImagingSystem(image_deadline_seconds=3.0).save("etta", overwrite=True)
    event = drop(run_settings, "etta", img_count=3)
    parameters = {"system": "etta", "event_file": f"events/{event.timestep_id.hex}.json"}

    async def test() -> None:
        async with get_client() as client:
            id = (await client.create_flow_run(ingest.ingest_timestep, parameters=parameters)).id
            await asyncio.sleep(3.5)  # no place is free
            for name in ("AwaitingImages", "Failed"):
                run = await client.read_flow_run(id)
                state = await run_flow_async(ingest.ingest_timestep, run, parameters, return_type="state")
                assert cast(Any, state).name == name
                await asyncio.sleep(3.5)

    asyncio.run(test())
    assert "2 of 3 images" in said(event_log, Rejected)[0].reason


def test_what_is_read_within_the_tick_of_a_share_is_read_after_it(tmp_path: Path) -> None:
    system = ImagingSystem(name="prince", root=tmp_path)
    path = tmp_path / "prince" / "events" / "1.json"
    assert looks.tick_left(system, "events/1.json") == 0
    path.parent.mkdir(parents=True)
    path.touch()
    now = int(time.time())
    for moment, least, most in ((now, 0.5, 2.0), (now + 100, 2.0, 2.0), (now - 3, 0.0, 0.0), (now + 0.5, 0.0, 0.0)):
        os.utime(path, (moment, moment))
        assert least <= looks.tick_left(system, "events/1.json") <= most


def test_what_another_event_announces_under_the_same_id_gets_into_no_copy(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore
) -> None:
    ImagingSystem(staging="always").save("celia", overwrite=True)
    event = drop(run_settings, "celia")
    source = cast(Path, run_settings.data_dir) / "celia" / event.img_dir
    away = source.with_name("away")

    async def test() -> None:
        async with working(event_ingester, settings=run_settings):
            await until(lambda: said(event_log, Ingested), "taking it in")
            # From now on, the copy is all that there is of it.
            source.rename(away)
            drop(run_settings, "celia", timestep_id=str(event.timestep_id))
            await until(lambda: said(event_log, Rejected), "rejecting the other one")
        async with working(upload_worker, settings=run_settings):
            await until(lambda: said(event_log, Uploaded), "the upload")

    asyncio.run(test())
    assert "was announced before with other content" in said(event_log, Rejected)[0].reason
    away.rename(source)
    assert_stored(run_settings, object_store, event, "celia")


def test_the_nightly_flows_do_what_the_systems_block_says_and_find_nothing_amiss(
    run_settings: Settings, event_log: EventLog, engine: Engine
) -> None:
    ImagingSystem(source_retention_days=0, purge_needs_tape=False).save("simone", overwrite=True)
    event = drop(run_settings, "simone")
    kept = drop(run_settings, "odetta")

    async def test() -> None:
        async with working(event_ingester, upload_worker, settings=run_settings):
            await until(lambda: len(said(event_log, Uploaded)) == 2 and is_done(event_log), "uploading both")
        record_waiting(event_log, engine, "state-manager", limit=100)
        nothing = await purge_timesteps(do_it=False, return_state=True)
        assert nothing.message is not None
        assert nothing.message.startswith("would delete 3 files")
        done = await purge_timesteps(return_state=True)
        assert done.message is not None
        assert done.message.startswith("deleted 3 files")
        record_waiting(event_log, engine, "state-manager", limit=100)
        assert (await audit(return_state=True)).message == "no differences"
        event_log.dead_letters("upload-worker").add(Entry("1-0", {}), "it makes no sense")
        left = await audit(return_state=True)
        assert left.is_failed()
        assert left.message == "differences left: 1, fixed: 0; `archiver audit` lists them"

    asyncio.run(test())
    root = cast(Path, run_settings.data_dir)
    assert [path for path in (root / "simone").rglob("*") if path.is_file()] == []
    assert not (root / "simone" / event.img_dir).exists()
    assert len(list((root / "odetta" / kept.img_dir).rglob("*.tif"))) == 2
