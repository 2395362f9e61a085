"""What an older release has written into the stream is still read, and what a newer one writes is kept for it."""

import json
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import Engine
from sqlmodel import Session, select

from blocks.entry import Entry, UnreadableEntry
from blocks.event_log import EventLog
from blocks.messages import DATA_TYPES, SCHEMA_VERSION
from blocks.tables import Timestep
from flows.record import record_waiting

# One line per type of event, as a release with that schema version wrote it. These files are never changed.
_FILES = sorted((Path(__file__).parent / "schema_versions").iterdir())
WRITTEN = {int(file.stem): file.read_text().splitlines() for file in _FILES}


def test_there_is_an_example_of_everything_that_was_ever_written() -> None:
    assert WRITTEN.keys() == set(range(1, SCHEMA_VERSION + 1))
    assert {json.loads(line)["type"] for line in WRITTEN[SCHEMA_VERSION]} == DATA_TYPES.keys()


@pytest.mark.parametrize("line", [line for lines in WRITTEN.values() for line in lines])
def test_nothing_in_it_is_lost(line: str) -> None:
    read = json.loads(Entry("1-0", {"event": line}).decode().model_dump_json())
    written = json.loads(line)
    assert {name: value for name, value in read["data"].items() if name in written["data"]} == written["data"]
    assert {name: read[name] for name in written if name != "data"} == {
        name: written[name] for name in written if name != "data"
    }


@pytest.mark.parametrize("version", WRITTEN)
def test_it_is_recorded(event_log: EventLog, engine: Engine, version: int) -> None:
    for line in WRITTEN[version]:
        _write(event_log, line)
    assert record_waiting(event_log, engine, "test", 100) == len(WRITTEN[version])
    assert event_log.backlog("state-manager").set_aside == 0
    with Session(engine) as session:
        states = dict(session.exec(select(Timestep.id, Timestep.state)).all())
    assert states == {UUID(int=0x7A2F2F6E): "archived", UUID(int=2): "failed"}


def test_what_a_newer_release_wrote_is_set_aside_with_the_reason(event_log: EventLog, engine: Engine) -> None:
    newer = json.loads(WRITTEN[SCHEMA_VERSION][0]) | {"schemaversion": SCHEMA_VERSION + 1}
    _write(event_log, json.dumps(newer))
    _write(event_log, WRITTEN[SCHEMA_VERSION][1])
    record_waiting(event_log, engine, "test", 100)
    assert event_log.backlog("state-manager").set_aside == 1
    with pytest.raises(
        UnreadableEntry, match=r"a newer release wrote it.*upgrade this one, then run `archiver replay`"
    ):
        Entry("1-0", {"event": json.dumps(newer)}).decode()


def _write(log: EventLog, line: str) -> None:
    log.redis.xadd(log.stream, {"event": line, "type": json.loads(line)["type"], "timestep_id": ""})
