"""Who may read, who may announce archives, and what an error may say."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine, text

from api.app import create_app
from api.deps import Services
from api.webhook import MAX_BODY_BYTES, known_timesteps
from blocks.event_log import EventLog
from blocks.messages import Archived
from blocks.object_store import ObjectStore
from blocks.settings import MissingSetting, Settings
from blocks.surf_archiver import Reading, read_notice
from flows.record import record_waiting
from tests.events import announced, archived, failed, ingested, rejected, uploaded
from tests.gateway import problem, record
from tests.served_api import served

TOKEN = "read-only-token-of-the-tests"
WEBHOOK_TOKEN = "token-of-surf-archiver-in-the-tests"
WEBHOOK = "/api/1/webhooks/surf-archiver"

READS = [
    "exports",
    "timesteps",
    f"timesteps/{UUID(int=1)}",
    f"timesteps/{UUID(int=1)}/images",
    f"timesteps/{UUID(int=1)}/images/Img/a.tif",
    f"timesteps/{UUID(int=1)}/download",
    "experiments",
    "experiments/20261101_004",
    "archives",
    f"archives/{UUID(int=1)}",
    "rejected",
    "stats/daily",
    "at-risk",
    "status",
]


@pytest.fixture
def guarded(settings: Settings, object_store: ObjectStore, event_log: EventLog) -> Iterator[TestClient]:
    """The gateway with both tokens set."""
    tokens = {"api_token": SecretStr(TOKEN), "webhook_token": SecretStr(WEBHOOK_TOKEN)}
    with TestClient(create_app(settings.model_copy(update=tokens)), raise_server_exceptions=False) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# --- reading


def test_every_read_is_in_the_list(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    reads = {path for path, operations in paths.items() if path.startswith("/api/1/") and "get" in operations}
    assert len(reads) == len(READS)


@pytest.mark.parametrize("path", READS)
def test_reading_needs_the_token(guarded: TestClient, path: str) -> None:
    refused: list[dict[str, str]] = [
        {},
        bearer("wrong"),
        bearer(TOKEN[:-1]),
        bearer(WEBHOOK_TOKEN),
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer"},
        {"Cookie": f"archiver={TOKEN}"},
        {"X-Api-Key": TOKEN},
    ]
    for headers in refused:
        answer = guarded.get(f"/api/1/{path}", headers=headers)
        problem(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in answer.text
    for query in ("token", "access_token", "api_token"):
        problem(guarded.get(f"/api/1/{path}", params={query: TOKEN}), 401)
    assert guarded.get(f"/api/1/{path}", headers=bearer(TOKEN), follow_redirects=False).status_code in (200, 404)


@pytest.mark.parametrize("path", ["/metrics", "/openapi.json", "/docs", "/"])
def test_a_token_in_the_query_opens_nothing(guarded: TestClient, path: str) -> None:
    for query in ("token", "access_token", "api_token", "Authorization"):
        answer = guarded.get(path, params={query: TOKEN}, follow_redirects=False)
        assert answer.status_code == 401
        assert TOKEN not in answer.text
    assert guarded.get(path, headers=bearer(TOKEN)).status_code == (401 if path == "/" else 200)


@pytest.mark.parametrize(
    "path", [*(f"/api/1/{read}" for read in READS), "/", "/docs", "/health", "/metrics", "/nothing"]
)
def test_head_is_answered_like_get(client: TestClient, path: str) -> None:
    get = client.get(path, follow_redirects=False)
    head = client.head(path, follow_redirects=False)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"] if "content-type" in get.headers else True


def test_what_an_address_does_not_take_is_said(guarded: TestClient) -> None:
    for method, path, takes in (
        ("DELETE", "/api/1/timesteps", "GET, HEAD"),
        ("OPTIONS", "/health", "GET, HEAD"),
        ("GET", WEBHOOK, "POST"),
    ):
        answer = guarded.request(method, path)
        assert takes in problem(answer, 405)
        assert answer.headers["allow"] == takes
    for path in ("/nothing", "/api/1/exports/", "//api/1/exports", "/docs/assets/../../../../etc/passwd"):
        assert "/docs" in problem(guarded.get(path, headers=bearer(TOKEN), follow_redirects=False), 404)


def test_a_token_of_odd_characters_is_just_wrong(guarded: TestClient) -> None:
    problem(guarded.get("/api/1/exports", headers={"Authorization": "Bearer tök€n".encode()}), 401)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "archiver.example", ""])
def test_without_a_token_only_this_machine_is_served(settings: Settings, host: str) -> None:
    with pytest.raises(MissingSetting, match="ARCHIVER_API_TOKEN"):
        create_app(settings.model_copy(update={"api_host": host}))
    create_app(settings.model_copy(update={"api_host": host, "api_token": SecretStr(TOKEN)}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_no_token(settings: Settings, host: str) -> None:
    create_app(settings.model_copy(update={"api_host": host}))


@pytest.mark.parametrize(
    ("address", "status"),
    [("192.0.2.1", 403), ("[2001:db8::1]", 403), ("127.0.0.1", 200), ("[::1]", 200), ("[::ffff:127.0.0.1]", 200)],
)
def test_without_a_token_a_server_bound_by_hand_answers_this_machine_only(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, address: str, status: int
) -> None:
    for path in ("/health", "/", "/docs", "/api/1/exports", "/metrics"):
        with TestClient(create_app(settings), base_url=f"http://{address}:8000") as client:
            assert client.get(path).status_code == status
    guarded = create_app(settings.model_copy(update={"api_token": SecretStr(TOKEN)}))
    with TestClient(guarded, base_url=f"http://{address}:8000", headers=bearer(TOKEN)) as client:
        assert client.get("/api/1/exports").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "fastapi.localhost", "LOCALHOST:8000", "127.0.0.1:80", "[::1]:8000")),
        ("archiver.example", 200),
        *((host, 421) for host in ("rebound.example:8000", "localhost.example", "127.0.0.1.example", "192.0.2.1", "[")),
    ],
)
def test_without_a_token_a_page_from_elsewhere_reads_nothing(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, host: str, status: int
) -> None:
    """Its name is an address of this machine, once it was loaded."""
    app = create_app(settings.model_copy(update={"api_url": "https://archiver.example/archiver"}))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        answer = client.get("/api/1/exports", headers={"Host": host})
    assert answer.status_code == status
    if status != 200:
        assert "ARCHIVER_API_URL" in problem(answer, status)


def test_missing_settings_are_named_all_at_once(settings: Settings) -> None:
    with pytest.raises(MissingSetting, match="ARCHIVER_DATABASE_URL, ARCHIVER_REDIS_URL"):
        create_app(settings.model_copy(update={"database_url": None, "redis_url": None}))


# --- the page


def test_the_page_shows_what_there_is(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    broken = announced(experiment_id="broken")
    record(
        engine,
        event_log,
        uploaded(announced(experiment_id="fine")),
        failed(broken, reason="<script>alert(1)</script> & the share is away"),
        rejected("events/<b>.json", reason="it is not JSON"),
    )
    page = client.get("/").text
    for shown in ("fine", "broken", "&lt;script&gt;alert(1)&lt;/script&gt; &amp; the share", "events/&lt;b&gt;.json"):
        assert shown in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://testserver", "")
    assert "https://" not in page
    chosen = client.get("/", params={"state": "failed", "system": "", "experiment": ""}).text
    assert "broken" in chosen
    assert ">fine<" not in chosen
    assert client.get("/", params={"state": "nonsense"}, follow_redirects=False).status_code == 303


def test_the_page_begins_with_what_needs_a_hand(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    record(engine, event_log, uploaded(announced()))
    assert "Nothing needs a hand." in client.get("/").text
    (entry,) = event_log.read("upload-worker", "test", count=1, wait_seconds=0.1)
    event_log.dead_letters("upload-worker").add(entry, "it makes no <sense>")
    record(engine, event_log, failed(announced()), rejected())
    page = client.get("/").text
    assert page.index("Needs a hand") < page.index("1 failed.") < page.index('class="counts"')
    assert "1 event files rejected." in page
    assert "it makes no &lt;sense&gt;" in page


def test_the_page_tells_that_the_database_is_away(
    settings: Settings, object_store: ObjectStore, event_log: EventLog
) -> None:
    away = {"database_url": SecretStr("postgresql://archiver:pa55word@127.0.0.1:1/none")}
    with TestClient(create_app(settings.model_copy(update=away))) as client:
        answer = client.get("/")
    assert answer.status_code == 200
    assert "The database can&#39;t be reached." in answer.text
    assert "pa55word" not in answer.text


def test_a_timestep_has_a_page(settings: Settings, client: TestClient, engine: Engine, event_log: EventLog) -> None:
    event, broken = announced(), announced()
    everything = (ingested(event), uploaded(event), archived(event.key), failed(broken, reason="<b>why</b>"))
    record(engine, event_log, *everything)
    page = client.get(f"/timesteps/{event.timestep_id}").text
    for shown in (event.key, "It was read back.", "timestep.archived", "Img/Img_r00_c01.tif", "/download"):
        assert shown in page
    assert f"/timesteps/{event.timestep_id}" in client.get("/").text
    assert "&lt;b&gt;why&lt;/b&gt;" in client.get(f"/timesteps/{broken.timestep_id}").text
    for path in (f"/timesteps/{UUID(int=1)}", "/timesteps/none"):
        assert client.get(path).status_code == 404
    guarded = create_app(settings.model_copy(update={"api_token": SecretStr(TOKEN)}))
    with TestClient(guarded) as stranger:
        assert stranger.get(f"/timesteps/{event.timestep_id}").status_code == 401


def test_the_page_goes_back_in_time(client: TestClient, engine: Engine, event_log: EventLog) -> None:
    # No part of a UUID looks like these names.
    record(engine, event_log, *(ingested(announced(experiment_id=f"growth-{number:03}")) for number in range(60)))
    page = client.get("/").text
    cursor = page.split('name="cursor" value="')[1].split('"')[0]
    older = client.get("/", params={"cursor": cursor}).text
    shown = {number for number in range(60) if f"growth-{number:03}" in page}
    assert len(shown) == 50
    assert {number for number in range(60) if f"growth-{number:03}" in older} == set(range(60)) - shown


def test_signing_in_opens_page_and_api_to_this_browser(guarded: TestClient) -> None:
    form = guarded.get("/")
    assert form.status_code == 401
    assert 'action="/sign-in"' in form.text
    assert guarded.post("/sign-in", data={"token": "wrong"}).status_code == 401
    assert guarded.post("/sign-in", content=b"token=" + b"x" * 10_000).status_code == 413
    assert guarded.get("/").status_code == 401

    answer = guarded.post("/sign-in", data={"token": TOKEN}, follow_redirects=False)
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert guarded.get("/").status_code == 200
    assert guarded.get("/api/1/exports").status_code == 200
    problem(guarded.post(WEBHOOK, json=notice()), 401)

    guarded.post("/sign-out")
    assert guarded.get("/").status_code == 401


# --- surf-archiver


def notice(*keys: Any, path: Any = "images/20261101_004/20261123.tar", job: int = 1) -> dict[str, Any]:
    archives = [{"path": path, "src_keys": list(keys)}]
    return {"job_id": str(UUID(int=job)), "date": "2026-11-23", "archives": archives}


def announce(client: TestClient, document: object) -> Any:
    answer = client.post(WEBHOOK, content=json.dumps(document), headers=bearer(WEBHOOK_TOKEN))
    assert answer.status_code == 202, answer.text
    return answer.json()


def test_a_notice_is_appended_and_not_written(
    guarded: TestClient, engine: Engine, event_log: EventLog, settings: Settings
) -> None:
    first, second = announced(), announced()
    record(engine, event_log, uploaded(first), uploaded(second))
    receipt = announce(guarded, notice(first.key, f"{settings.bucket}/{second.key}", "images/no/such.tar"))
    assert receipt == {"matched": [first.key, second.key], "unknown": ["images/no/such.tar"], "refused": []}
    reading = {**bearer(TOKEN)}
    assert guarded.get("/api/1/timesteps?state=archived", headers=reading).json()["count"] == 0

    entries = event_log.read("state-manager", "test", count=10, wait_seconds=0.1)
    events = [entry.decode() for entry in entries]
    assert [(event.type, event.source) for event in events] == [("timestep.archived", "archiver/surf-archiver")] * 3
    assert [event.data.timestep_id for event in events] == [first.timestep_id, second.timestep_id, None]
    assert all(isinstance(event.data, Archived) and event.data.job_id == UUID(int=1) for event in events)
    assert record_waiting(event_log, engine, "test", limit=10, linger_seconds=0.001) == 3
    assert guarded.get("/api/1/timesteps?state=archived", headers=reading).json()["count"] == 2


def test_the_same_notice_again_changes_nothing(guarded: TestClient, engine: Engine, event_log: EventLog) -> None:
    event = announced()
    record(engine, event_log, uploaded(event))
    for _ in range(3):
        assert announce(guarded, notice(event.key, event.key))["matched"] == [event.key]
    assert record_waiting(event_log, engine, "test", limit=10, linger_seconds=0.001) == 1


def test_a_notice_before_the_upload_is_kept(guarded: TestClient, engine: Engine, event_log: EventLog) -> None:
    event = announced()
    assert announce(guarded, notice(event.key))["unknown"] == [event.key]
    record(engine, event_log, uploaded(event))
    timestep = guarded.get(f"/api/1/timesteps/{event.timestep_id}", headers=bearer(TOKEN)).json()
    assert timestep["state"] == "archived"
    assert sorted(said["type"] for said in timestep["history"]) == ["timestep.archived", "timestep.uploaded"]


def test_entries_that_make_no_sense_do_not_cost_the_others(
    guarded: TestClient, engine: Engine, event_log: EventLog
) -> None:
    event = announced()
    record(engine, event_log, uploaded(event))
    document = notice("", 42, None, "nul\0", "x" * 2000, event.key)
    document["archives"].append({"path": "half a pair \ud800", "src_keys": ["images/a.tar"]})
    document["archives"] += [{"path": "", "src_keys": ["a"]}, {"src_keys": []}, "nonsense", {"path": "p"}, None]
    document["archives"].append({"path": "/tape/2.tar", "src_keys": "no list"})
    document["archives"].append({"path": "/tape/3.tar", "src_keys": ["images/of/another.tar"]})
    receipt = announce(guarded, document)
    assert receipt["matched"] == [event.key]
    assert receipt["unknown"] == ["images/of/another.tar"]
    assert len(receipt["refused"]) == 12
    assert receipt["refused"][0].startswith("archives.0.src_keys.0: ")


def test_a_bucket_may_have_the_name_of_a_prefix(
    settings: Settings, object_store: ObjectStore, event_log: EventLog
) -> None:
    update = {"bucket": "images", "webhook_token": SecretStr(WEBHOOK_TOKEN)}
    with TestClient(create_app(settings.model_copy(update=update))) as client:
        receipt = announce(client, notice("images/e/d/t.tar", "images/images/e/d/u.tar", "elsewhere/images/e/d/v.tar"))
    assert receipt["unknown"] == ["images/e/d/t.tar", "images/e/d/u.tar", "elsewhere/images/e/d/v.tar"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"42",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"job_id": "x", "date": "2026-11-23", "archives": []}',
        json.dumps({**notice(), "date": "today"}).encode(),
        json.dumps({**notice(), "archives": {}}).encode(),
        json.dumps({**notice(), "archives": "all"}).encode(),
    ],
)
def test_what_is_no_notice_is_refused(guarded: TestClient, content: bytes, event_log: EventLog) -> None:
    problem(guarded.post(WEBHOOK, content=content, headers=bearer(WEBHOOK_TOKEN)), 400)
    assert event_log.redis.xlen(event_log.stream) == 0


def test_the_webhook_needs_its_token(guarded: TestClient, event_log: EventLog) -> None:
    for headers in ({}, bearer("wrong"), bearer(TOKEN), {"Authorization": WEBHOOK_TOKEN}):
        answer = guarded.post(WEBHOOK, json=notice("a"), headers=headers)
        problem(answer, 401)
        assert WEBHOOK_TOKEN not in answer.text
    problem(guarded.post(WEBHOOK, json=notice("a"), params={"token": WEBHOOK_TOKEN}), 401)
    assert event_log.redis.xlen(event_log.stream) == 0


def test_the_webhook_is_closed_without_a_token(client: TestClient) -> None:
    assert "ARCHIVER_WEBHOOK_TOKEN" in problem(client.post(WEBHOOK, json=notice("a"), headers=bearer("")), 503)


def test_a_notice_has_an_end(guarded: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 65536 + 2):
            yield b" " * 65536

    problem(guarded.post(WEBHOOK, content=endless(), headers=bearer(WEBHOOK_TOKEN)), 413)


@pytest.mark.parametrize("path", ["/sign-in", WEBHOOK])
def test_what_is_sent_too_slowly_or_breaks_off_holds_nothing_up(
    settings: Settings,
    object_store: ObjectStore,
    event_log: EventLog,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    path: str,
) -> None:
    monkeypatch.setattr("api.body.MOST_SECONDS", 0.5)
    tokens = {"api_token": SecretStr(TOKEN), "webhook_token": SecretStr(WEBHOOK_TOKEN)}
    with served(settings.model_copy(update=tokens)) as url:
        address = urlsplit(url)
        headers = f"Host: here\r\nContent-Length: 100\r\nAuthorization: Bearer {WEBHOOK_TOKEN}\r\n\r\n"
        head = f"POST {path} HTTP/1.1\r\n{headers}"
        with socket.create_connection((address.hostname, address.port), timeout=10) as slow:
            slow.sendall(head.encode() + b"{")
            answer = b""
            while received := slow.recv(4096):  # until the server hangs up
                answer += received
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"application/problem+json" in answer
        with socket.create_connection((address.hostname, address.port), timeout=10) as short:
            short.sendall(head.encode() + b"{")
        assert httpx.get(f"{url}/health").status_code == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert event_log.redis.xlen(event_log.stream) == 0


def test_of_more_keys_than_a_statement_has_parameters_each_known_one_is_found(
    settings: Settings, engine: Engine, event_log: EventLog
) -> None:
    event = announced()
    record(engine, event_log, uploaded(event))
    services = Services.from_settings(settings)
    keys = [*(f"images/{number}.tar" for number in range(70_000)), event.key]
    assert known_timesteps(keys, services) == {event.key: event.timestep_id}
    services.close()


def test_a_long_notice_keeps_nobody_waiting(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, answered = threading.Event(), threading.Event()

    def read_slowly(content: bytes, bucket: str) -> Reading:
        reading.set()
        assert answered.wait(20)
        return read_notice(content, bucket)

    monkeypatch.setattr("api.webhook.read_notice", read_slowly)
    tokens = {"webhook_token": SecretStr(WEBHOOK_TOKEN)}
    keys = [f"images/{number}.tar" for number in range(1200)]
    with served(settings.model_copy(update=tokens)) as url, ThreadPoolExecutor(1) as thread:
        sent = thread.submit(httpx.post, url + WEBHOOK, json=notice(*keys), headers=bearer(WEBHOOK_TOKEN), timeout=30)
        assert reading.wait(20)
        assert httpx.get(f"{url}/health", timeout=10).status_code == 200
        answered.set()
        assert sent.result(30).json() == {"matched": [], "unknown": keys, "refused": []}
    assert event_log.redis.xlen(event_log.stream) == len(keys)


def test_a_notice_is_kept_while_the_database_is_away(
    settings: Settings, object_store: ObjectStore, event_log: EventLog
) -> None:
    away = {
        "database_url": SecretStr("postgresql://archiver:pa55word@127.0.0.1:1/none"),
        "webhook_token": SecretStr(WEBHOOK_TOKEN),
    }
    with TestClient(create_app(settings.model_copy(update=away)), raise_server_exceptions=False) as client:
        assert announce(client, notice("images/a.tar"))["unknown"] == ["images/a.tar"]
        answer = client.get("/api/1/exports")
        assert "database" in problem(answer, 503)
        assert "pa55word" not in answer.text
    assert event_log.redis.xlen(event_log.stream) == 1


@pytest.mark.parametrize("trouble", ["no tables", "locked by a migration", "all connections are taken"])
def test_a_notice_is_kept_whatever_the_database_does(
    settings: Settings,
    object_store: ObjectStore,
    engine: Engine,
    event_log: EventLog,
    empty_database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    monkeypatch.setattr("api.webhook.LOOK_UP_SECONDS", 1)
    monkeypatch.setattr("api.deps.DATABASE_SECONDS", 0.2)
    update = {"webhook_token": SecretStr(WEBHOOK_TOKEN)}
    if trouble == "no tables":
        update["database_url"] = SecretStr(empty_database_url)
    app = create_app(settings.model_copy(update=update))
    with ExitStack() as held:
        client = held.enter_context(TestClient(app, raise_server_exceptions=False))
        if trouble == "locked by a migration":
            held.enter_context(engine.begin()).execute(text("lock table timestep in access exclusive mode"))
        elif trouble == "all connections are taken":
            while (pool := app.state.services.engine.pool).checkedout() < pool.size() + pool._max_overflow:
                held.enter_context(app.state.services.engine.connect())
            for path in ("/api/1/exports", f"/api/1/timesteps/{uuid4()}"):
                assert "database" in problem(client.get(path), 503)
            assert client.get("/api/1/status").json()["problems"] == ["The database can't be reached."]
        assert announce(client, notice("images/a.tar"))["unknown"] == ["images/a.tar"]
    assert event_log.redis.xlen(event_log.stream) == 1


# --- operating


def test_alive_and_ready(client: TestClient, guarded: TestClient) -> None:
    for one in (client, guarded):
        assert one.get("/health").json() == {"status": "alive"}
        answer = one.get("/ready")
        assert answer.status_code == 503
        checks = answer.json()["checks"]
        assert {name for name, check in checks.items() if check["ok"]} == {"database", "stream", "storage"}
        assert checks["prefect"]["reason"] == "PREFECT_API_URL is not set"


def test_a_service_that_hangs_is_told_in_time_and_asked_once(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.health.CHECK_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        update = {"prefect_api_url": f"http://127.0.0.1:{silent.getsockname()[1]}/api"}
        with TestClient(create_app(settings.model_copy(update=update)), raise_server_exceptions=False) as client:
            for _ in range(3):
                begin = time.monotonic()
                checks = client.get("/ready").json()["checks"]
                assert time.monotonic() - begin < 4
                assert checks["prefect"] == {"ok": False, "reason": "no answer within 0.5 s"}
                assert checks["database"]["ok"]
        silent.settimeout(0.2)
        silent.accept()
        with pytest.raises(TimeoutError):
            silent.accept()


def test_a_storage_that_hangs_keeps_nobody_from_the_status(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.deps.STORE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        update = {"aws_endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        with TestClient(create_app(settings.model_copy(update=update)), raise_server_exceptions=False) as client:
            for path in ("/api/1/status", "/api/1/at-risk", "/metrics", "/"):
                begin = time.monotonic()
                assert client.get(path).status_code == 200
                assert time.monotonic() - begin < 5


def test_what_is_missing_is_said_without_secrets(
    settings: Settings, object_store: ObjectStore, empty_database_url: str, redis_url: str
) -> None:
    update = {"database_url": SecretStr(empty_database_url), "bucket": f"no-such-{uuid4().hex[:8]}"}
    app = create_app(settings.model_copy(update={**update, "prefect_api_url": "http://127.0.0.1:1/api"}))
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/ready")
    assert answer.status_code == 503
    checks = answer.json()["checks"]
    assert not answer.json()["ready"]
    assert "archiver init" in checks["database"]["reason"]
    assert "does not exist" in checks["storage"]["reason"]
    assert checks["stream"]["reason"]
    assert checks["prefect"]["reason"]
    assert "test-secret" not in answer.text


def test_the_api_describes_itself(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            if path.startswith("/api/1/"):
                assert operation["description"], path
                assert "application/problem+json" in operation["responses"]["401"]["content"], path


def test_a_fault_of_the_server_tells_nothing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr("api.routes.timesteps.fetch_page", broken)
    answer = client.get("/api/1/timesteps")
    problem(answer, 500)
    assert "hunter2" not in answer.text
