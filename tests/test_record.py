"""Recording events: the end is the same whatever the order and the number of deliveries."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlmodel import Session, SQLModel, select

import flows.apply
import flows.record
from blocks.database import create_engine
from blocks.event_file import ImagingEvent
from blocks.event_log import Entry, EventLog
from blocks.messages import (
    Archived,
    Cleared,
    EventData,
    Failed,
    Ingested,
    LogEvent,
    Rejected,
    SourcePurged,
    StagingPurged,
    Uploaded,
    Withdrawn,
)
from blocks.settings import Settings
from blocks.synthetic_timestep import SYSTEM, announcement
from blocks.tables import Archive, ArchiveMember, RejectedEventFile, Timestep, TimestepEvent, TimestepImage
from flows.apply import apply_events
from flows.record import GROUP, record, record_waiting
from tests.events import (
    NOON,
    announced,
    archived,
    cleared,
    delivered,
    failed,
    ingested,
    purged,
    rejected,
    said,
    uploaded,
    withdrawn,
)

TABLES: tuple[type[SQLModel], ...] = (
    Timestep,
    TimestepImage,
    TimestepEvent,
    Archive,
    ArchiveMember,
    RejectedEventFile,
)


def apply(engine: Engine, entries: Sequence[Entry]) -> None:
    with Session(engine) as session, session.begin():
        apply_events(session, entries)


def apply_said(engine: Engine, *events: LogEvent) -> None:
    """Deliver each event by itself."""
    for event in events:
        apply(engine, delivered(event))


def the_timestep(engine: Engine) -> Timestep:
    with Session(engine) as session:
        return session.exec(select(Timestep)).one()


def rows(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """All there is in the database."""
    with Session(engine) as session:
        return {
            table.__name__: sorted((row.model_dump() for row in session.exec(select(table))), key=str)
            for table in TABLES
        }


def empty(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in ("timestep", "timestep_image", "timestep_event", "archive", "rejected_event_file"):
            connection.execute(text(f"delete from {table}"))


# --- any order, any number

EVENTS = [announced(UUID(int=number << 96), position=number) for number in (1, 2)]
SYNTHETIC = announcement(UUID(int=3 << 96))
FILES = ["events/1.json", "events/2.json"]

said_data: st.SearchStrategy[EventData] = st.one_of(
    st.builds(ingested, st.sampled_from(EVENTS), event_file=st.sampled_from(FILES)),
    st.builds(uploaded, st.sampled_from(EVENTS)),
    st.builds(failed, st.sampled_from(EVENTS), attempt=st.integers(1, 3)),
    st.builds(
        purged, st.sampled_from(EVENTS), kind=st.sampled_from([SourcePurged, StagingPurged]), run=st.integers(1, 2)
    ),
    st.builds(
        archived,
        st.sampled_from([EVENTS[0].key, EVENTS[1].key, "images/nobody/knows/it.tar"]),
        archive=st.sampled_from(["/tape/1.tar", "/tape/2.tar"]),
        job=st.integers(1, 2),
    ),
    st.builds(
        rejected,
        st.sampled_from(FILES),
        reason=st.sampled_from(["it is not JSON", "position is missing"]),
        episode=st.sampled_from([None, 1, 2]),
    ),
    st.builds(cleared, st.sampled_from(FILES), episode=st.integers(1, 2)),
    st.builds(ingested, st.just(SYNTHETIC), system=st.just(SYSTEM), event_file=st.just("events/3.json")),
    st.builds(uploaded, st.just(SYNTHETIC), system=st.just(SYSTEM)),
    st.builds(failed, st.just(SYNTHETIC), system=st.just(SYSTEM)),
    # Also of a microscope's, where it does not count.
    st.builds(withdrawn, st.sampled_from([SYNTHETIC, SYNTHETIC, EVENTS[0]])),
)


@st.composite
def logs(draw: st.DrawFn) -> list[Entry]:
    """What stands in the stream: also the same thing twice, and different things at the same instant."""
    return delivered(*(said(data, draw(st.integers(0, 8))) for data in draw(st.lists(said_data, max_size=12))))


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs(), data=st.data())
def test_any_deliveries_give_the_same_rows(engine: Engine, log: list[Entry], data: st.DataObject) -> None:
    empty(engine)
    apply(engine, log)
    expected = rows(engine)
    check_against_the_rules([entry.decode() for entry in log], engine)
    apply(engine, log)
    assert rows(engine) == expected

    empty(engine)
    again = data.draw(st.lists(st.sampled_from(log), max_size=6)) if log else []
    deliveries = data.draw(st.permutations([*log, *again]))
    while deliveries:
        size = data.draw(st.integers(1, len(deliveries)))
        apply(engine, deliveries[:size])
        deliveries = deliveries[size:]
    assert rows(engine) == expected


def check_against_the_rules(events: list[LogEvent], engine: Engine) -> None:
    """The rules once more, as plainly as they can be said."""
    telling = [event.data for event in events]
    if withdrawn(SYNTHETIC) in telling:
        telling = [data for data in telling if data.timestep_id != SYNTHETIC.timestep_id]
    uploads = {data.key: data.timestep_id for data in telling if isinstance(data, Uploaded)}
    on_tape = {uploads[data.key] for data in telling if isinstance(data, Archived) and data.key in uploads}
    given_up = {data.timestep_id for data in telling if isinstance(data, Failed)}
    known = {data.timestep_id for data in telling if isinstance(data, Ingested | Uploaded | Failed)}
    expected = {
        id: "archived"
        if id in on_tape
        else "uploaded"
        if id in uploads.values()
        else "failed"
        if id in given_up
        else "ingested"
        for id in known
    }

    # An event that was said twice was said when it was said first.
    first: dict[UUID, LogEvent] = {}
    for event in sorted(events, key=lambda event: event.time):
        first.setdefault(event.id, event)
    over = {event.data.episode for event in first.values() if isinstance(event.data, Cleared)}
    taken_in, refused = dict[str, datetime](), dict[str, list[tuple[datetime, UUID, Rejected]]]()
    for event in first.values():
        if isinstance(event.data, Ingested):
            taken_in[event.data.event_file] = max(taken_in.get(event.data.event_file, event.time), event.time)
        elif isinstance(event.data, Rejected):
            refused.setdefault(event.data.event_file, []).append((event.time, event.id, event.data))
    still_refused = {
        file
        for file, rejections in refused.items()
        for time, _, last in [max(rejections, key=lambda rejection: rejection[:2])]
        if not (file in taken_in and taken_in[file] >= time) and last.episode not in over
    }

    gone = {
        kind: {
            id: max(event.time for event in first.values() if event.data.timestep_id == id and event.type == kind.type)
            for id in known & {event.data.timestep_id for event in first.values() if event.type == kind.type}
        }
        for kind in (SourcePurged, StagingPurged)
    }

    found = rows(engine)
    purged_at = {row["id"]: (row["source_purged_at"], row["staging_purged_at"]) for row in found["Timestep"]}
    assert purged_at == {id: (gone[SourcePurged].get(id), gone[StagingPurged].get(id)) for id in known}
    assert {row["id"]: row["state"] for row in found["Timestep"]} == expected
    assert {row["timestep_id"] for row in found["TimestepImage"]} == set(uploads.values())
    assert {row["event_file"] for row in found["RejectedEventFile"]} == still_refused
    assert {row["id"] for row in found["TimestepEvent"]} == {event.id for event in events}


# --- single rules


def test_a_notice_may_come_before_its_upload_is_known(engine: Engine) -> None:
    event = announced()
    apply_said(engine, said(archived(event.key), 9), said(ingested(event), 1))
    assert the_timestep(engine).state == "ingested"
    apply_said(engine, said(uploaded(event), 5))
    timestep = the_timestep(engine)
    assert timestep.state == "archived"
    assert timestep.archived_at == NOON + timedelta(seconds=9)


def test_a_failure_is_over_once_the_upload_succeeded(engine: Engine) -> None:
    event = announced()
    apply_said(engine, said(ingested(event)), said(failed(event, "the share is away"), 5))
    timestep = the_timestep(engine)
    assert (timestep.state, timestep.failed_stage, timestep.failed_reason) == ("failed", "upload", "the share is away")
    apply_said(engine, said(uploaded(event), 9))
    timestep = the_timestep(engine)
    assert (timestep.state, timestep.failed_at, timestep.failed_reason) == ("uploaded", None, None)


def test_a_failure_after_the_upload_is_shown_but_the_object_stays_exported(engine: Engine) -> None:
    event = announced()
    apply_said(engine, said(uploaded(event), 5), said(failed(event, "lost the race"), 9))
    timestep = the_timestep(engine)
    assert (timestep.state, timestep.failed_reason) == ("uploaded", "lost the race")


def test_a_purge_counts_once_its_timestep_is_known(engine: Engine) -> None:
    event = announced()
    apply_said(engine, said(purged(event), 9), said(purged(event, StagingPurged), 8))
    assert rows(engine)["Timestep"] == []
    apply_said(engine, said(ingested(event), 1), said(uploaded(event), 5))
    timestep = the_timestep(engine)
    assert timestep.state == "uploaded"
    assert timestep.source_purged_at == NOON + timedelta(seconds=9)
    assert timestep.staging_purged_at == NOON + timedelta(seconds=8)


def test_a_synthetic_timestep_is_gone_once_it_is_withdrawn_and_its_history_stays(engine: Engine) -> None:
    other, event = announced(), SYNTHETIC
    told = [
        said(ingested(event, SYSTEM)),
        said(uploaded(event, SYSTEM), 1),
        said(failed(event, system=SYSTEM), 2),
        said(withdrawn(event), 3),
    ]
    for order in (told, told[::-1], [told[3], *told, told[3]]):
        empty(engine)
        apply_said(engine, said(uploaded(other)), *order)
        assert the_timestep(engine).id == other.timestep_id
        assert {row["timestep_id"] for row in rows(engine)["TimestepImage"]} == {other.timestep_id}
        assert {row["id"] for row in rows(engine)["TimestepEvent"]} >= {event.id for event in told}


@pytest.mark.parametrize(
    ("system", "event"),
    [
        ("prince", announced()),
        ("prince", SYNTHETIC),
        (SYSTEM, announced()),
        (SYSTEM, SYNTHETIC.model_copy(update={"img_count": 150})),
        (SYSTEM, SYNTHETIC.model_copy(update={"metadata": {"objective": "20x"}})),
    ],
)
def test_no_timestep_of_a_microscope_can_be_withdrawn(engine: Engine, system: str, event: ImagingEvent) -> None:
    told = [said(ingested(event, system)), said(uploaded(event, system), 1), said(withdrawn(event), 2)]
    for order in (told, told[::-1]):
        empty(engine)
        apply_said(engine, *order)
        assert the_timestep(engine).state == "uploaded"
        assert len(rows(engine)["TimestepImage"]) == 2


def test_what_any_microscope_said_of_an_id_keeps_it(engine: Engine) -> None:
    told = [said(uploaded(SYNTHETIC, SYSTEM)), said(withdrawn(SYNTHETIC), 1), said(failed(SYNTHETIC), 2)]
    apply_said(engine, *told)
    assert the_timestep(engine).state == "uploaded"


def test_no_other_system_can_say_that_a_timestep_is_withdrawn() -> None:
    with pytest.raises(ValidationError, match="flight-check"):
        Withdrawn.model_validate({"timestep_id": UUID(int=1), "system": "prince", "reason": "by accident"})


def test_unknown_fields_and_odd_characters_are_kept(engine: Engine) -> None:
    event = announced(objective="20x", metadata={"note": "µm \0 end", "nested": {"z": [1, 2]}})
    apply_said(engine, said(ingested(event)))
    timestep = the_timestep(engine)
    assert timestep.announced["objective"] == "20x"
    assert timestep.announced["metadata"] == {"note": "µm \0 end", "nested": {"z": [1, 2]}}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("at_once", [True, False])
def test_the_images_are_those_of_the_last_upload_also_without_a_hash(
    engine: Engine, order: tuple[int, int], at_once: bool
) -> None:
    event = announced()
    one = uploaded(event, sha256=None, etag="one")
    other = uploaded(event, sha256=None, etag="other", images=[one.images[0].model_copy(update={"sha256": "ef" * 32})])
    events = [said(one, 1), said(other, 2)]
    in_order = [events[number] for number in order]
    if at_once:
        apply(engine, delivered(*in_order))
    else:
        apply_said(engine, *in_order)
    assert the_timestep(engine).etag == "other"
    assert [image["sha256"] for image in rows(engine)["TimestepImage"]] == ["ef" * 32]


@pytest.mark.parametrize("name", ["a\tb", "a\nb\r", "a\\tb\\", "\\.", "\\N", "µ '\"%s, {}"])
def test_any_name_of_an_image_is_kept_beside_others(engine: Engine, name: str) -> None:
    event = announced()
    upload = uploaded(event)
    images = [*upload.images, upload.images[0].model_copy(update={"name": name})]
    apply_said(engine, said(ingested(event)), said(upload.model_copy(update={"images": images}), 1))
    found = {row["name"]: row for row in rows(engine)["TimestepImage"]}
    assert found == {image.name: {"timestep_id": event.timestep_id, **image.model_dump()} for image in images}


def test_a_second_rejection_replaces_the_first(engine: Engine) -> None:
    apply_said(engine, said(rejected(reason="it is not JSON"), 1), said(rejected(reason="plate is missing"), 2))
    with Session(engine) as session:
        assert session.exec(select(RejectedEventFile)).one().reason == "plate is missing"


def test_a_rejection_is_over_once_its_episode_was_cleared_and_another_begins_anew(engine: Engine) -> None:
    def listed() -> list[str]:
        with Session(engine) as session:
            return [row.reason for row in session.exec(select(RejectedEventFile))]

    # The clocks of two processes differ, so a rejection may seem to be later than its end.
    apply_said(engine, said(rejected(episode=1), 2), said(cleared(episode=1), 1))
    assert listed() == []
    apply_said(engine, said(rejected(episode=2), 3))
    assert listed() == ["it is not JSON"]


# --- from the stream


def test_what_waits_in_the_stream_is_recorded_and_acknowledged(engine: Engine, event_log: EventLog) -> None:
    events = [announced(position=number) for number in range(7)]
    for event in events:
        event_log.append(LogEvent.of(ingested(event), "test"))
    event_log.read(GROUP, "crashed-once", count=3, wait_seconds=0.1)

    # The consumer that crashed comes back: it goes on with what it holds.
    assert record_waiting(event_log, engine, "crashed-once", limit=2) == 7

    assert len(rows(engine)["Timestep"]) == 7
    backlog = event_log.backlog(GROUP)
    assert (backlog.waiting, backlog.in_progress, backlog.set_aside) == (0, 0, 0)
    assert record_waiting(event_log, engine, "crashed-once", limit=2) == 0


def test_what_another_consumer_left_lying_is_taken_over(
    engine: Engine, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_log.append(LogEvent.of(ingested(announced()), "test"))
    event_log.read(GROUP, "gone-for-ever", count=1, wait_seconds=0.1)
    assert record_waiting(event_log, engine, "other", limit=10) == 0
    monkeypatch.setattr(flows.record, "TAKE_OVER_SECONDS", 0)
    assert record_waiting(event_log, engine, "other", limit=10) == 1


def test_poison_is_set_aside_and_the_others_go_on(engine: Engine, event_log: EventLog) -> None:
    good = [announced(position=number) for number in range(4)]
    event_log.append(LogEvent.of(ingested(good[0]), "test"))
    event_log.redis.xadd(event_log.stream, {"event": "no JSON"})
    event_log.append(LogEvent.of(ingested(good[1]), "test"))
    event_log.redis.xadd(event_log.stream, {"something": "else"})
    event_log.append(LogEvent.of(failed(announced(), reason="a reason with \0 in it"), "test"))
    event_log.append(LogEvent.of(archived("x" * 3_000 + str(list(range(2_000)))), "test"))
    event_log.append(LogEvent.of(ingested(good[2]), "test"))
    event_log.append(LogEvent.of(uploaded(good[3]), "test"))

    assert record_waiting(event_log, engine, "consumer", limit=100) == 4

    assert {row["position"] for row in rows(engine)["Timestep"]} == {0, 1, 2, 3}
    backlog = event_log.backlog(GROUP)
    assert (backlog.waiting, backlog.in_progress, backlog.set_aside) == (0, 0, 4)
    letters: Any = event_log.redis.xrange(f"{event_log.stream}:dead-letter:{GROUP}")
    reasons = " | ".join(fields["reason"] for _, fields in letters)
    for cause in ("not an event of ours", "no field 'event'", "0x00", "index row"):
        assert cause in reasons


def test_a_database_that_is_away_is_no_poison(event_log: EventLog, engine: Engine) -> None:
    event_log.append(LogEvent.of(ingested(announced()), "test"))
    away = create_engine(Settings(database_url=SecretStr("postgresql://nobody@127.0.0.1:1/none")))
    with pytest.raises(OperationalError):
        record_waiting(event_log, away, "consumer", limit=10)
    backlog = event_log.backlog(GROUP)
    assert (backlog.in_progress, backlog.set_aside) == (1, 0)
    assert record_waiting(event_log, engine, "consumer", limit=10) == 1


def test_a_database_without_tables_is_no_poison(event_log: EventLog, empty_database_url: str) -> None:
    event_log.append(LogEvent.of(ingested(announced()), "test"))
    engine = create_engine(Settings(database_url=SecretStr(empty_database_url)))
    with pytest.raises(ProgrammingError):
        record_waiting(event_log, engine, "consumer", limit=10)
    assert event_log.backlog(GROUP).set_aside == 0


@pytest.mark.parametrize("step", ["keep_history", "_keep_images", "_derive_archived"])
def test_a_connection_that_breaks_off_leaves_the_entries_pending(
    event_log: EventLog, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    unbroken = getattr(flows.apply, step)

    def break_off(session: Session, *arguments: object) -> object:
        pid = session.connection().exec_driver_sql("select pg_backend_pid()").scalar_one()
        with psycopg.connect(database_url, autocommit=True) as other:
            other.execute("select pg_terminate_backend(%s)", (pid,))
        return unbroken(session, *arguments)

    for number in range(3):
        event_log.append(LogEvent.of(uploaded(announced(position=number)), "test"))
    with monkeypatch.context() as patch:
        patch.setattr(flows.apply, step, break_off)
        with pytest.raises((OperationalError, psycopg.OperationalError)):
            record_waiting(event_log, engine, "consumer", limit=10)
    assert event_log.backlog(GROUP).set_aside == 0
    assert record_waiting(event_log, engine, "consumer", limit=10) == 3


def test_everything_is_found_in_the_settings(engine: Engine, event_log: EventLog, settings: Settings) -> None:
    event_log.append(LogEvent.of(ingested(announced()), "test"))
    assert record(settings, "state-manager-1", limit=500) == 1
    assert len(rows(engine)["Timestep"]) == 1


def test_a_notice_of_an_archive_is_not_about_an_object_that_came_later(engine: Engine) -> None:
    event = announced()
    first, other = uploaded(event), uploaded(event, sha256="cd" * 32, etag="another")
    late = uploaded(event, sha256="cd" * 32, etag="another", modified_at=NOON + timedelta(seconds=6))
    told = [said(ingested(event)), said(first, 1), said(archived(event.key), 2)]
    late_notice = said(archived(event.key, job=2), 5)
    tagged, tagged_before = (said(archived(event.key, job=3, etag=etag), 5) for etag in (other.etag, first.etag))
    for events, archived_at in (
        (told, 2),
        ([*told, said(uploaded(event, sha256=None), 3)], 2),  # the same, found in the bucket
        ([*told, said(other, 3)], None),
        ([*told, said(other, 3), late_notice], None),  # it does not say which of the two
        ([*told, said(other, 3), late_notice, tagged_before], None),
        ([*told, said(other, 3), late_notice, tagged], 5),
        ([*told, said(late, 3), tagged], None),  # the store's clock says that it came after the notice
    ):
        for order in (events, events[::-1]):
            empty(engine)
            for one in order:
                with Session(engine) as session, session.begin():
                    apply_events(session, delivered(one))
            (row,) = rows(engine)["Timestep"]
            assert row["archived_at"] == (None if archived_at is None else NOON + timedelta(seconds=archived_at))
