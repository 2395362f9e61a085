"""What is set aside can be worked on once more; what nobody needs is forgotten, and nothing else."""

from datetime import UTC, datetime, timedelta

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from blocks.backlog import remove_unneeded
from blocks.event_log import Backlog, Entry, EventLog
from blocks.messages import LogEvent
from blocks.settings import Settings, get_settings
from flows.cli import app
from flows.record import GROUP, record_waiting
from flows.replay import replay
from flows.trim import trim
from tests.events import announced, ingested, said


def put_aside(log: EventLog, engine: Engine) -> Entry:
    """An event that the database refuses, as long as it is not mended."""
    with engine.begin() as connection:
        connection.execute(text("alter table timestep add constraint mend check (position <> 13)"))
    log.append(LogEvent.of(ingested(announced(position=13)), "test"))
    log.append(LogEvent.of(ingested(announced(position=14)), "test"))
    assert record_waiting(log, engine, "consumer", 10, linger_seconds=0.001) == 1
    (letter,) = log.dead_letters(GROUP)
    assert "mend" in letter.reason
    return letter.entry


def mend(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("alter table timestep drop constraint mend"))


def positions(engine: Engine) -> set[int]:
    with engine.connect() as connection:
        return set(connection.execute(text("select position from timestep")).scalars())


def test_what_was_set_aside_is_recorded_once_its_cause_is_mended(
    event_log: EventLog, engine: Engine, settings: Settings
) -> None:
    entry = put_aside(event_log, engine)
    (sentence,) = replay(settings)
    assert sentence.startswith(f"given to state-manager again: timestep.ingested {entry.id} of timestep ")
    # It was not mended yet, so it is set aside again.
    assert record_waiting(event_log, engine, "other", 10, linger_seconds=0.001) == 0
    assert event_log.backlog(GROUP) == Backlog(0, 0, 1)

    mend(engine)
    assert len(list(replay(settings, ["1-0"]))) == 0
    assert len(list(replay(settings, [entry.id]))) == 1
    assert event_log.has_work(GROUP)
    assert record_waiting(event_log, engine, "other", 10, linger_seconds=0.001) == 1
    assert positions(engine) == {13, 14}
    assert event_log.backlog(GROUP) == Backlog(0, 0, 0)
    assert event_log.backlog("upload-worker").waiting == 2  # other groups don't notice


def test_a_letter_whose_entry_is_gone_is_kept_until_it_is_discarded(
    event_log: EventLog, engine: Engine, settings: Settings
) -> None:
    entry = put_aside(event_log, engine)
    event_log.redis.xdel(event_log.stream, entry.id)
    (sentence,) = replay(settings)
    assert sentence.startswith(f"kept timestep.ingested {entry.id}")
    assert event_log.backlog(GROUP) == Backlog(0, 0, 1)
    (sentence,) = replay(settings, discard=True)
    assert sentence.startswith(f"discarded timestep.ingested {entry.id}")
    assert event_log.backlog(GROUP) == Backlog(0, 0, 0)


def test_the_command_says_what_it_did(
    event_log: EventLog, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.redis_url is not None
    monkeypatch.setenv("ARCHIVER_REDIS_URL", settings.redis_url.get_secret_value())
    get_settings.cache_clear()
    try:
        assert CliRunner().invoke(app, ["replay"]).output == "nothing is set aside\n"
        entry = put_aside(event_log, engine)
        assert (
            f"given to state-manager again: timestep.ingested {entry.id}" in CliRunner().invoke(app, ["replay"]).output
        )
    finally:
        get_settings.cache_clear()


# --- forgetting

NUMBERS = st.integers(1, 12)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_only_what_is_old_and_needed_by_nobody_is_removed(event_log: EventLog, data: st.DataObject) -> None:
    log = event_log
    log.redis.flushall()
    log.ensure_groups()
    log.redis.xgroup_create(log.stream, "somebody-else", id="0")
    all_ids = [f"{1000 * number}-0" for number in range(1, 13)]
    for id in all_ids:
        log.redis.xadd(log.stream, {"event": "x"}, id=id)
    needed: set[str] = set()
    for group in ("upload-worker", "state-manager", "somebody-else"):
        taken = data.draw(st.integers(0, 12), label=f"taken by {group}")
        if taken:
            log.redis.xreadgroup(group, "one", {log.stream: ">"}, count=taken)
        unfinished = data.draw(st.sets(NUMBERS, max_size=2), label=f"unfinished by {group}")
        finished = [id for number, id in enumerate(all_ids[:taken], 1) if number not in unfinished]
        if finished:
            log.redis.xack(log.stream, group, *finished)
        needed |= set(all_ids) - set(finished)
    if letter := data.draw(st.none() | st.sampled_from(all_ids), label="set aside"):
        log.dead_letters(GROUP).add(Entry(letter, {}), "because")
        needed.add(letter)
    before = data.draw(st.integers(0, 13), label="before")
    removed = remove_unneeded(log.redis, log.stream, datetime.fromtimestamp(before, UTC))
    left = [id for id, _ in log.redis.xrange(log.stream)]  # type: ignore[union-attr]
    # A stream is trimmed from its oldest entry on, up to the first that is needed.
    oldest_needed = min((all_ids.index(id) for id in needed), default=12)
    expected = min(oldest_needed, max(0, before - 1))
    if letter:  # acknowledging it is part of setting it aside
        assert letter in left
        assert removed <= max(0, before - 1)
    else:
        assert removed == expected
    assert left == all_ids[removed:]


def test_nothing_is_removed_before_its_time(event_log: EventLog, engine: Engine, settings: Settings) -> None:
    event_log.append(said(ingested(announced())))
    for group in ("upload-worker", "state-manager"):
        (entry,) = event_log.read(group, "one", count=10, wait_seconds=0.01)
        event_log.acknowledge(group, entry.id)
    assert trim(settings) == 0
    assert trim(settings.model_copy(update={"stream_days": 1e-9})) == 1
    assert timedelta(days=settings.stream_days) > timedelta(days=30)


def test_a_group_that_has_never_read_needs_everything(event_log: EventLog, redis_url: str) -> None:
    event_log.append(said(ingested(announced())))
    with redis.Redis.from_url(redis_url) as client:
        client.xgroup_create(event_log.stream, "somebody-else", id="0")
    for group in ("upload-worker", "state-manager"):
        (entry,) = event_log.read(group, "one", count=10, wait_seconds=0.01)
        event_log.acknowledge(group, entry.id)
    assert remove_unneeded(event_log.redis, event_log.stream, datetime.now(UTC) + timedelta(days=1)) == 0
