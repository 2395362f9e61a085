"""Nothing secret gets out, into no log, no answer and no page: least of all when what needs the secret fails."""

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import Engine

from blocks.event_log import EventLog
from blocks.logs import log_as_json
from blocks.object_store import ObjectStore
from blocks.settings import InvalidSetting, Settings, get_settings
from tests.events import announced, ingested, rejected, uploaded
from tests.gateway import record
from tests.served_api import served

# Each can be told from all else, and from the others.
SECRETS = {
    name: f"Xq9-{name}-3f7c1e"
    for name in ("database", "redis", "rabbitmq", "storage", "webhook", "reader", "prefect", "sent")
}
PATHS = [
    *("/", "/docs", "/openapi.json", "/metrics", "/health", "/ready", "/nothing", f"/timesteps/{UUID(int=1)}"),
    *("/api/1/status", "/api/1/exports", "/api/1/timesteps?cursor=x", "/api/1/timesteps?position=x", "/api/1/archives"),
    *(f"/api/1/timesteps/{UUID(int=1)}", "/api/1/experiments/none", "/api/1/rejected", "/api/1/at-risk"),
]
WEBHOOK = "/api/1/webhooks/surf-archiver"


def secrets_in(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text]


@pytest.fixture
def logs() -> Iterator[io.StringIO]:
    """All that the API logs, and its libraries. What asks it in these tests is silent."""
    root, asking = logging.getLogger(), logging.getLogger("httpx")
    before = (list(root.handlers), root.level, asking.level)
    stream = io.StringIO()
    log_as_json(stream)
    root.setLevel(logging.INFO)
    asking.setLevel(logging.WARNING)
    yield stream
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    asking.setLevel(before[2])


def with_secrets(settings: Settings, **more: object) -> Settings:
    tokens = {"api_token": SecretStr(SECRETS["reader"]), "webhook_token": SecretStr(SECRETS["webhook"])}
    keys = {"aws_secret_access_key": SecretStr(SECRETS["storage"])}
    return settings.model_copy(update={**tokens, **keys, "prefect_api_url": "http://127.0.0.1:1/api", **more})


def answers_of(url: str, paths: list[str]) -> str:
    """Everything that the API answers to good requests and bad ones, with headers."""
    said = []
    reader = {"Authorization": f"Bearer {SECRETS['reader']}"}
    announcer = {"Authorization": f"Bearer {SECRETS['webhook']}"}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        answers = [client.get(path, headers=headers) for path in paths for headers in ({}, reader, announcer)]
        answers += [client.get(f"/api/1/exports?{name}={SECRETS['reader']}") for name in ("token", "cursor", "system")]
        wrong = {"Authorization": f"Bearer {SECRETS['sent']}"}
        for content in (b"{", b"[]", f'{{"job_id": "{SECRETS["sent"]}"}}'.encode(), b"x" * (9 << 20)):
            answers += [client.post(WEBHOOK, content=content, headers=headers) for headers in ({}, wrong, announcer)]
        answers.append(client.post("/sign-in", data={"token": SECRETS["sent"]}))
        answers.append(client.post("/sign-in", data={"token": SECRETS["reader"]}))
        for answer in answers:
            said.append(f"{answer.status_code} {answer.headers} {answer.text}")
    return "\n".join(said)


def test_no_answer_and_no_log_holds_a_secret(
    settings: Settings, object_store: ObjectStore, engine: Engine, event_log: EventLog, logs: io.StringIO
) -> None:
    event = announced(UUID(int=1))
    record(engine, event_log, ingested(event), uploaded(event), rejected())
    with served(with_secrets(settings)) as url:
        answers = answers_of(url, PATHS)
    assert "200 " in answers
    assert secrets_in(answers) == []
    assert "uvicorn.access" in logs.getvalue()
    assert secrets_in(logs.getvalue()) == []


@pytest.mark.long
def test_no_answer_and_no_log_holds_a_secret_when_nothing_lets_us_in(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, logs: io.StringIO
) -> None:
    redis = urlsplit(settings.redis_url.get_secret_value() if settings.redis_url else "")
    shut = {
        "database_url": SecretStr(f"postgresql://archiver:{SECRETS['database']}@127.0.0.1:1/none"),
        "redis_url": SecretStr(f"redis://nobody:{SECRETS['redis']}@{redis.netloc}/0"),
        "aws_endpoint_url": "http://127.0.0.1:1",
    }
    with served(with_secrets(settings, **shut)) as url:
        answers = answers_of(url, ["/", "/ready", "/api/1/status", "/api/1/exports"])
    assert "can't be reached" in answers
    assert "invalid username-password pair" in logs.getvalue()
    assert secrets_in(answers) == []
    assert secrets_in(logs.getvalue()) == []


@pytest.mark.parametrize(
    "address",
    [
        "redis://:{secret}/x@127.0.0.1:6379/0",
        "redis://user:{secret}#x@127.0.0.1/0",
        "redis://user:{secret}[@127.0.0.1/0",
        "postgresql://user@127.0.0.1:{secret}/name",
        "amqp://user:pass@127.0.0.1:0/{secret}",
    ],
)
@pytest.mark.parametrize("setting", ["database_url", "redis_url", "rabbitmq_url"])
def test_an_address_that_would_be_taken_apart_in_its_password_is_refused_without_it(
    monkeypatch: pytest.MonkeyPatch, setting: str, address: str
) -> None:
    value = address.format(secret=SECRETS["redis"])
    monkeypatch.setenv(Settings.variable(setting), value)
    with closing(_Uncached()), pytest.raises(InvalidSetting, match=Settings.variable(setting)) as refused:
        get_settings()
    assert secrets_in(str(refused.value)) == []
    assert refused.value.__suppress_context__
    with pytest.raises(ValidationError) as invalid:
        Settings.model_validate({setting: value})
    assert secrets_in(str(invalid.value)) == []


