"""How the whole system does: the status, and the metrics that are made of it."""

import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import Engine
from sqlmodel import Session, col, update

from api.app import create_app
from blocks.event_log import EventLog
from blocks.messages import LogEvent
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.system_seen import Disk, SystemSeen
from blocks.tables import Timestep
from flows.report import report
from tests.events import announced, archived, failed, ingested, rejected, uploaded
from tests.gateway import problem, record

TOKEN = "read-only-token-of-the-tests"


def read_metrics(client: TestClient) -> dict[str, float]:
    """The value of every sample, by its name and the value of its label."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.fixture
def busy(engine: Engine, event_log: EventLog, client: TestClient) -> TestClient:
    """A system in which something of everything has happened."""
    late, arrived, broken, waiting, done = (announced() for _ in range(5))
    record(
        engine,
        event_log,
        *(ingested(event) for event in (late, arrived, broken, waiting, done)),
        *(uploaded(event, size=1000) for event in (late, arrived, done)),
        failed(broken),
        archived(done.key),
        rejected(),
    )
    now = datetime.now(UTC)
    with Session(engine) as session, session.begin():
        for event, hours in ((late, 50), (arrived, 0.5)):
            at = now - timedelta(hours=hours)
            session.execute(update(Timestep).where(col(Timestep.id) == event.timestep_id).values(uploaded_at=at))
    event_log.append(LogEvent.of(ingested(announced()), "test"))
    (*_, last) = event_log.read("upload-worker", "test", count=100, wait_seconds=0.1)
    event_log.dead_letters("upload-worker").add(last, "it makes no sense")
    return client


def test_who_else_reads_the_stream_is_told(busy: TestClient, event_log: EventLog) -> None:
    before = read_metrics(busy)
    event_log.redis.xgroup_create(event_log.stream, "somebody-else", id="0")
    entries = event_log.redis.xlen(event_log.stream)
    after = read_metrics(busy)
    assert after["archiver_group_waiting somebody-else"] == entries
    assert after["archiver_group_oldest_waiting_seconds somebody-else"] >= 0
    assert {name: after[name] for name in before if "group_waiting" in name} == {
        name: value for name, value in before.items() if "group_waiting" in name
    }
    groups = busy.get("/api/1/status").json()["groups"]
    assert [group["group"] for group in groups] == ["upload-worker", "state-manager", "somebody-else"]
    assert "entries for somebody-else" in busy.get("/").text


def test_the_status_tells_what_needs_a_hand(busy: TestClient) -> None:
    status = busy.get("/api/1/status").json()
    assert status["problems"] == []
    state = status["state"]
    assert state["timesteps"] == {"ingested": 1, "uploaded": 2, "archived": 1, "failed": 1}
    assert (state["bytes"], state["rejected"], state["at_risk"]) == (3000, 1, 1)
    assert state["events"]["timestep.ingested"] == 5
    assert state["oldest_not_on_tape_seconds"] == pytest.approx(50 * 3600, abs=60)
    # Nothing was uploaded since the one that waits came, so there is no pace.
    assert (state["uploaded_last_hour"], state["done_in_seconds"]) == (1, None)
    uploading, recording = status["groups"]
    assert (uploading["group"], uploading["waiting"], uploading["dead_letters"]) == ("upload-worker", 0, 1)
    assert uploading["newest_dead_letters"][0]["reason"] == "it makes no sense"
    assert (recording["group"], recording["waiting"], recording["in_progress"]) == ("state-manager", 1, 0)
    assert 0 <= recording["oldest_waiting_seconds"] < 60


def test_metrics_tell_the_same(busy: TestClient) -> None:
    figures = read_metrics(busy)
    assert (
        figures.items()
        >= {
            "archiver_reachable database": 1,
            "archiver_reachable stream": 1,
            "archiver_timesteps failed": 1,
            "archiver_timesteps uploaded": 2,
            "archiver_events_total timestep.uploaded": 3,
            "archiver_stored_bytes": 3000,
            "archiver_rejected_event_files": 1,
            "archiver_at_risk_timesteps": 1,
            "archiver_group_waiting state-manager": 1,
            "archiver_group_dead_letters upload-worker": 1,
        }.items()
    )
    assert 0 < figures["archiver_group_oldest_waiting_seconds state-manager"] < 60


def test_a_redis_that_fills_is_told_before_it_refuses(client: TestClient, event_log: EventLog) -> None:
    limit = int(event_log.memory.used / 0.9)
    event_log.redis.config_set("maxmemory", limit)
    try:
        figures = read_metrics(client)
        status = client.get("/api/1/status").json()
    finally:
        event_log.redis.config_set("maxmemory", 0)
    assert figures["archiver_redis_limit_bytes"] == status["redis"]["limit_bytes"] == limit
    assert 0.8 < figures["archiver_redis_used_bytes"] / limit < 1
    (warning,) = status["state"]["warnings"]
    assert re.fullmatch(r"Redis is \d\d% full: shorten ARCHIVER_STREAM_DAYS, or raise its maxmemory", warning)


def test_a_system_that_fell_silent_is_told(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    hours = [announced(timestamp=datetime.now(UTC) - timedelta(hours=number)) for number in range(5, 12)]
    record(engine, event_log, *map(ingested, hours))
    (silent,) = client.get("/api/1/status").json()["state"]["silent_systems"]
    assert (silent["system"], silent["cadence_seconds"]) == ("prince", pytest.approx(3600, abs=1))
    figures = read_metrics(client)
    assert figures["archiver_system_last_timestep_seconds prince"] == pytest.approx(hours[0].timestamp.timestamp())


def test_a_disk_that_fills_is_told_with_its_figures(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    event = announced()
    record(engine, event_log, ingested(event), uploaded(event, size=24_000))
    disk = Disk(device="host:1", directory="/data/prince", free=10_000, total=100_000)
    seen = SystemSeen(name="prince", display_name="Prince <12>", at=datetime.now(UTC), source=disk, staging=None)
    event_log.systems.tell(seen)
    state = client.get("/api/1/status").json()["state"]
    (told,) = state["disks"]
    assert told["hours_left"] == pytest.approx(10)
    assert told["is_filling"]
    (warning,) = state["warnings"]
    assert warning.startswith("/data/prince will be full in 10 hours")
    assert client.get("/api/1/at-risk").json()["warnings"] == [warning]
    figures = read_metrics(client)
    assert figures["archiver_filling_disks"] == 1
    assert figures["archiver_disk_free_bytes /data/prince"] == 10_000
    assert figures["archiver_disk_hours_left /data/prince"] == pytest.approx(10)
    page = client.get("/").text
    assert warning in page
    assert "<td>Prince &lt;12&gt;</td>" in page
    assert "Prince &lt;12&gt;" in client.get(f"/timesteps/{event.timestep_id}").text


def test_what_the_last_audits_left_is_told(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    event_log.audits.tell({"object gone before it was archived": 2, "events set aside": 1})
    event_log.audits.tell({"disk that can't be read": 1}, "aretha")
    event_log.audits.tell({}, "prince")
    here, there = client.get("/api/1/status").json()["state"]["warnings"]
    assert here.startswith("the audit at ")
    assert here.endswith("`archiver audit` lists: events set aside: 1, object gone before it was archived: 2")
    assert there.startswith("the audit of aretha at ")
    assert read_metrics(client)["archiver_audit_differences"] == 4
    assert f"- {here}" in report(engine, datetime.now(UTC), audits=event_log.audits.last()).splitlines()


def test_objects_that_expire_without_a_tape_copy_are_told(
    settings: Settings, engine: Engine, event_log: EventLog, object_store: ObjectStore
) -> None:
    event = announced()
    record(engine, event_log, uploaded(event))
    object_store.client.put_bucket_lifecycle_configuration(
        Bucket=object_store.bucket_name,
        LifecycleConfiguration={
            "Rules": [{"ID": "all", "Status": "Enabled", "Filter": {"Prefix": "images/"}, "Expiration": {"Days": 2}}]
        },
    )
    with TestClient(create_app(settings)) as client:
        assert read_metrics(client)["archiver_expiring_objects"] == 1
        (warning,) = client.get("/api/1/status").json()["state"]["warnings"]
    assert warning.endswith("lifecycle rules delete within 3 days: 1")


def test_the_end_of_a_backlog_is_told_by_the_pace_since_it_began(
    client: TestClient, engine: Engine, event_log: EventLog
) -> None:
    now = datetime.now(UTC)
    before, *during = done = [announced() for _ in range(5)]
    record(engine, event_log, *map(ingested, done), *map(uploaded, done), *(ingested(announced()) for _ in range(6)))
    with Session(engine) as session, session.begin():
        for event, seconds in ((before, 200), *((event, 20) for event in during)):
            at = now - timedelta(seconds=seconds)
            session.execute(update(Timestep).where(col(Timestep.id) == event.timestep_id).values(uploaded_at=at))
    disk = Disk(device="host:1", directory="/data/prince", free=10**12, total=10**12)
    for name, since in (("prince", now - timedelta(hours=2)), ("aretha", now)):
        seen = SystemSeen(name=name, display_name=name, at=now, source=disk, staging=None, waiting=1)
        event_log.systems.tell(seen.model_copy(update={"waiting_since": since}))
    # One that has waited for 100 s.
    entry_id = f"{int((now.timestamp() - 100) * 1000)}-0"
    event_log.redis.delete(event_log.stream)
    event_log.ensure_groups()
    event_log.redis.xadd(event_log.stream, {"type": "timestep.ingested", "event": "{}"}, id=entry_id)
    status = client.get("/api/1/status").json()
    assert status["event_files_waiting"] == 2
    # Four in 100 s: the eight take 200 s.
    assert status["state"]["done_in_seconds"] == pytest.approx(200, abs=10)
    figures = read_metrics(client)
    assert figures["archiver_waiting_event_files"] == 2
    assert figures["archiver_oldest_event_file_seconds prince"] == pytest.approx(7200, abs=60)
    assert figures["archiver_oldest_event_file_seconds aretha"] < 60
    page = client.get("/").text
    assert "event files waiting" in page
    assert "all done in" in page


def test_event_files_of_a_system_that_is_gone_wait_no_more(client: TestClient, event_log: EventLog) -> None:
    disk = Disk(device="host:1", directory="/data/prince", free=10**12, total=10**12)

    def waiting_when(**minutes: int) -> object:
        for name, ago in minutes.items():
            at = datetime.now(UTC) - timedelta(minutes=ago)
            seen = SystemSeen(name=name, display_name=name, at=at, source=disk, staging=None, waiting=3)
            event_log.systems.tell(seen)
        return client.get("/api/1/status").json()["event_files_waiting"]

    assert waiting_when() is None
    assert waiting_when(prince=0, aretha=50) == 6
    assert waiting_when(prince=0, aretha=70) == 3
    assert read_metrics(client)["archiver_oldest_event_file_seconds prince"] == 0
    # Nobody knows, where nobody looks.
    assert waiting_when(prince=70) is None
    gone = {"archiver_waiting_event_files", "archiver_oldest_event_file_seconds prince"}
    assert not gone & read_metrics(client).keys()


def test_nothing_happened_yet(client: TestClient) -> None:
    status = client.get("/api/1/status").json()
    assert status["state"]["timesteps"] == {"ingested": 0, "uploaded": 0, "archived": 0, "failed": 0}
    assert status["state"]["done_in_seconds"] == 0
    assert [group["oldest_waiting_seconds"] for group in status["groups"]] == [None, None]
    figures = read_metrics(client)
    assert figures["archiver_timesteps archived"] == 0
    assert figures["archiver_redis_limit_bytes"] == math.inf


@pytest.fixture
def cut_off(settings: Settings, object_store: ObjectStore, event_log: EventLog) -> Iterator[TestClient]:
    """A gateway without a database."""
    away = {"database_url": SecretStr("postgresql://archiver:pa55word@127.0.0.1:1/none")}
    with TestClient(create_app(settings.model_copy(update=away)), raise_server_exceptions=False) as client:
        yield client


def test_what_can_not_be_asked_does_not_hide_the_rest(cut_off: TestClient) -> None:
    answer = cut_off.get("/api/1/status")
    status = answer.json()
    assert status["state"] is None
    assert status["problems"] == ["The database can't be reached."]
    assert [group["group"] for group in status["groups"]] == ["upload-worker", "state-manager"]
    figures = read_metrics(cut_off)
    assert (figures["archiver_reachable database"], figures["archiver_reachable stream"]) == (0, 1)
    assert "archiver_stored_bytes" not in figures
    assert "pa55word" not in answer.text


def test_a_stream_that_was_not_set_up(settings: Settings, object_store: ObjectStore, redis_url: str) -> None:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        assert "archiver init" in client.get("/api/1/status").json()["problems"][0]
        assert read_metrics(client)["archiver_reachable stream"] == 0


def test_metrics_need_the_token_where_reads_do(
    settings: Settings, object_store: ObjectStore, event_log: EventLog
) -> None:
    with TestClient(create_app(settings.model_copy(update={"api_token": SecretStr(TOKEN)}))) as client:
        problem(client.get("/metrics"), 401)
        answer = client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200
    assert TOKEN not in answer.text
    assert "test-secret" not in answer.text
