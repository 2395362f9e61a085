"""The commands for a laptop, against the API behind a real socket and objects in a real bucket."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from blocks.bundle import Bundle
from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.messages import LogEvent
from blocks.object_store import ObjectStore
from blocks.retry import Patience
from blocks.settings import Settings, get_settings
from flows.cli import main
from flows.client.download import Downloader, DownloadError
from flows.client.gateway import Gateway, RemoteTimestep
from tests.events import announced, archived, failed, ingested, uploaded
from tests.faulty_proxy import FaultyProxy, Refuse, Truncate
from tests.gateway import record
from tests.served_api import served

TOKEN = "read-only-token-of-the-tests"

Command = Callable[..., tuple[int, str, str]]
Send = Callable[..., ImagingEvent]


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    """Before the object storage, for what the clients read."""
    with FaultyProxy.before(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def api_url(settings: Settings, proxy: FaultyProxy, object_store: ObjectStore, event_log: EventLog) -> Iterator[str]:
    guarded = {"api_token": SecretStr(TOKEN), "aws_endpoint_url": proxy.url}
    with served(settings.model_copy(update=guarded)) as url:
        yield url


@pytest.fixture
def archiver(
    settings: Settings, api_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run a command that knows nothing but the API's address and the token."""
    monkeypatch.setenv("ARCHIVER_API_URL", api_url)
    monkeypatch.setenv("ARCHIVER_API_TOKEN", TOKEN)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> tuple[int, str, str]:
        get_settings.cache_clear()
        monkeypatch.setattr(sys, "argv", ["archiver", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    yield run
    get_settings.cache_clear()


@pytest.fixture
def send(tmp_path: Path, object_store: ObjectStore, engine: Engine, event_log: EventLog) -> Send:
    """Upload a timestep of 3 MB and have it recorded."""

    def send(sha256: str | None = "", **fields: Any) -> ImagingEvent:
        event = announced(img_count=1, **fields)
        source = tmp_path / "source" / event.timestep_id.hex
        (source / "Img").mkdir(parents=True)
        (source / "Img" / "a.tif").write_bytes(random.Random(event.timestep_id.int).randbytes(3_000_000))
        stored = object_store.upload(Bundle.of(source, b"{}"), event.key, event.timestep_id)
        facts: dict[str, Any] = {"size": stored.size, "etag": stored.etag, "images": stored.images}
        facts |= {"sha256": stored.sha256 if sha256 == "" else sha256, "bucket": object_store.bucket_name}
        record(engine, event_log, ingested(event), uploaded(event, **facts))
        return event

    return send


def remote(api_url: str) -> tuple[Gateway, list[RemoteTimestep]]:
    gateway = Gateway(api_url, TOKEN)
    return gateway, list(gateway.exports({}))


def is_the_object(path: Path, key: str, store: ObjectStore) -> bool:
    head = store.head(key)
    return head is not None and path.read_bytes() == b"".join(store.read_range(key, 0, head.size))


# --- fetch


def test_an_experiment_is_fetched_under_its_keys(
    archiver: Command, send: Send, object_store: ObjectStore, tmp_path: Path, proxy: FaultyProxy
) -> None:
    wanted = [send(experiment_id="here", position=position) for position in range(3)]
    send(experiment_id="elsewhere")
    dest = tmp_path / "fetched"
    code, printed, _ = archiver("fetch", "here", "--dest", str(dest))
    assert code == 0, printed
    assert "3 of 3" in printed
    files = {path for path in dest.rglob("*") if path.is_file()}
    assert files == {dest / event.key for event in wanted}
    assert all(is_the_object(dest / event.key, event.key, object_store) for event in wanted)

    # Again, nothing is read; what was damaged since is.
    (dest / wanted[0].key).write_bytes(b"x" * (dest / wanted[0].key).stat().st_size)
    before = len(proxy.requests)
    assert archiver("fetch", "here", "--dest", str(dest))[0] == 0
    assert len(proxy.requests) == before + 1
    assert is_the_object(dest / wanted[0].key, wanted[0].key, object_store)


def test_one_position_within_a_time(archiver: Command, send: Send, tmp_path: Path) -> None:
    wanted, *_ = [
        send(position=position, timestamp=f"2026-11-23T{hour}:00:00Z")
        for position, hour in ((1, 12), (1, 14), (2, 12), (1, 10))
    ]
    query = ["--position", "1", "--start", "2026-11-23T11:00:00", "--end", "2026-11-23T13:00:00"]
    assert archiver("fetch", wanted.experiment_id, *query, "--dest", str(tmp_path / "dest"))[0] == 0
    assert list((tmp_path / "dest").rglob("*.tar")) == [tmp_path / "dest" / wanted.key]


def test_a_broken_off_download_goes_on_where_it_was(
    api_url: str, send: Send, object_store: ObjectStore, proxy: FaultyProxy, tmp_path: Path
) -> None:
    event = send()
    proxy.plan(Truncate(), "GET", times=2)
    gateway, (timestep,) = remote(api_url)
    here: list[int] = []
    assert Downloader(gateway, tmp_path / "dest", here.append, Patience(5, 0.01, 0.1)).fetch(timestep)
    assert is_the_object(tmp_path / "dest" / event.key, event.key, object_store)
    assert sum(here) == timestep.size
    starts = [ranged(request.head) for request in proxy.seen("GET")]
    assert len(starts) == 3
    assert starts[0] == 0 < starts[1] < starts[2]


def test_a_store_that_is_busy_is_asked_again_but_not_for_ever(
    api_url: str, send: Send, proxy: FaultyProxy, tmp_path: Path
) -> None:
    send()
    gateway, (timestep,) = remote(api_url)
    downloader = Downloader(gateway, tmp_path / "dest", patience=Patience(0.5, 0.01, 0.1))
    proxy.plan(Refuse(503, "SlowDown"), "GET", times=2)
    assert downloader.fetch(timestep)
    (tmp_path / "dest" / timestep.key).unlink()
    proxy.plan(Refuse(503, "SlowDown"), "GET", times=1000)
    with pytest.raises(DownloadError, match=r"gave up after .* the store answers 503"):
        downloader.fetch(timestep)


def test_two_commands_that_fetch_the_same_into_one_directory_do_not_mix(
    api_url: str, send: Send, object_store: ObjectStore, proxy: FaultyProxy, tmp_path: Path
) -> None:
    event = send()
    place = tmp_path / "dest" / event.key
    proxy.plan(Truncate(0.3), "GET", times=3)
    together = Barrier(4)

    def fetch(_number: int) -> bool:
        gateway, (timestep,) = remote(api_url)
        downloader = Downloader(gateway, tmp_path / "dest", patience=Patience(20, 0.01, 0.1))
        together.wait(30)
        return downloader.fetch(timestep)

    with ThreadPoolExecutor(4) as commands:
        fetched = list(commands.map(fetch, range(4)))
    assert sorted(fetched) == [False, False, False, True]
    assert is_the_object(place, event.key, object_store)
    assert list(place.parent.iterdir()) == [place]
    starts = [ranged(request.head) for request in proxy.seen("GET")]
    assert starts == sorted(starts)
    assert len(starts) == 4

    # One that fails leaves to the others what it has.
    place.unlink()
    proxy.plan(Truncate(), "GET")
    proxy.plan(Refuse(404, "NoSuchKey"), "GET")

    def fetch_or_fail(number: int) -> bool | DownloadError:
        try:
            return fetch(number)
        except DownloadError as error:
            return error

    with ThreadPoolExecutor(4) as commands:
        results = list(commands.map(fetch_or_fail, range(4)))
    assert [type(result) for result in results].count(DownloadError) == 1
    assert results.count(True) == 1
    assert is_the_object(place, event.key, object_store)
    assert list(place.parent.iterdir()) == [place]


def ranged(head: bytes) -> int:
    """Where the Range header of a request begins."""
    (line,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"range:"))
    return int(line.partition(b"bytes=")[2].removesuffix(b"-"))


def test_what_is_only_on_tape_is_said_to_be_there(
    api_url: str, send: Send, engine: Engine, event_log: EventLog, object_store: ObjectStore, tmp_path: Path
) -> None:
    event = send()
    record(engine, event_log, archived(event.key, "images/on/tape.tar"))
    gateway, (timestep,) = remote(api_url)
    object_store.client.delete_object(Bucket=object_store.bucket_name, Key=event.key)
    with pytest.raises(DownloadError, match=r"is no longer in the bucket; it is on tape in images/on/tape\.tar"):
        Downloader(gateway, tmp_path / "dest").fetch(timestep)


def test_the_next_command_goes_on_with_what_an_interrupted_one_left(
    api_url: str, send: Send, object_store: ObjectStore, proxy: FaultyProxy, tmp_path: Path
) -> None:
    event = send()
    gateway, (timestep,) = remote(api_url)
    proxy.plan(Truncate(), "GET")
    proxy.plan(Refuse(404, "NoSuchKey"), "GET")
    downloader = Downloader(gateway, tmp_path / "dest")
    with pytest.raises(DownloadError, match="is no longer in the bucket, and no tape has it"):
        downloader.fetch(timestep)
    (part,) = (tmp_path / "dest" / event.key).parent.iterdir()
    fetched = part.stat().st_size
    assert 0 < fetched < timestep.size
    assert downloader.fetch(timestep)
    assert ranged(proxy.seen("GET")[-1].head) == fetched
    assert is_the_object(tmp_path / "dest" / event.key, event.key, object_store)
    assert not part.exists()


def test_what_is_not_as_recorded_fails_and_the_others_come(archiver: Command, send: Send, tmp_path: Path) -> None:
    good = send(experiment_id="here", position=1)
    bad = send(experiment_id="here", position=2, sha256="ab" * 32)
    code, printed, _ = archiver("fetch", "here", "--dest", str(tmp_path / "dest"))
    assert code == 1
    assert str(bad.timestep_id) in printed
    assert "ab" * 32 in printed
    assert "1 of 2" in printed
    assert [path for path in (tmp_path / "dest").rglob("*") if path.is_file()] == [tmp_path / "dest" / good.key]


def test_a_tar_whose_hash_is_not_known_is_proven_by_its_images(
    archiver: Command, send: Send, object_store: ObjectStore, tmp_path: Path
) -> None:
    event = send(sha256=None)
    fetched = tmp_path / "dest" / event.key
    assert archiver("fetch", event.experiment_id, "--dest", str(tmp_path / "dest"))[0] == 0
    content = bytearray(fetched.read_bytes())
    assert is_the_object(fetched, event.key, object_store)
    # It is read again where the file was changed, and only a right one stays.
    content[2_000_000] ^= 1
    fetched.write_bytes(content)
    assert archiver("fetch", event.experiment_id, "--dest", str(tmp_path / "dest"))[0] == 0
    assert is_the_object(fetched, event.key, object_store)


def test_a_damaged_tar_whose_hash_is_not_known_does_not_get_its_name(
    api_url: str, send: Send, object_store: ObjectStore, proxy: FaultyProxy, tmp_path: Path
) -> None:
    event = send(sha256=None)
    gateway, (timestep,) = remote(api_url)
    assert timestep.sha256 is None
    head = object_store.head(event.key)
    assert head is not None
    content = bytearray(b"".join(object_store.read_range(event.key, 0, head.size)))
    content[2_000_000] ^= 1
    object_store.client.put_object(Bucket=object_store.bucket_name, Key=event.key, Body=bytes(content))
    changed = object_store.head(event.key)
    assert changed is not None
    damaged = timestep.model_copy(update={"etag": changed.etag})
    with pytest.raises(DownloadError, match=r"Img/a.tif has the SHA-256"):
        Downloader(gateway, tmp_path / "dest").fetch(damaged)
    assert not [path for path in (tmp_path / "dest").rglob("*") if path.is_file()]


def test_another_object_under_the_key_is_not_mixed_in(
    api_url: str, send: Send, object_store: ObjectStore, tmp_path: Path
) -> None:
    event = send()
    gateway, (timestep,) = remote(api_url)
    object_store.client.put_object(Bucket=object_store.bucket_name, Key=event.key, Body=b"another")
    with pytest.raises(DownloadError, match="another object"):
        Downloader(gateway, tmp_path / "dest").fetch(timestep)


@pytest.mark.parametrize("key", ["../outside.tar", "/etc/passwd", "a/../../outside.tar"])
def test_a_key_does_not_lead_out_of_the_directory(tmp_path: Path, key: str) -> None:
    timestep = RemoteTimestep(
        timestep_id=announced().timestep_id, key=key, size=1, sha256="0" * 64, etag="e", timestamp=announced().timestamp
    )
    with pytest.raises(DownloadError, match="leads out"):
        Downloader(Gateway("http://127.0.0.1:1", None), tmp_path / "dest").fetch(timestep)


def test_nothing_to_fetch_is_said(archiver: Command) -> None:
    code, printed, _ = archiver("fetch", "no-such")
    assert (code, "nothing" in printed) == (1, True)


# --- ls and status


def test_timesteps_are_listed(archiver: Command, engine: Engine, event_log: EventLog) -> None:
    record(
        engine,
        event_log,
        failed(announced(), reason="the share [/red] is away"),
        *(ingested(announced(experiment_id="fine")) for _ in range(3)),
    )
    code, printed, _ = archiver("ls")
    assert code == 0
    assert printed.count("fine") == 3
    assert "failed at upload: the share [/red] is away" in printed
    rows = [json.loads(line) for line in archiver("ls", "fine", "--limit", "2", "--json")[1].splitlines()]
    assert [row["experiment_id"] for row in rows] == ["fine", "fine"]
    assert "There are none." in archiver("ls", "--state", "archived")[1]
    assert "state" in archiver("ls", "--state", "lost")[2]


def test_the_status_says_what_is_away_and_what_was_set_aside(archiver: Command, event_log: EventLog) -> None:
    event_log.append(LogEvent.of(ingested(announced()), "test"))
    (entry,) = event_log.read("upload-worker", "test", count=1, wait_seconds=0.1)
    event_log.dead_letters("upload-worker").add(entry, "it makes no [sense]")
    code, printed, _ = archiver("status")
    assert code == 1
    assert "prefect can't be used: PREFECT_API_URL is not set" in printed
    assert "it makes no [sense]" in printed
    status = json.loads(archiver("status", "--json")[1])
    assert [group["dead_letters"] for group in status["groups"]] == [1, 0]
    assert not status["checks"]["prefect"]["ok"]


# --- what goes wrong


def test_errors_say_what_to_do(archiver: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIVER_API_TOKEN", "wrong")
    code, _, said = archiver("ls")
    assert (code, "set ARCHIVER_API_TOKEN" in said) == (2, True)
    monkeypatch.setenv("ARCHIVER_API_URL", "http://127.0.0.1:1")
    code, _, said = archiver("status")
    assert (code, "can't be reached" in said) == (2, True)
    monkeypatch.delenv("ARCHIVER_API_URL")
    code, _, said = archiver("fetch", "here")
    assert (code, "ARCHIVER_API_URL" in said) == (2, True)