@pytest.mark.parametrize("setting", ["api_url", "aws_endpoint_url", "prefect_api_url", "prefect_ui_url"])
def test_an_address_that_is_shown_has_no_password(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv(Settings.variable(setting), f"https://archiver:{SECRETS['prefect']}@somewhere.example/api")
    with closing(_Uncached()), pytest.raises(InvalidSetting, match="PREFECT_API_AUTH_STRING") as refused:
        get_settings()
    assert Settings.variable(setting) in str(refused.value)
    assert secrets_in(str(refused.value)) == []


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("aws_endpoint_url", "s3.example.org", "http:// or https://"),
        ("aws_endpoint_url", "https:///", "names no host"),
        ("aws_endpoint_url", "http://user:{secret}/x@s3.example.org", "it is no address"),
        ("prefect_api_url", "prefect:4200/api", "http:// or https://"),
        ("database_url", "archiver:{secret}@postgres/archiver", "postgresql://"),
        ("database_url", "mysql://archiver:{secret}@postgres/archiver", "postgresql://"),
        ("redis_url", "redis:6379", "redis:// or rediss:// or unix://"),
        ("redis_url", "http://:{secret}@redis:6379", "redis:// or rediss:// or unix://"),
        ("rabbitmq_url", "archiver:{secret}@rabbitmq", "amqp:// or amqps://"),
    ],
)
def test_an_address_of_another_kind_of_service_is_refused_without_it(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(Settings.variable(setting), value.format(secret=SECRETS["redis"]))
    with closing(_Uncached()), pytest.raises(InvalidSetting, match=reason) as refused:
        get_settings()
    assert str(refused.value).startswith(f"{Settings.variable(setting)}: ")
    assert secrets_in(str(refused.value)) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("database_url", "postgresql+psycopg://archiver@/archiver?host=/run/postgresql"),
        ("redis_url", "unix:///run/redis.sock?db=1"),
        ("redis_url", "rediss://:p%2Fw@redis"),
        ("rabbitmq_url", "amqps://archiver:p%2Fw@rabbitmq:5671/"),
    ],
)
def test_every_form_of_an_address_that_its_client_takes_is_taken(setting: str, value: str) -> None:
    assert getattr(Settings.model_validate({setting: value}), setting).get_secret_value() == value


class _Uncached:
    """Settings that are read anew, before and after."""

    def __init__(self) -> None:
        get_settings.cache_clear()

    def close(self) -> None:
        get_settings.cache_clear()


@pytest.mark.soak
def test_no_process_prints_a_secret_when_nothing_lets_it_in(tmp_path: Path, redis_url: str) -> None:
    """Neither the entrypoints nor the commands, also not in a traceback."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("ARCHIVER_", "AWS_", "PREFECT_"))
    }
    (tmp_path / "data" / "prince" / "events").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = inherited | {
        "ARCHIVER_HOME": str(tmp_path / "home"),
        "ARCHIVER_DATA_DIR": str(tmp_path / "data"),
        "ARCHIVER_API_PORT": str(port),
        "ARCHIVER_API_URL": "http://127.0.0.1:1",
        "ARCHIVER_DATABASE_URL": f"postgresql://archiver:{SECRETS['database']}@127.0.0.1:1/none",
        "ARCHIVER_REDIS_URL": f"redis://nobody:{SECRETS['redis']}@{urlsplit(redis_url).netloc}/0",
        "ARCHIVER_RABBITMQ_URL": f"amqp://archiver:{SECRETS['rabbitmq']}@127.0.0.1:1/",
        "ARCHIVER_WEBHOOK_TOKEN": SECRETS["webhook"],
        "ARCHIVER_API_TOKEN": SECRETS["reader"],
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRETS["storage"],
        "PREFECT_API_URL": "http://127.0.0.1:1/api",
        "PREFECT_API_AUTH_STRING": f"admin:{SECRETS['prefect']}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
    }
    commands = ["api", "event-ingester", "upload-worker", "state-manager", "init --check"]
    outputs = {command: tmp_path / f"{command}.log" for command in commands}
    processes = {}
    for command, output in outputs.items():
        arguments = [sys.executable, "-m", "flows.cli", *command.split()]
        with output.open("wb") as log:
            processes[command] = subprocess.Popen(arguments, env=env, stdout=log, stderr=log)
    try:
        assert processes["init --check"].wait(120) != 0
        deadline = time.monotonic() + 60
        for command in ("event-ingester", "upload-worker", "state-manager"):
            while "Waiting for the Prefect server" not in outputs[command].read_text():
                assert time.monotonic() < deadline, outputs[command].read_text()
                time.sleep(0.2)
        time.sleep(5)  # in which they meet the others
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    said = {command: output.read_text() for command, output in outputs.items()}
    assert all(said.values()), said
    assert {command: found for command, text in said.items() if (found := secrets_in(text))} == {}
