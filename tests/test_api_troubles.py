"""What is wrong with a timestep now, told with its history: tries that failed, objects that changed, rejections."""

import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine

from api.app import create_app
from blocks.bundle import Bundle
from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.waits import Wait
from tests.events import NOON, announced, archived, ingested, rejected, uploaded
from tests.gateway import problem, record
from tests.images import tiff

RETRY = Wait(stage="upload", reason="SystemAway: the share is away (try 3)", until=NOON + timedelta(days=3000))
SENTENCE = f"upload tries again at {RETRY.until:%Y-%m-%d %H:%M:%S} UTC: SystemAway: the share is away (try 3)"


@pytest.fixture
def stored(tmp_path: Path, object_store: ObjectStore, engine: Engine, event_log: EventLog) -> ImagingEvent:
    """A timestep whose object is what was recorded."""
    event = announced(img_count=1)
    (tmp_path / "source" / "Img").mkdir(parents=True)
    (tmp_path / "source" / "Img" / "a.tif").write_bytes(tiff())
    proven = object_store.upload(Bundle.of(tmp_path / "source", b"{}"), event.key, event.timestep_id)
    facts = {name: getattr(proven, name) for name in ("size", "etag", "sha256", "layout_digest", "images")}
    record(engine, event_log, ingested(event), uploaded(event, bucket=object_store.bucket_name, **facts))
    return event


def problems(client: TestClient, event: ImagingEvent) -> Any:
    return client.get(f"/api/1/timesteps/{event.timestep_id}").json()["problems"]


def test_a_try_that_failed_is_told_until_it_is_over(
    client: TestClient, event_log: EventLog, stored: ImagingEvent
) -> None:
    assert problems(client, stored) == []
    event_log.waits.tell(stored.timestep_id, RETRY)
    assert problems(client, stored) == [SENTENCE]
    assert SENTENCE in client.get(f"/timesteps/{stored.timestep_id}").text
    event_log.waits.end(stored.timestep_id)
    assert problems(client, stored) == []


def test_the_runs_of_a_timestep_are_those_that_took_it_in_sent_it_or_try_again(
    client: TestClient, engine: Engine, event_log: EventLog
) -> None:
    event, taking, trying = announced(), uuid4(), uuid4()
    record(engine, event_log, ingested(event).model_copy(update={"flow_run_id": taking}))
    event_log.waits.tell(event.timestep_id, RETRY.model_copy(update={"flow_run_id": trying}))
    runs = client.get(f"/api/1/timesteps/{event.timestep_id}").json()["flow_runs"]
    assert {run["flow_run_id"]: run["said"] for run in runs} == {str(taking): ["timestep.ingested"], str(trying): []}
    assert str(trying) in client.get(f"/timesteps/{event.timestep_id}").text
    event_log.waits.tell(event.timestep_id, RETRY.model_copy(update={"flow_run_id": taking}))
    runs = client.get(f"/api/1/timesteps/{event.timestep_id}").json()["flow_runs"]
    assert [run["flow_run_id"] for run in runs] == [str(taking)]


def test_a_wait_that_nobody_says_again_is_forgotten(event_log: EventLog) -> None:
    event_log.waits.tell(timestep_id := uuid4(), RETRY.model_copy(update={"until": NOON - timedelta(days=3000)}))
    (key,) = event_log.redis.keys(f"*{timestep_id}")
    assert 0 < int(event_log.redis.ttl(key)) <= 600


def test_an_object_that_changed_or_is_gone_is_told(
    client: TestClient, engine: Engine, event_log: EventLog, object_store: ObjectStore, stored: ImagingEvent
) -> None:
    place = {"Bucket": object_store.bucket_name, "Key": stored.key}
    object_store.client.put_object(**place, Body=b"another")  # type: ignore[arg-type]
    (changed,) = problems(client, stored)
    assert changed.startswith(f"its object {stored.key} is not what was uploaded: size is 7, was ")
    assert "ETag is" in changed
    object_store.client.delete_object(**place)  # type: ignore[arg-type]
    gone = f"its object {stored.key} is gone from the bucket {object_store.bucket_name}"
    assert problems(client, stored) == [gone]
    assert gone in client.get(f"/timesteps/{stored.timestep_id}").text
    record(engine, event_log, archived(stored.key))
    assert problems(client, stored) == [f"{gone}; it is on tape"]


def test_another_event_file_with_its_id_is_told(
    client: TestClient, engine: Engine, event_log: EventLog, stored: ImagingEvent
) -> None:
    record(engine, event_log, rejected("events/2.json", "it was announced before with other content", event=stored))
    assert problems(client, stored) == ["it was announced before with other content"]


def test_what_keeps_a_timestep_from_being_taken_in_is_told(
    client: TestClient, engine: Engine, event_log: EventLog
) -> None:
    event = announced()
    path = f"/api/1/timesteps/{event.timestep_id}"
    assert problem(client.get(path), 404) == f"There is no timestep {event.timestep_id}."
    waiting = Wait(stage="ingest", reason="waiting, as 7 of 10 images are in t-1", until=RETRY.until)
    event_log.waits.tell(event.timestep_id, waiting)
    assert problem(client.get(path), 404).endswith("waiting, as 7 of 10 images are in t-1.")
    event_log.waits.end(event.timestep_id)
    record(engine, event_log, rejected(reason="prince/events/1.json was rejected: 7 of 10 images", event=event))
    assert problem(client.get(path), 404).endswith("prince/events/1.json was rejected: 7 of 10 images.")


def test_what_can_not_be_asked_is_said_in_time(settings: Settings, stored: ImagingEvent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never says a word
        redis_url = SecretStr(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        away = {"redis_url": redis_url, "aws_endpoint_url": "http://127.0.0.1:1"}
        with TestClient(create_app(settings.model_copy(update=away)), raise_server_exceptions=False) as client:
            begin = time.monotonic()
            assert problems(client, stored) == [
                "what it waits for can't be told: the stream can't be reached",
                "its object can't be looked at: object storage can't be reached",
            ]
            assert time.monotonic() - begin < 4
