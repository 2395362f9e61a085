"""`archiver init --check`: what is wrong is said, and what to do."""

import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
from pydantic import SecretStr

from blocks.event_log import EventLog
from blocks.incomplete_uploads import expire_by_rule
from blocks.object_store import ObjectStore
from blocks.settings import Settings, get_settings
from flows.check import Finding, check
from flows.cli import main
from tests.conftest import make_store
from tests.faulty_proxy import Backdate, FaultyProxy, Refuse
from tests.rados_gateway import ACCESS_KEY, SECRET_KEY, RadosGateway

pytest_plugins = ["tests.prefect_server"]


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def found(settings: Settings, entrypoint: str = "init") -> dict[str, Finding]:
    return {finding.about: finding for finding in check(settings, entrypoint)}


def test_nothing_is_wrong_after_init(
    run_settings: Settings,
    event_log: EventLog,
    object_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (cast(Path, run_settings.data_dir) / "prince" / "events").mkdir(parents=True)
    expire_by_rule(object_store.wire, days=7)
    monkeypatch.setattr(sys, "argv", ["archiver", "init", "--check"])

    with pytest.raises(SystemExit) as ended:
        main()

    printed = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert ended.value.code == 0, printed
    for about in ("data directory", "database", "object storage", "clock", "Prefect", "RabbitMQ", "secrets"):
        assert printed[about].rstrip().endswith("good")
    assert "works" in printed["stream"]
    assert "append-only" in printed["stream"]  # which the tests do without
    assert "ARCHIVER_WEBHOOK_TOKEN" in printed["webhook"]


def test_what_init_has_still_to_do_is_wrong(settings: Settings, empty_database_url: str) -> None:
    settings = settings.model_copy(update={"database_url": SecretStr(empty_database_url)})
    findings = found(settings)
    for about, fault in (
        ("data directory", f"there is no directory {settings.data_dir}"),
        ("database", "are still to be applied: `archiver init` does that"),
        ("stream", "is still to be made: `archiver init` does that"),
        ("object storage", "does not exist: `archiver init` does that"),
        ("Prefect", "not set: PREFECT_API_URL"),
    ):
        assert fault in findings[about].fault
    assert "is not there yet" in findings["staging directory"].advice


@pytest.mark.long
def test_services_that_do_not_answer_are_named(settings: Settings, nowhere: str) -> None:
    findings = found(
        settings.model_copy(
            update={
                "database_url": SecretStr(f"postgresql://user:very-secret@{nowhere}/archiver"),
                "redis_url": SecretStr(f"redis://:very-secret@{nowhere}/0"),
                "aws_endpoint_url": f"http://{nowhere}",
            }
        )
    )
    assert "ARCHIVER_DATABASE_URL: " in findings["database"].fault
    assert "ARCHIVER_REDIS_URL: " in findings["stream"].fault
    assert f"at http://{nowhere} can't be reached" in findings["object storage"].fault
    assert "not known" in findings["clock"].advice
    assert "very-secret" not in str(findings)


def test_what_nobody_foresaw_is_a_finding_among_the_others(settings: Settings) -> None:
    # Not even addresses: the settings would refuse them.
    update = {
        "database_url": SecretStr("archiver:very-secret@postgres/archiver"),
        "redis_url": SecretStr("http://:very-secret@redis:6379"),
        "aws_endpoint_url": "very-secret.example.org",
    }
    findings = found(settings.model_copy(update=update))
    for about in ("database", "stream", "object storage", "clock"):
        assert findings[about].fault, about
    assert re.search(r"^\w+Error at \w+\.py:\d+, whose sentence is left out", findings["clock"].fault)
    assert findings["Prefect"].fault == "not set: PREFECT_API_URL"
    assert "very-secret" not in str(findings)


def test_a_key_that_is_not_set_is_named(settings: Settings, object_store: ObjectStore) -> None:
    assert "--abort-incomplete-days" in found(settings)["object storage"].advice
    keyless = settings.model_copy(update={"aws_access_key_id": None})
    assert found(keyless)["object storage"].fault == "not set: AWS_ACCESS_KEY_ID"


def test_keys_that_the_storage_does_not_know_are_told_from_a_missing_bucket(
    settings: Settings, rados_gateway: RadosGateway
) -> None:
    there = {"aws_endpoint_url": rados_gateway.url, "aws_access_key_id": ACCESS_KEY}
    there |= {"bucket": make_store(rados_gateway.url).bucket_name}
    right = settings.model_copy(update=there | {"aws_secret_access_key": SecretStr(SECRET_KEY)})
    assert not found(right)["object storage"].fault
    wrong = settings.model_copy(update=there | {"aws_secret_access_key": SecretStr("another")})
    assert "these credentials may not use it" in str(found(wrong)["object storage"].fault)


@pytest.fixture
def shares(settings: Settings) -> Iterator[Settings]:
    """With directories of a data and a staging directory which others may be let in to, or not."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    # Not below pytest's own directory, which is closed to others.
    with tempfile.TemporaryDirectory(prefix="archiver-check-") as directory:
        Path(directory).chmod(0o711)
        data, staging = Path(directory, "data"), Path(directory, "staging")
        (data / "prince" / "events").mkdir(parents=True)
        staging.mkdir()
        yield settings.model_copy(update={"data_dir": data, "staging_dir": staging})


def as_another(settings: Settings, entrypoint: str = "init") -> dict[str, Finding]:
    found(settings, entrypoint)  # imports, too, what that user may not be able to
    os.seteuid(65534)
    try:
        return found(settings, entrypoint)
    finally:
        os.seteuid(0)


def test_what_the_user_may_not_read_is_named(shares: Settings) -> None:
    data, staging = cast(Path, shares.data_dir), cast(Path, shares.staging_dir)
    (data / "aretha").mkdir(0o700)
    staging.chmod(0o700)
    inside = as_another(shares)
    assert inside["data directory"].fault == f"this user can't read aretha in {data}"
    assert inside["staging directory"].fault == f"this user can't write to {staging}"
    data.parent.chmod(0o700)
    outside = as_another(shares)
    for about, path in (("data directory", data), ("staging directory", staging)):
        assert outside[about].fault == f"[Errno 13] Permission denied: '{path}'"


def test_event_files_that_the_user_may_not_read_are_named(shares: Settings) -> None:
    data = cast(Path, shares.data_dir)
    assert not as_another(shares)["data directory"].fault
    (data / "prince" / "events").chmod(0o711)
    assert as_another(shares)["data directory"].fault == f"this user can't read prince/events in {data}"


def test_who_only_uploads_need_not_write_copies(shares: Settings) -> None:
    staging = cast(Path, shares.staging_dir)
    for mode, entrypoint, fault in (
        (0o755, "upload-worker", ""),
        (0o755, "event-ingester", f"this user can't write to {staging}"),
        (0o711, "upload-worker", f"{staging} can't be read by this user"),
    ):
        staging.chmod(mode)
        assert as_another(shares, entrypoint)["staging directory"].fault == fault


@pytest.mark.parametrize(
    ("entrypoint", "without"),
    [
        ("event-ingester", {"RabbitMQ", "webhook"}),
        ("upload-worker", {"RabbitMQ", "webhook", "database"}),
        ("state-manager", {"data directory", "staging directory", "webhook"}),
        ("api", {"data directory", "staging directory", "RabbitMQ"}),
    ],
)
def test_what_an_entrypoint_does_not_read_is_not_asked_for(
    settings: Settings, entrypoint: str, without: set[str]
) -> None:
    assert found(settings).keys() - found(settings, entrypoint).keys() == without


def test_a_host_that_only_uploads_needs_no_database(
    run_settings: Settings,
    event_log: EventLog,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (cast(Path, run_settings.data_dir) / "prince" / "events").mkdir(parents=True)
    monkeypatch.delenv("ARCHIVER_DATABASE_URL")
    get_settings.cache_clear()
    for wanted, options in ((0, ["--for", "upload-worker"]), (1, [])):
        monkeypatch.setattr(sys, "argv", ["archiver", "init", "--check", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr().out
        assert ended.value.code == wanted, printed
        assert ("ARCHIVER_DATABASE_URL" in printed) == bool(wanted)


def test_more_copies_than_their_disk_holds_are_noticed(settings: Settings) -> None:
    assert settings.staging_dir is not None
    settings.staging_dir.mkdir()
    holds = shutil.disk_usage(settings.staging_dir).total
    for budget, advice in ((None, ""), (holds, ""), (holds + 1, f"is {holds + 1}, but the disk")):
        asked = settings.model_copy(update={"staging_budget_bytes": budget})
        assert found(asked)["staging directory"].advice.startswith(advice and "ARCHIVER_STAGING_BUDGET_BYTES")
        assert advice in found(asked)["staging directory"].advice


def test_a_redis_that_drops_what_it_was_told_is_wrong(settings: Settings, event_log: EventLog) -> None:
    for name, value, before in (("maxmemory-policy", "volatile-lru", "noeviction"), ("appendonly", "yes", "no")):
        event_log.redis.config_set(name, value)
        try:
            finding = found(settings)["stream"]
        finally:
            event_log.redis.config_set(name, before)
        if name == "appendonly":
            assert finding == Finding("stream")
        else:
            assert "its maxmemory-policy is volatile-lru, not noeviction" in finding.fault


def test_a_redis_that_will_be_full_is_noticed(settings: Settings, event_log: EventLog) -> None:
    used = event_log.redis.info("memory")["used_memory"]
    event_log.redis.config_set("maxmemory", int(used / 0.9))
    try:
        advice = found(settings)["stream"].advice
    finally:
        event_log.redis.config_set("maxmemory", 0)
    assert re.search(r"Redis is (8[5-9]|9\d)% full: shorten ARCHIVER_STREAM_DAYS", advice)


def test_a_redis_that_others_reach_has_to_ask_for_a_password(
    settings: Settings, event_log: EventLog, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_log.redis.acl_setuser("archiver", enabled=True, passwords=["+right"], categories=["+@all"], keys=["*"])
    # As if it were on another machine.
    monkeypatch.setattr("flows.check_services.is_loopback", lambda _host: False)
    assert "have it ask for a password" in found(settings)["stream"].advice
    try:
        right, wrong = (
            found(
                settings.model_copy(
                    update={"redis_url": SecretStr(redis_url.replace("://", f"://archiver:{password}@"))}
                )
            )["stream"]
            for password in ("right", "wrong")
        )
    finally:
        event_log.redis.acl_deluser("archiver")
    assert not right.fault
    assert "password" not in right.advice
    assert wrong.fault.startswith("ARCHIVER_REDIS_URL: invalid username-password pair")


def test_secrets_that_can_be_guessed_are_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    good, other = SecretStr("J3b-k0Zq_7xWm2Lp9Rt5"), SecretStr("8sYv1NcQ4eHd6UaGf0Tz")

    def fault(api: SecretStr | None, webhook: SecretStr | None) -> str:
        return found(settings.model_copy(update={"api_token": api, "webhook_token": webhook}))["secrets"].fault

    assert not fault(None, None)
    assert not fault(good, other)
    assert "is ARCHIVER_WEBHOOK_TOKEN" in fault(good, good)
    assert "ARCHIVER_WEBHOOK_TOKEN can be guessed" in fault(good, SecretStr("change-me"))
    both = fault(SecretStr("0" * 40), SecretStr(""))
    assert "ARCHIVER_API_TOKEN and ARCHIVER_WEBHOOK_TOKEN can be guessed" in both
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "archiver:archiver")
    assert "PREFECT_API_AUTH_STRING can be guessed" in fault(good, other)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", f"archiver:{good.get_secret_value()}")
    assert not fault(good, other)


def test_rules_that_delete_timesteps_are_wrong_unless_they_are_for_archived_ones(
    settings: Settings, object_store: ObjectStore
) -> None:
    def put(name: str, where: dict[str, str | dict[str, str]]) -> None:
        rule = {"ID": name, "Filter": where, "Status": "Enabled", "Expiration": {"Days": 30}}
        object_store.client.put_bucket_lifecycle_configuration(
            Bucket=settings.bucket,
            LifecycleConfiguration={"Rules": [rule]},  # type: ignore[list-item]
        )

    for name, where in (("after a month", "images/"), ("one experiment", "videos/20261101_004"), ("all", "")):
        put(name, {"Prefix": where})
        assert f"delete timesteps: {name}. Remove" in found(settings)["object storage"].fault
    put("archived", {"Tag": {"Key": "archived", "Value": "true"}})
    assert not found(settings)["object storage"].fault
    put("of others", {"Prefix": "logs/"})
    assert not found(settings)["object storage"].fault


def test_a_clock_that_differs_from_the_services_is_noticed(
    settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = datetime.now(UTC).timestamp() - 600
    monkeypatch.setattr("flows.check_services.time.time", lambda: behind)
    for about, whose in (("database", "PostgreSQL's"), ("stream", "Redis'")):
        assert f"s behind {whose}" in found(settings)[about].fault


def test_a_clock_that_is_wrong_is_noticed(settings: Settings, s3_endpoint: str) -> None:
    with FaultyProxy.before(s3_endpoint) as proxy:
        settings = settings.model_copy(update={"aws_endpoint_url": proxy.url})
        assert found(settings)["clock"] == Finding("clock")
        proxy.plan(Backdate(600), "HEAD", times=1000)
        fault = found(settings)["clock"].fault
    assert "s ahead of the object storage's" in fault
    assert 590 < float(fault.split(" is ")[1].split()[0]) < 620


def test_a_report_for_nobody_is_wrong(run_settings: Settings) -> None:
    settings = run_settings.model_copy(update={"report_block": "slack-webhook/nobody"})
    assert "slack-webhook/nobody, which Prefect does not have" in found(settings)["Prefect"].fault


def test_a_prefect_server_that_others_reach_has_to_ask_for_a_password(
    run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(run_settings)["Prefect"] == Finding("Prefect")
    # As if it were on another machine.
    monkeypatch.setattr("flows.check_services.is_loopback", lambda _host: False)
    assert "PREFECT_SERVER_API_AUTH_STRING" in found(run_settings)["Prefect"].advice
    with FaultyProxy.before(str(run_settings.prefect_api_url).removesuffix("/api")) as proxy:
        proxy.plan(Refuse(401, "nobody"), "POST", times=10)
        locked = run_settings.model_copy(update={"prefect_api_url": f"{proxy.url}/api"})
        assert found(locked)["Prefect"] == Finding("Prefect")
