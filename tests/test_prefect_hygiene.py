"""How the Prefect server is kept, and how long whoever stops its workers has to wait."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from blocks.settings import Settings
from flows import upload, worker
from flows.stack import entrypoints
from flows.stack.embedded import prefect_server
from flows.stack.home import Home
from flows.stack.postgres import Postgres
from tests.compose import PRODUCTION, ROOT, Compose, merged

VACUUM = "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED"
ALL_HISTORY = "events,flow_runs"


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Compose:
    return merged(tmp_path_factory.mktemp("compose"), *PRODUCTION)


@pytest.fixture
def embedded(tmp_path: Path) -> dict[str, str]:
    """The environment of the server that `archiver up` starts."""
    home = Home(tmp_path)
    settings = Settings(home=tmp_path, database_url=SecretStr("postgresql://nobody@127.0.0.1/archiver"))
    return dict(prefect_server(settings, home, 4200, Postgres(home, 5432, "secret")).env)


def test_the_history_of_runs_is_vacuumed_too(embedded: dict[str, str], production: Compose) -> None:
    assert embedded[VACUUM] == ALL_HISTORY
    image = (ROOT / "Dockerfile").read_text()
    assert production.services["prefect"]["environment"].get(VACUUM, ALL_HISTORY) == ALL_HISTORY
    assert re.findall(rf"{VACUUM}=(\S+)", image) == [ALL_HISTORY]


def test_the_server_that_leaves_loopback_asks_for_a_password_that_all_others_know(production: Compose) -> None:
    assert "prefect_server_api_auth_string" in production.services["prefect"]["secrets"]
    clients = [
        service for service in production.services.values() if "PREFECT_API_URL" in service.get("environment", {})
    ]
    assert len(clients) >= 5
    assert all("prefect_api_auth_string" in client["secrets"] for client in clients)
    files = production.document["secrets"]
    assert files["prefect_server_api_auth_string"]["file"] == files["prefect_api_auth_string"]["file"]


def test_prefects_messages_are_not_in_the_database_of_our_stream(embedded: dict[str, str], production: Compose) -> None:
    for environment in (embedded, production.services["prefect"]["environment"]):
        # Without a broker, they stay in the server's memory.
        if "redis" in environment.get("PREFECT_MESSAGING_BROKER", ""):
            assert environment["PREFECT_REDIS_MESSAGING_DB"] != "0"
    assert "@redis:6379/0" in (ROOT / "scripts" / "make-secrets.sh").read_text()


def test_whoever_stops_a_worker_waits_until_it_has_handed_back_what_it_holds(production: Compose) -> None:
    needed = worker.GRACE_SECONDS
    assert needed > upload.STOP_SECONDS
    assert needed < entrypoints.STOP_TIMEOUT
    objects: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/upload-worker.yml").read_text()))
    (pods,) = [one for one in objects if one["kind"] == "StatefulSet"]
    seconds = [pods["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]]
    for file in ("compose.yml", "deploy/hosts/upload-host.yml", "deploy/hosts/state-host.yml"):
        ours = yaml.safe_load((ROOT / file).read_text())["x-archiver"]
        seconds.append(int(ours["stop_grace_period"].removesuffix("s")))
    assert min(seconds) > needed
