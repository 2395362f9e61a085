"""What is listed as rejected is what can't be taken in now: event files in, the database's list out."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
from sqlalchemy import Engine
from sqlmodel import Session, select

from blocks.event_file import InvalidEventFile
from blocks.event_log import EventLog
from blocks.event_register import EventFileRegister
from blocks.settings import Settings
from blocks.tables import RejectedEventFile
from flows.backfill import backfill_rejected
from flows.ingest import ingest_timestep
from flows.record import record_waiting
from tests.watching import Ingest, Microscope, rejected, said, taken_in, until, watching


def listed(log: EventLog, engine: Engine) -> dict[str, str]:
    """The rejected event files of the database, with their reasons."""
    record_waiting(log, engine, "state-manager", limit=100)
    with Session(engine) as session:
        return {row.event_file: row.reason for row in session.exec(select(RejectedEventFile))}


def test_a_rejected_file_that_turns_out_a_duplicate_is_listed_no_more(
    root: Path, event_log: EventLog, ingest: Ingest, engine: Engine
) -> None:
    prince = Microscope(root)
    first = prince.drop("first.json")
    (prince.events / "second.json").write_text("{")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "first.json"), "taking in the first")
            await until(lambda: listed(event_log, engine).keys() == {"events/second.json"}, "listing the second")
            shutil.copy(first, prince.events / "second.json")
            await until(lambda: not listed(event_log, engine), "the end of its rejection")

    asyncio.run(test())
    assert [type for type, _ in said(event_log)] == ["ingested", "rejected", "cleared"]


@pytest.mark.parametrize("watching_by", ["native", "polling"])
def test_a_rejected_file_is_read_again_when_asked_for_though_nothing_changed_on_disk(
    root: Path,
    event_log: EventLog,
    engine: Engine,
    settings: Settings,
    ingest: Ingest,
    watching_by: Literal["native", "polling"],
) -> None:
    ingest.watching = watching_by
    Microscope(root).drop("1.json", images=2)
    Microscope(root, "aretha").drop("2.json", images=2)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(lambda: len(listed(event_log, engine)) == 2, "rejection")
            ingest.strictness = "accept"
            await asyncio.sleep(2.5)  # two rescans
            assert len(listed(event_log, engine)) == 2
            assert list(backfill_rejected(settings, "prince")) == ["prince/events/1.json"]
            await until(taken_in(event_log, "1.json"), "taking it in")
            await until(lambda: len(listed(event_log, engine)) == 1, "the end of its rejection")

    asyncio.run(test())
    assert ingest.runs == {"prince/events/1.json": 2, "aretha/events/2.json": 1}


def test_a_rejected_file_that_is_removed_is_listed_no_more_until_it_comes_back(
    root: Path, event_log: EventLog, ingest: Ingest, engine: Engine, tmp_path: Path
) -> None:
    prince = Microscope(root)
    wrong = prince.events / "wrong.json"
    wrong.write_text("{")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            for _ in range(2):
                await until(lambda: listed(event_log, engine).keys() == {"events/wrong.json"}, "listing it")
                # Moved away and back it is the same in all respects, also to its fingerprint.
                wrong.rename(tmp_path / "wrong.json")
                await until(lambda: not listed(event_log, engine), "the end of its rejection")
                (tmp_path / "wrong.json").rename(wrong)
            await until(lambda: listed(event_log, engine).keys() == {"events/wrong.json"}, "listing it once more")

    asyncio.run(test())
    assert [type for type, _ in said(event_log)] == ["rejected", "cleared"] * 2 + ["rejected"]


def test_a_share_that_is_away_ends_no_rejection(
    root: Path, event_log: EventLog, ingest: Ingest, engine: Engine, tmp_path: Path
) -> None:
    prince = Microscope(root)
    (prince.events / "wrong.json").write_text("{")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(rejected(event_log, "wrong.json"), "rejection")
            prince.directory.rename(tmp_path / "away")
            await asyncio.sleep(1.5)  # a rescan
            (tmp_path / "away").rename(prince.directory)
            prince.drop("sound.json")
            await until(taken_in(event_log, "sound.json"), "taking in another")

    asyncio.run(test())
    assert listed(event_log, engine).keys() == {"events/wrong.json"}
    assert [type for type, _ in said(event_log)] == ["rejected", "ingested"]


@pytest.mark.parametrize("step", ["close_rejection", "conclude"])
def test_a_crash_while_a_rejection_ends_leaves_nothing_listed(
    root: Path, event_log: EventLog, ingest: Ingest, engine: Engine, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two steps: the next look at the file does the rest."""
    prince = Microscope(root)
    known = json.loads(prince.drop("known.json").read_text())
    mended = prince.events / "mended.json"
    mended.write_text("{")
    parameters = {"system": "prince", "event_file": "events/mended.json"}
    asyncio.run(ingest.drive("", "", {"system": "prince", "event_file": "events/known.json"}))
    asyncio.run(ingest.drive("", "", parameters))
    assert listed(event_log, engine).keys() == {"events/mended.json"}
    mended.write_text(json.dumps(known))

    class KilledError(BaseException): ...

    def killed(*_rest: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(EventFileRegister, step, killed)
        with pytest.raises(KilledError):
            asyncio.run(ingest.drive("", "", parameters))
    asyncio.run(ingest.drive("", "", parameters))
    assert listed(event_log, engine) == {}
    # And when it is rejected again, for the same reason, it is listed again.
    mended.write_text("{")
    asyncio.run(ingest.drive("", "", parameters))
    assert listed(event_log, engine).keys() == {"events/mended.json"}


@pytest.mark.parametrize(
    ("system", "event_file"),
    [("prince", "{place}/1.json"), ("prince", "events/../1.json"), ("prince", "1.json"), ("..", "events/1.json")],
)
def test_a_run_asked_for_by_hand_reads_nothing_but_event_files(root: Path, system: str, event_file: str) -> None:
    Microscope(root).drop("1.json")
    with pytest.raises(InvalidEventFile, match="is no event file"):
        asyncio.run(ingest_timestep.fn(system, event_file.format(place=root / "prince" / "events")))
