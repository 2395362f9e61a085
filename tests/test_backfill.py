"""`archiver backfill`, from the database through the stream."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlmodel import Session, select
from typer.testing import CliRunner

from blocks.event_log import EventLog
from blocks.messages import LogEvent
from blocks.settings import Settings, get_settings
from blocks.tables import Timestep, TimestepEvent, TimestepState
from flows.cli import app
from flows.record import record_waiting
from tests.events import announced, failed, ingested, rejected, said, uploaded

Backfill = Callable[..., Any]


@pytest.fixture
def backfill(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backfill]:
    """The command, on the test's own servers."""
    for name in ("database_url", "redis_url"):
        monkeypatch.setenv(Settings.variable(name), getattr(settings, name).get_secret_value())
    get_settings.cache_clear()
    yield lambda *arguments: CliRunner().invoke(app, ["backfill", *arguments])
    get_settings.cache_clear()


def test_only_what_failed_is_taken_up_and_nothing_new_is_said_of_it(
    backfill: Backfill, settings: Settings, engine: Engine, event_log: EventLog, tmp_path: Path
) -> None:
    lost, done, fresh = announced(), announced(), announced()
    first = said(ingested(lost))
    for event in (first, said(failed(lost)), said(ingested(done)), said(failed(done)), said(uploaded(done))):
        event_log.append(event)
    event_log.append(said(ingested(fresh)))
    record_waiting(event_log, engine, "state-manager@test", 100)
    before = [entry.id for entry in event_log.read("upload-worker", "somebody", count=100, wait_seconds=0.01)]

    result = backfill("--failed", "--system", "prince")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "1 timesteps"
    assert str(lost.timestep_id) in result.output
    (again,) = event_log.read("upload-worker", "somebody", count=100, wait_seconds=0.01)
    assert again.id not in before
    assert LogEvent.model_validate_json(again.fields["event"]) == first

    record_waiting(event_log, engine, "state-manager@test", 100)
    with Session(engine) as session:
        events = session.exec(select(TimestepEvent).where(TimestepEvent.timestep_id == lost.timestep_id)).all()
        assert sorted(event.type for event in events) == ["timestep.failed", "timestep.ingested"]
        row = session.get(Timestep, lost.timestep_id)
        assert row is not None
        assert row.state == TimestepState.FAILED
    event_log.append(said(uploaded(lost)))
    record_waiting(event_log, engine, "state-manager@test", 100)
    assert "0 timesteps" in backfill("--failed").output


def test_it_wants_to_know_what(backfill: Backfill) -> None:
    result = backfill()
    assert result.exit_code == 2
    assert "--failed" in result.output


def test_rejected_event_files_are_asked_for_again(
    backfill: Backfill, settings: Settings, engine: Engine, event_log: EventLog
) -> None:
    event_log.append(said(rejected("events/1.json")))
    record_waiting(event_log, engine, "state-manager@test", 100)
    result = backfill("--rejected", "--system", "aretha")
    assert result.output.splitlines() == ["0 event files"]
    assert event_log.register.take_requests("prince") == set()
    result = backfill("--rejected")
    assert result.output.splitlines() == ["prince/events/1.json is read again", "1 event files"]
    assert event_log.register.take_requests("prince") == {"events/1.json"}
