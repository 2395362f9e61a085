"""How flight checks end is told everywhere, and their timesteps nowhere."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from sqlmodel import Session, update

from blocks.early_warnings import expiring_objects, silent_systems
from blocks.event_log import EventLog
from blocks.expiry import ExpiryRule
from blocks.flight_outcome import Verdict
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.synthetic_files import prepare
from blocks.synthetic_timestep import SYSTEM, announcement
from blocks.tables import Timestep
from flows.audit import find
from flows.purge import configured_systems
from flows.reconcile import reconcile
from flows.report import report
from flows.verify import NothingToVerify, Selection, choose
from tests.events import archived, failed, ingested, uploaded, withdrawn
from tests.gateway import problem, record
from tests.test_api_status import read_metrics

WHY = "the timestep was ingested, but not uploaded within 600 s"


def test_a_failure_is_told_with_what_to_look_at(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    event_log.flights.tell("good", "it went the whole way")
    event_log.flights.tell("failed", WHY, is_alarmed=True)
    state = client.get("/api/1/status").json()["state"]
    assert (state["flight_check"]["verdict"], state["flight_check"]["sentence"]) == ("failed", WHY)
    (warning,) = state["warnings"]
    assert warning.endswith(WHY)
    assert client.get("/api/1/at-risk").json()["warnings"] == [warning]
    assert warning in client.get("/").text
    figures = read_metrics(client)
    assert figures["archiver_flight_check_failed"] == 1
    age = datetime.now(UTC).timestamp() - figures["archiver_flight_check_last_good_seconds"]
    assert 0 <= age < 60
    assert f"- {warning}" in report(engine, datetime.now(UTC), flight=event_log.flights.last()).splitlines()


@pytest.mark.parametrize("verdict", ["good", "not possible"])
def test_only_a_failure_is_a_warning(client: TestClient, event_log: EventLog, verdict: Verdict) -> None:
    event_log.flights.tell(verdict, "a sentence")
    state = client.get("/api/1/status").json()["state"]
    assert (state["flight_check"]["verdict"], state["warnings"]) == (verdict, [])
    figures = read_metrics(client)
    assert figures["archiver_flight_check_failed"] == 0
    assert (figures["archiver_flight_check_last_good_seconds"] > 0) == (verdict == "good")


def test_nobody_sees_its_timesteps_who_does_not_ask_for_them(
    settings: Settings, client: TestClient, engine: Engine, event_log: EventLog, object_store: ObjectStore
) -> None:
    sent = [announcement(UUID(int=number << 96)) for number in range(1, 10)]
    record(engine, event_log, *(ingested(event, SYSTEM) for event in sent))
    record(engine, event_log, *(uploaded(event, SYSTEM, bucket=settings.bucket) for event in sent[:5]))
    record(engine, event_log, failed(sent[5], system=SYSTEM), archived(sent[0].key))
    long_ago = datetime.now(UTC) - timedelta(days=9)
    with Session(engine) as session, session.begin():
        session.execute(update(Timestep).values(ingested_at=long_ago))
    for path, query in (("exports", {}), ("timesteps", {}), ("experiments", {}), ("at-risk", {"hours": "0"})):
        assert client.get(f"/api/1/{path}", params=query).json()["count"] == 0
        assert client.get(f"/api/1/{path}", params={**query, "system": SYSTEM}).json()["count"] > 0
    assert client.get("/api/1/stats/daily").json()["data"] == []
    state = client.get("/api/1/status").json()["state"]
    assert (set(state["timesteps"].values()), state["bytes"], state["warnings"]) == ({0}, 0, [])
    assert (state["uploaded_last_hour"], state["oldest_not_on_tape_seconds"]) == (0, None)
    now = datetime.now(UTC)
    lines = report(engine, now).splitlines()
    assert {"taken in: 0", "uploaded: 0, 0.0 GB", "on tape: 0", "failed, and not uploaded since: 0"} <= {*lines}
    with Session(engine) as session:
        assert silent_systems(session, now) == []
        assert expiring_objects(session, [ExpiryRule("", 1)], now) == 0
    assert list(find([], settings, timedelta(seconds=-1))) == []
    assert reconcile(settings, event_log).asked == 0
    with pytest.raises(NothingToVerify):
        choose(engine, Selection())


async def _microscopes(settings: Settings) -> list[str]:
    return [system.name for system in await configured_systems(settings)]


def test_its_directory_is_no_microscope(settings: Settings) -> None:

    root = cast(Path, settings.data_dir)
    root.mkdir()
    prepare(root)
    assert asyncio.run(_microscopes(settings.model_copy(update={"prefect_api_url": "http://127.0.0.1:1/api"}))) == []


def test_what_became_of_one_is_said(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    event = announcement(UUID(int=1))
    record(engine, event_log, ingested(event, SYSTEM), withdrawn(event))
    detail = problem(client.get(f"/api/1/timesteps/{event.timestep_id}"), 404)
    assert "a flight check withdrew it at " in detail
    assert detail.endswith(" UTC, as it had arrived.")
