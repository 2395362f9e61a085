"""The embedded servers, started for real: what is kept, what is refused, and who may come in."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import boto3
import httpx
import psycopg
import pytest
import redis
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry

from blocks.settings import MissingSetting, Settings
from flows.stack.embedded import start_servers
from flows.stack.environment import process_environment, shell_environment
from flows.stack.home import Home
from flows.stack.postgres import SYSTEM_USER
from flows.stack.service import StartError
from flows.stack.supervisor import Supervisor
from flows.stack.up import running_stack

PATIENCE = 20.0
OBJECT_STORAGE = {
    "AWS_ENDPOINT_URL": "http://s3.example",
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "something",
}
# Leaves PostgreSQL and Redis to be embedded.
WITHOUT_PREFECT = {**OBJECT_STORAGE, "PREFECT_API_URL": "http://prefect.example/api"}

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_given")]


class Servers(NamedTuple):
    """Running embedded servers."""

    settings: Settings
    supervisor: Supervisor

    def sql(self, query: str) -> list[tuple[object, ...]]:
        with psycopg.connect(secret(self.settings.database_url), autocommit=True, connect_timeout=3) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(secret(self.settings.redis_url), decode_responses=True)


def secret(value: SecretStr | None) -> str:
    assert value is not None
    return value.get_secret_value()


def settings_with(home: Path, given: dict[str, str]) -> Settings:
    return Settings.model_validate({"home": home, **given})


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Servers]:
    home = Home(settings.home)
    with home.locked():
        async with Supervisor(home.directory("logs")) as supervisor:
            yield Servers(await start_servers(settings, home, supervisor), supervisor)


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE} s"
        await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def servers(nothing_given: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """All embedded servers; the path of the home is longer than that of a socket may be."""
    home = tmp_path_factory.mktemp("all") / f"a home {'x' * 100}" / ".archiver"
    async with running(settings_with(home, {})) as started:
        yield started


async def test_every_server_runs_and_nothing_is_missing(servers: Servers) -> None:
    assert set(servers.supervisor.pids) == {"postgres", "redis", "s3", "prefect"}
    servers.settings.require("database_url", "redis_url", "aws_endpoint_url", "aws_access_key_id", "prefect_api_url")
    assert servers.sql("select count(*) from pg_database where datname in ('archiver', 'prefect')") == [(2,)]
    assert servers.redis().config_get("append*")["appendonly"] == "yes"


def test_servers_let_nobody_in_without_the_password(servers: Servers) -> None:
    address = httpx.URL(secret(servers.settings.database_url))
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(str(address.copy_with(password="wrong")))
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(str(address.copy_with(username="archiver", password=None)))
    port = httpx.URL(secret(servers.settings.redis_url)).port
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=port or 0, retry=Retry(NoBackoff(), 0)).ping()


def test_passwords_are_for_their_owner_only(servers: Servers) -> None:
    secrets = list((servers.settings.home / "secrets").iterdir())
    assert {file.name for file in secrets} == {"postgres-password", "redis-password", "s3-secret-key"}
    for file in [*secrets, servers.settings.home / "redis" / "redis.conf"]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    arguments = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in servers.supervisor.pids.values())
    for file in secrets:
        assert file.read_bytes().strip() not in arguments


def test_servers_listen_on_loopback_only(servers: Servers) -> None:
    addresses = [
        secret(servers.settings.database_url),
        secret(servers.settings.redis_url),
        servers.settings.aws_endpoint_url,
        servers.settings.prefect_api_url,
    ]
    ports = {httpx.URL(str(address)).port for address in addresses}
    sockets = [
        line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]
    ]
    listening = [local.split(":") for _, local, _, state, *_ in sockets if state == "0A"]
    assert {(host, int(port, 16)) for host, port in listening if int(port, 16) in ports} == {
        ("0100007F", port) for port in ports
    }


async def test_prefect_runs_on_postgresql_and_serves_its_interface(servers: Servers) -> None:
    api = str(servers.settings.prefect_api_url)
    async with httpx.AsyncClient(timeout=20, follow_redirects=True, trust_env=False) as client:
        for name in ("ingest-timestep", "upload-timestep"):
            (await client.post(f"{api}/flows/", json={"name": name})).raise_for_status()
        # A part of a name: what the trigram indexes, which this PostgreSQL doesn't have, are for.
        found = await client.post(f"{api}/flows/filter", json={"flows": {"name": {"like_": "LOAD"}}})
        assert [flow["name"] for flow in found.json()] == ["upload-timestep"]

        page = await client.get(api.removesuffix("/api"), headers={"Accept": "text/html"})
        assert page.headers["content-type"].startswith("text/html")
        assert (await client.get(f"{api.removesuffix('/api')}/ui-settings")).json()["api_url"] == api
        foreign = await client.get(f"{api}/health", headers={"Origin": "http://elsewhere.example"})
        assert "access-control-allow-origin" not in foreign.headers
    prefect = secret(servers.settings.database_url).removesuffix("archiver") + "prefect"
    with psycopg.connect(prefect) as connection:
        assert connection.execute("select count(*) from flow").fetchone() == (2,)


async def test_objects_come_back_from_the_trial_storage(servers: Servers) -> None:
    settings = servers.settings
    client = boto3.client(
        "s3",
        endpoint_url=settings.aws_endpoint_url,
        aws_access_key_id=settings.aws_access_key_id,
        aws_secret_access_key=secret(settings.aws_secret_access_key),
        region_name=settings.aws_region,
    )
    await asyncio.to_thread(client.put_object, Bucket=settings.bucket, Key="images/a.tar", Body=b"bytes")
    answer = await asyncio.to_thread(client.get_object, Bucket=settings.bucket, Key="images/a.tar")
    assert answer["Body"].read() == b"bytes"


async def test_a_killed_server_comes_back_with_its_data(servers: Servers) -> None:
    servers.sql("create table kept (id int)")
    servers.sql("insert into kept values (7)")
    servers.redis().xadd("kept", {"id": "7"})
    before = dict(servers.supervisor.pids)
    for name in ("postgres", "redis"):
        os.kill(before[name] or 0, signal.SIGKILL)

    def is_back() -> bool:
        with suppress(psycopg.OperationalError, redis.ConnectionError):
            return servers.sql("select id from kept") == [(7,)] and servers.redis().xlen("kept") == 1
        return False

    await until(is_back, "the return of PostgreSQL and Redis")
    after = servers.supervisor.pids
    assert before["postgres"] != after["postgres"]
    assert before["redis"] != after["redis"]


async def test_two_stacks_run_side_by_side(servers: Servers, tmp_path: Path) -> None:
    async with running(settings_with(tmp_path / "other", WITHOUT_PREFECT)) as other:
        assert other.sql("select current_setting('data_directory')") != servers.sql(
            "select current_setting('data_directory')"
        )
        other.redis().set("whose", "other")
        assert servers.redis().get("whose") is None
    assert servers.sql("select 1") == [(1,)]


async def test_a_restart_keeps_data_addresses_and_passwords(tmp_path: Path) -> None:
    settings = settings_with(tmp_path / "home", WITHOUT_PREFECT)
    async with running(settings) as first:
        first.sql("create table kept (id int)")
        first.redis().xadd("kept", {"id": "7"})
    async with running(settings) as second:
        assert second.settings == first.settings
        assert second.sql("select count(*) from kept") == [(0,)]
        assert second.redis().xlen("kept") == 1


def run_until_ready_and_kill(code: str) -> None:
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()


async def test_a_stack_continues_after_its_supervisor_was_killed(tmp_path: Path) -> None:
    settings = settings_with(tmp_path / "home", WITHOUT_PREFECT)
    code = f"""
        import asyncio
        from tests.test_embedded import WITHOUT_PREFECT, Path, running, settings_with

        async def main():
            async with running(settings_with(Path({str(settings.home)!r}), WITHOUT_PREFECT)) as servers:
                servers.sql("create table kept (id int)")
                servers.redis().xadd("kept", {{"id": "7"}})
                print("ready", flush=True)
                await asyncio.sleep(60)

        asyncio.run(main())
    """
    await asyncio.to_thread(run_until_ready_and_kill, textwrap.dedent(code))
    async with running(settings) as second:
        assert second.sql("select count(*) from kept") == [(0,)]
        assert second.redis().xlen("kept") == 1


@pytest.fixture
def another_process() -> Iterator[int]:
    """A process of the user that PostgreSQL runs as."""
    with subprocess.Popen(["/bin/sleep", "60"], user=SYSTEM_USER if os.geteuid() == 0 else None) as process:
        yield process.pid
        assert process.poll() is None, "it is no business of a stack to end it"
        process.kill()


async def test_a_lock_file_with_the_number_of_another_process_is_no_obstacle(
    servers: Servers, another_process: int, tmp_path: Path
) -> None:
    settings = settings_with(tmp_path / "home", WITHOUT_PREFECT)
    async with running(settings):
        lock_file = settings.home / "postgres" / "data" / "postmaster.pid"
        content = lock_file.read_text()
    lock_file.write_text("\n".join([str(another_process), *content.splitlines()[1:]]) + "\n")
    os.chown(lock_file, lock_file.parent.stat().st_uid, lock_file.parent.stat().st_gid)
    async with running(settings) as again:
        assert again.sql("select 1") == [(1,)]


async def test_what_is_given_is_used(tmp_path: Path) -> None:
    given = {
        **WITHOUT_PREFECT,
        "database_url": "postgresql://somebody:secret@db.example/archiver",
        "redis_url": "redis://redis.example",
    }
    async with running(settings_with(tmp_path / "home", given)) as servers:
        assert servers.supervisor.pids == {}
        assert servers.settings == settings_with(tmp_path / "home", given)
    assert not (tmp_path / "home" / "secrets").exists()


async def test_a_second_stack_in_the_same_home_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with home.locked(), pytest.raises(StartError, match=rf"in use by another stack \(process {os.getpid()}\)"):
        async with running_stack(settings_with(home.path, OBJECT_STORAGE)):
            pass
    with home.locked():
        pass


@pytest.mark.parametrize("missing", OBJECT_STORAGE)
async def test_a_stack_without_object_storage_says_what_to_set(tmp_path: Path, missing: str) -> None:
    given = {name: value for name, value in OBJECT_STORAGE.items() if name != missing}
    with pytest.raises(MissingSetting, match=rf"not set: {missing}\. (.|\n)*--trial"):
        async with running_stack(settings_with(tmp_path / "home", given)):
            pass
    assert not (tmp_path / "home").exists()


async def test_a_port_stays_the_same_until_another_program_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.stack.home.PORT_PATIENCE", 0.3)
    home = Home(tmp_path)
    port = await home.port("api")
    assert port == await home.port("api") == await Home(tmp_path).port("api")
    assert port != await home.port("redis")
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
    async with server:
        with pytest.raises(StartError, match=f"port {port} .* wanted for the api"):
            await home.port("api", wanted=port)
        other = await home.port("api")
    assert other not in (port, await home.port("redis"))
    assert await home.port("api") == other


def test_a_shell_reads_the_settings_as_they_are(tmp_path: Path) -> None:
    env = {"ARCHIVER_BUCKET": 'it\'s $HOME `x` "y"\nz', "AWS_REGION": "eu"}
    home = Home(tmp_path)
    home.write_env(env)
    assert stat.S_IMODE(home.env_file.stat().st_mode) == 0o600
    script = f". '{home.env_file}'; printf %s \"$ARCHIVER_BUCKET\"; printenv AWS_REGION"
    shell = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    assert shell.stdout == env["ARCHIVER_BUCKET"] + "eu\n"


def test_the_environment_of_a_stack_gives_its_settings_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**WITHOUT_PREFECT, "redis_url": "redis://:secret@redis.example", "webhook_token": "token"}
    settings = settings_with(tmp_path, given)
    for name, value in shell_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_nothing_of_the_caller_leads_a_trial_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "PREFECT_PROFILE", "PREFECT_HOME"):
        monkeypatch.setenv(name, "the caller's")
    monkeypatch.setenv("NO_PROXY", "proxy.example")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    env = process_environment(settings_with(tmp_path, {}), own_object_storage=True)
    assert "the caller's" not in env.values()
    assert env["NO_PROXY"].split(",")[0] == "proxy.example"
    assert {"127.0.0.1", "localhost"} < set(env["NO_PROXY"].split(","))
    assert env["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    given = process_environment(settings_with(tmp_path, OBJECT_STORAGE), own_object_storage=False)
    assert given["AWS_SESSION_TOKEN"] == "the caller's"
