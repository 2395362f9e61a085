"""Warnings that come before anything is lost, from what the database knows."""

import math
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlmodel import Session

from blocks.early_warnings import silent_systems, source_outlook, staging_outlook
from blocks.event_file import ImagingEvent
from blocks.messages import LogEvent, SourcePurged
from flows.apply import apply_events
from tests.events import NOON, announced, delivered, ingested, purged, said, uploaded

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
    assert silent(engine) == []
    assert silent(engine, 1.9) == []
    assert silent(engine, 2.1) == ["hourly"]
    assert silent(engine, 60) == ["daily", "hourly"]


def test_rounds_of_many_positions_make_the_cadence(engine: Engine) -> None:
    imaged(engine, "prince", [round_ * 2 + position / 60 for round_ in range(5) for position in range(8)])
    assert silent(engine, 5) == []
    assert silent(engine, 7) == ["prince"]


def test_a_disk_lasts_as_long_as_more_comes_than_goes(engine: Engine, tmp_path: Path) -> None:
    events: list[ImagingEvent] = [announced() for _ in range(4)]
    apply(engine, *(said(ingested(event)) for event in events))
    apply(engine, *(said(uploaded(event)) for event in events[:2]))
    at = NOON + HOUR
    with Session(engine) as session:
        outlook = source_outlook(session, tmp_path, ["prince"], at)
        # Two of 20480 bytes, and two that are as large as these, within a day.
        assert outlook.rate_in == pytest.approx(4 * 20480 / 24)
        assert outlook.rate_out == 0
        assert outlook.hours_left == pytest.approx(outlook.free / outlook.rate_in)
        assert 0 < outlook.free <= outlook.total
        assert source_outlook(session, tmp_path, ["aretha"], at).hours_left == math.inf
        assert source_outlook(session, tmp_path, ["prince"], NOON + 25 * HOUR).hours_left == math.inf
    apply(engine, said(purged(events[0], SourcePurged)))
    with Session(engine) as session:
        assert source_outlook(session, tmp_path, ["prince"], at).rate_out == pytest.approx(20480 / 24)
        assert staging_outlook(session, tmp_path, ["prince"], at).rate_out == 0
