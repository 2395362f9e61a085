"""A real Prefect server on PostgreSQL, with the project's work pools and deployments.

For modules that declare `pytest_plugins = ["tests.prefect_server"]`; started once for all of them.
"""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import psycopg
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_LOGGING_TO_API_ENABLED,
    PREFECT_WORKER_QUERY_SECONDS,
    temporary_settings,
)
from pydantic import SecretStr

import flows.stack.postgres
from blocks import remembered
from blocks.imaging_system import ImagingSystem
from blocks.object_store import ObjectStore
from blocks.settings import Settings, get_settings
from flows.init import initialize
from flows.stack.environment import shell_environment
from flows.upload import OBJECT_STORE

START_SECONDS = 120.0


@pytest.fixture(scope="session")
def prefect_server(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server's API."""
    directory = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    env = _without_prefect() | {
        "PREFECT_HOME": str(directory),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": _create_database(postgres).replace("://", "+asyncpg://", 1),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",  # whose runs would come and go between those of a test
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log_file = directory / "log"
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_healthy(url):
            assert server.poll() is None, log_file.read_text()
            assert time.monotonic() < deadline, f"no Prefect server within {START_SECONDS} s:\n{log_file.read_text()}"
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(5)


def _without_prefect() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=3, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _create_database(postgres: str) -> str:
    # The wheel's PostgreSQL comes without the pg_trgm that Prefect's migrations ask for.
    with psycopg.connect(postgres, autocommit=True) as connection:
        (data,) = connection.execute("show data_directory").fetchone() or ("",)
        extensions = Path(data).with_name("extensions")
        shutil.copytree(Path(flows.stack.postgres.__file__).with_name("pg_trgm"), extensions)
        for path in (extensions.parent, extensions, *extensions.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        connection.execute("create database prefect")
        connection.execute(f"alter database prefect set extension_control_path = '$system:{extensions}'")
    return postgres.replace("/postgres?", "/prefect?")


@pytest.fixture(scope="session")
def prepared_prefect(
    prefect_server: str,
    postgres: str,
    redis_server: str,
    s3_endpoint: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The address of a Prefect server that `archiver init` has prepared."""
    home = tmp_path_factory.mktemp("prepared")
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("create database prepared")
    settings = Settings(
        data_dir=home / "data",
        staging_dir=home / "staging",
        database_url=SecretStr(postgres.replace("/postgres?", "/prepared?")),
        redis_url=SecretStr(redis_server),
        AWS_ENDPOINT_URL=s3_endpoint,
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY=SecretStr("test-secret"),
        PREFECT_API_URL=prefect_server,
    )
    with pytest.MonkeyPatch.context() as patch, _as_client(prefect_server, home):
        patch.setenv("PREFECT_API_URL", prefect_server)
        patch.setenv("PREFECT_HOME", str(home))
        initialize(settings)
    return prefect_server


@pytest.fixture
def prefect(prepared_prefect: str, tmp_path: Path) -> Iterator[str]:
    """The address of a prepared Prefect server without flow runs and systems, to which clients connect."""
    with _as_client(prepared_prefect, tmp_path / "prefect"):
        asyncio.run(_delete_what_others_left())
        yield prepared_prefect


@pytest.fixture
def run_settings(
    prefect: str, settings: Settings, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """The test's own settings, as every flow run reads them."""
    settings = settings.model_copy(update={"prefect_api_url": prefect})
    assert settings.data_dir is not None
    settings.data_dir.mkdir(exist_ok=True)
    monkeypatch.setattr(remembered, "SECONDS", 0.0)  # a test changes blocks and looks at once
    for name, value in shell_environment(settings).items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    asyncio.run(object_store.without_keys().asave(OBJECT_STORE, overwrite=True))
    yield settings
    get_settings.cache_clear()


def _as_client(url: str, home: Path) -> AbstractContextManager[object]:
    return temporary_settings(
        {
            PREFECT_API_URL: url,
            PREFECT_HOME: home,
            PREFECT_WORKER_QUERY_SECONDS: 0.3,
            PREFECT_LOGGING_TO_API_ENABLED: False,  # it would go on after the server has ended
        }
    )


async def _delete_what_others_left() -> None:
    async with get_client() as client:
        for run in await client.read_flow_runs():
            await client.delete_flow_run(run.id)
        for block in await client.read_block_documents_by_type(ImagingSystem.get_block_type_slug()):
            await client.delete_block_document(block.id)
