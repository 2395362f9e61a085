"""Warnings that come before anything is lost, from what the database knows."""

import math
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlmodel import Session

from blocks.disk_outlook import DiskOutlook, disk_outlooks
from blocks.early_warnings import EarlyWarnings, expiring_objects, silent_systems
from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.expiry import ExpiryRule
from blocks.imaging_system import ImagingSystem
from blocks.messages import LogEvent, SourcePurged, StagingPurged
from blocks.reach import UPLOAD_POOL, Reach
from blocks.settings import Settings
from blocks.system_seen import Disk, SystemSeen
from flows.apply import apply_events
from tests.events import NOON, announced, archived, delivered, ingested, purged, said, uploaded

HOUR = timedelta(hours=1)


def apply(engine: Engine, *events: LogEvent) -> None:
    with Session(engine) as session, session.begin():
        apply_events(session, delivered(*events))


def imaged(engine: Engine, system: str, hours: Iterable[float]) -> None:
    """Timesteps so many hours before noon."""
    events = [announced(timestamp=NOON - hour * HOUR) for hour in hours]
    apply(engine, *(said(ingested(event, system)) for event in events))


def silent(engine: Engine, hours: float = 0.0) -> list[str]:
    with Session(engine) as session:
        return [one.system for one in silent_systems(session, NOON + hours * HOUR)]


def test_a_system_is_silent_after_several_of_its_own_intervals(engine: Engine) -> None:
    imaged(engine, "hourly", [1, 2, 3, 4, 5, 6, 7])
    imaged(engine, "daily", [20, 44, 68, 92, 116, 140])
    imaged(engine, "new", [100, 101])
    # A clock was wrong once.
    imaged(engine, "hourly", [-24 * 365 * 70])
    assert silent(engine) == []
    assert silent(engine, 1.9) == []
    assert silent(engine, 2.1) == ["hourly"]
    assert silent(engine, 60) == ["daily", "hourly"]
    # Whoever had to hear of it has by now.
    assert silent(engine, 40 * 24) == []


def test_rounds_of_many_positions_make_the_cadence(engine: Engine) -> None:
    imaged(engine, "prince", [round_ * 2 + position / 60 for round_ in range(5) for position in range(8)])
    assert silent(engine, 5) == []
    assert silent(engine, 7) == ["prince"]


def disk(free: int = 100 * 20480, device: str = "host:1") -> Disk:
    return Disk(device=device, directory=f"/data/{device}", free=free, total=10 * free)


def seen(system: str = "prince", at: datetime = NOON, source: Disk | None = None, staging: Disk | None = None) -> Any:
    return SystemSeen(name=system, display_name=system, at=at, source=source or disk(), staging=staging)


def outlook(engine: Engine, *systems: SystemSeen, hours: float = 1.0) -> DiskOutlook:
    with Session(engine) as session:
        (found,) = disk_outlooks(session, systems, NOON + hours * HOUR)
    return found


def test_a_disk_lasts_as_long_as_more_comes_than_goes(engine: Engine) -> None:
    events: list[ImagingEvent] = [announced() for _ in range(4)]
    apply(engine, *(said(ingested(event)) for event in events))
    apply(engine, *(said(uploaded(event)) for event in events[:2]))
    now = outlook(engine, seen())
    # Two of 20480 bytes, and two that are as large as these, within a day.
    assert now.rate_in == pytest.approx(4 * 20480 / 24)
    assert now.rate_out == 0
    assert now.hours_left == pytest.approx(100 * 24 / 4)
    assert now.hours_to_upload == pytest.approx(24)
    assert not now.is_filling
    assert outlook(engine, seen(source=disk(11 * 20480))).is_filling
    assert outlook(engine, seen("aretha")).hours_left == math.inf
    assert outlook(engine, seen(at=NOON + 25 * HOUR), hours=25).hours_left == math.inf
    apply(engine, said(purged(events[0], SourcePurged)))
    assert outlook(engine, seen()).rate_out == pytest.approx(20480 / 24)


def test_a_disk_that_is_full_already_is_told_though_nothing_comes_any_more(engine: Engine) -> None:
    now = outlook(engine, seen(source=Disk(device="host:1", directory="/data", free=10**9, total=10**12)))
    assert (now.hours_left, now.is_filling) == (math.inf, True)
    assert now.sentence().startswith("/data is full: 1.0 GB of 1000.0 GB are free")
    roomy = Disk(device="host:1", directory="/data", free=10**10, total=10**12)
    assert not outlook(engine, seen(source=roomy)).is_filling


def test_a_disk_is_filling_that_is_full_before_the_uploads_catch_up(engine: Engine) -> None:
    events = [announced() for _ in range(10)]
    apply(engine, *(said(ingested(event)) for event in events))
    apply(engine, said(uploaded(events[0])))
    # Ten come a day, and one is uploaded: what waits takes nine days, and the disk lasts five.
    five_days = outlook(engine, seen(source=disk(50 * 20480)))
    assert five_days.hours_left == pytest.approx(5 * 24)
    assert five_days.hours_to_upload == pytest.approx(9 * 24)
    assert five_days.is_filling
    assert not outlook(engine, seen(source=disk(100 * 20480))).is_filling


def test_copies_count_for_the_disk_they_are_on(engine: Engine) -> None:
    events = [announced() for _ in range(2)]
    apply(engine, *(said(ingested(event)) for event in events), *(said(uploaded(event)) for event in events))
    apply(engine, said(purged(events[0], StagingPurged)))
    same = outlook(engine, seen(staging=disk()))
    assert same.rate_in == pytest.approx(4 * 20480 / 24)
    assert same.rate_out == pytest.approx(20480 / 24)
    with Session(engine) as session:
        source, staging = disk_outlooks(session, [seen(staging=disk(device="host:2"))], NOON + HOUR)
    assert source.rate_out == 0
    assert staging.rate_out == pytest.approx(20480 / 24)
    assert source.rate_in == staging.rate_in == pytest.approx(2 * 20480 / 24)


def test_systems_on_one_disk_fill_it_together(engine: Engine) -> None:
    for system in ("prince", "aretha"):
        event = announced()
        apply(engine, said(ingested(event, system)), said(uploaded(event, system)))
    both = outlook(engine, seen(), seen("aretha"))
    assert both.systems == ("aretha", "prince")
    assert both.rate_in == pytest.approx(2 * 20480 / 24)


def test_what_was_seen_long_ago_tells_nothing_of_a_disk(engine: Engine) -> None:
    with Session(engine) as session:
        assert disk_outlooks(session, [seen()], NOON + 2 * HOUR) == []


def test_objects_that_expire_without_a_tape_copy_are_counted(engine: Engine) -> None:
    doomed, on_tape, young = (announced() for _ in range(3))
    video = announced(event_type="video")
    apply(engine, *(said(uploaded(event), -24 * 3600) for event in (doomed, on_tape, video)), said(uploaded(young)))
    apply(engine, said(archived(on_tape.key)))
    with Session(engine) as session:
        rules = [ExpiryRule("images/", 3)]
        assert expiring_objects(session, rules, NOON - 25 * HOUR) == 0
        assert expiring_objects(session, rules, NOON - HOUR) == 1
        assert expiring_objects(session, [ExpiryRule("", 3)], NOON - HOUR) == 2
        assert expiring_objects(session, [ExpiryRule("", 30)], NOON + HOUR) == 0
        assert expiring_objects(session, [ExpiryRule("images/", on=NOON + 3 * 24 * HOUR)], NOON) == 2
        assert expiring_objects(session, [ExpiryRule("images/", on=NOON + 4 * 24 * HOUR)], NOON) == 0
        assert expiring_objects(session, [], NOON + 1000 * HOUR) == 0
        early = EarlyWarnings.of(session, [seen(source=disk(1))], rules, NOON - HOUR)
    assert early.sentences()[-1].endswith("lifecycle rules delete within 3 days: 1")


def test_systems_that_no_upload_worker_reaches_are_told_once_something_waits_for_long(
    engine: Engine, event_log: EventLog
) -> None:
    done = announced()
    apply(engine, said(ingested(done, "miles")), said(uploaded(done, "miles")))
    imaged(engine, "prince", [1])
    imaged(engine, "aretha", [1, 2])
    reach = Reach(event_log.redis, event_log.stream)

    def unreached(minutes: float) -> dict[str, int]:
        with Session(engine) as session:
            early = EarlyWarnings.of(
                session, [], [], NOON + timedelta(minutes=minutes), not_uploading=reach.not_uploading
            )
        assert len([line for line in early.sentences() if "no upload-worker" in line]) == len(early.unreached)
        return early.unreached

    assert unreached(1) == {}
    assert unreached(3) == {"aretha": 2, "prince": 1}
    reach.tell(UPLOAD_POOL, "host a", ["default", "prince"])
    assert unreached(3) == {"aretha": 2}
    reach.tell(UPLOAD_POOL, "host b", [])
    assert unreached(3) == {}


def test_what_is_seen_of_a_system_is_told_through_redis(event_log: EventLog, tmp_path: Path) -> None:
    (tmp_path / "prince" / "events").mkdir(parents=True)
    settings = Settings(consumer="host", staging_dir=tmp_path / "staging")
    (tmp_path / "staging").mkdir()
    system = ImagingSystem(name="prince", root=tmp_path, display_name="Prince, room 12", staging="auto")
    event_log.systems.tell(SystemSeen.of(system, settings))
    (told,) = event_log.systems.all()
    assert (told.name, told.display_name) == ("prince", "Prince, room 12")
    assert told.staging is not None
    assert told.source.device == told.staging.device
    assert 0 < told.source.free <= told.source.total
    assert told.waits_for_room is None
    event_log.systems.tell_of_no_room("prince", "staging holds 5 of 5 bytes", seconds=60)
    (told,) = event_log.systems.all()
    assert told.waits_for_room == "staging holds 5 of 5 bytes"


def test_a_system_that_waits_for_room_is_told(engine: Engine) -> None:
    with Session(engine) as session:
        waits = seen(source=disk(1)).model_copy(update={"waits_for_room": "staging holds 5 of 5 bytes"})
        (sentence,) = EarlyWarnings.of(session, [waits, seen("aretha")], [], NOON).sentences()
    assert sentence.startswith("prince waits for room in staging")
    assert sentence.endswith("staging holds 5 of 5 bytes")
