"""Runs the services of the compose files as processes of this machine: their own commands, environments and mounts.

`python -m tests.compose_processes DIRECTORY`, as root, in network and mount namespaces of its own. What the containers
of others do is played by the servers from wheels.
"""

import asyncio
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any
from uuid import UUID

import aio_pika
import httpx
import pytest

from flows.stack.demo import verify
from flows.stack.mock_microscope import Dropped
from flows.stack.service import StartError
from flows.stack.supervisor import Supervisor
from tests import rabbitmq
from tests.compose import DEVELOPMENT, Compose, merged
from tests.containers import Containers, make_secrets, own, postgres_of
from tests.surf_archiver import notice, publish

TIMESTEPS = 2
ARRIVAL_SECONDS = 90.0


class Machine:
    """One host, with everything that compose.yml and compose.dev.yml say."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        staging = directory / "staging"
        staging.mkdir()
        for system in ("prince", "aretha"):
            (self.data / system / "events").mkdir(parents=True)
        self.compose: Compose = merged(
            directory,
            *DEVELOPMENT,
            profiles=() if rabbitmq.missing_programs() else ("rabbitmq",),
            ARCHIVER_DATA_DIR=str(self.data),
            ARCHIVER_STAGING_DIR=str(staging),
            MOCK_TIMESTEPS=str(TIMESTEPS),
            MOCK_INTERVAL_SECONDS="0",
        )
        for path in (self.data, staging):
            own(path, self.compose.services["init"]["user"])
        make_secrets(directory)
        self.directory = directory
        self.containers = Containers(directory, self.compose, directory / "secrets")
        self.broker_url = ""
        if "rabbitmq" in self.compose.services:
            # As docs/production.md says.
            password = self.containers.secret("rabbitmq_conf").read_text().rpartition("default_pass = ")[2].strip()
            self.broker_url = f"amqp://archiver:{password}@rabbitmq:5672/"
            self.containers.secret("archiver_rabbitmq_url").write_text(self.broker_url)

    def resolve_names(self) -> None:
        """Every name a container knows the others by is this namespace's loopback."""
        aliases = self.compose.services["traefik"]["networks"]["inside"]["aliases"]
        hosts = self.directory / "hosts"
        names = ["localhost", *self.compose.services, *aliases, *self.compose.routes()]
        hosts.write_text(f"127.0.0.1 {' '.join(names)}\n")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        for name, value in self.compose.services["traefik"]["sysctls"].items():
            Path("/proc/sys", name.replace(".", "/")).write_text(value)
        subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)


async def run(directory: Path) -> None:
    """Start everything in the order of its dependencies, and follow the mock microscope's timesteps."""
    machine = Machine(directory)
    machine.resolve_names()
    containers = machine.containers
    services = machine.compose.services
    async with Supervisor(directory / "logs") as supervisor:
        needs = {name: service.get("depends_on", {}) for name, service in services.items()}
        for name in TopologicalSorter(needs).static_order():
            print("starting", name, flush=True)
            if name == "postgres":
                await supervisor.start(postgres_of(machine.containers).service())
            elif name in ("init", "mock-microscope"):
                await supervisor.run(containers.service(name))
            else:
                await containers.start(supervisor, name)
        exports = await _exports()
        for export in exports:
            await asyncio.to_thread(verify, export["url"], _dropped(machine.data, export))
        if machine.broker_url:
            await _archive(machine.broker_url, exports[0])
        async with httpx.AsyncClient(trust_env=False) as client:
            (await client.get("http://fastapi.localhost/docs")).raise_for_status()
            (await client.get("http://prefect.localhost/api/health")).raise_for_status()
            assert (await client.get("http://prefect.localhost/api/admin/version")).status_code == 401
            assert (await client.get("http://localhost/docs")).status_code == 404, "Traefik knows no such host"
            await _wait_for_scheduled_runs(client, containers)
        for name in ("event-ingester", "upload-worker", "state-manager"):
            service = containers.service(name)
            assert containers.healthy(name, supervisor.pids[name] or 0, dict(service.env)), name
        await supervisor.run(containers.service("init", "archiver", "init", "--check"))
        await _check_wrong_credentials(supervisor, containers)


async def _check_wrong_credentials(supervisor: Supervisor, containers: Containers) -> None:
    for name, value in (
        ("archiver_redis_url", "redis://:wrong@redis:6379/0"),
        ("pgpassword", "wrong"),
        ("prefect_api_auth_string", "archiver:wrong"),
    ):
        containers.secret(name).write_text(value)
    with pytest.raises(StartError) as error:
        await supervisor.run(containers.service("init", "archiver", "init", "--check"))
    for said in (
        "ARCHIVER_DATABASE_URL: .*password authentication failed",
        "ARCHIVER_REDIS_URL: invalid username-password pair",
        "PREFECT_API_URL .*401",
        "PREFECT_API_AUTH_STRING can be guessed",
    ):
        assert re.search(said, str(error.value)), f"{said} is not in\n{error.value}"


async def _wait_for_scheduled_runs(client: httpx.AsyncClient, containers: Containers) -> None:
    """Prefect has planned the runs of the schedules; it fails to with some releases of what it depends on."""
    user, _, password = containers.secret("prefect_api_auth_string").read_text().strip().partition(":")
    waiting = {"flow_runs": {"state": {"name": {"any_": ["Scheduled"]}}}}
    async with asyncio.timeout(90):
        while True:
            answer = await client.post(
                "http://prefect.localhost/api/flow_runs/count", json=waiting, auth=(user, password)
            )
            if answer.raise_for_status().json():
                return
            await asyncio.sleep(1)


async def _exports(count: int = TIMESTEPS, query: str = "") -> list[dict[str, Any]]:
    """What the known call answers, once so many timesteps are there."""
    deadline = asyncio.get_running_loop().time() + ARRIVAL_SECONDS
    while True:
        known = ["curl", "--silent", "--fail", "-H", "Host:fastapi.localhost", f"localhost:80/api/1/exports{query}"]
        answer = await asyncio.to_thread(subprocess.run, known, capture_output=True, check=True)
        exports: list[dict[str, Any]] = json.loads(answer.stdout)["data"]
        if len(exports) == count:
            return exports
        assert asyncio.get_running_loop().time() < deadline, f"{len(exports)} of {count} timesteps arrived"
        await asyncio.sleep(0.3)


async def _archive(broker_url: str, export: dict[str, Any]) -> None:
    """Tell of an archive with this timestep, as surf-archiver does, until it is known."""
    connection = await aio_pika.connect(broker_url, timeout=ARRIVAL_SECONDS)
    async with connection:
        body = notice({"path": "images/e/20261123.tar", "src_keys": [export["key"]]})
        await publish(await connection.channel(), body)
        (archived,) = await _exports(1, "?state=archived")
    assert archived["timestep_id"] == export["timestep_id"]


def _dropped(data: Path, export: dict[str, Any]) -> Dropped:
    for event_file in (data / export["system"] / "events").glob("*.json"):
        event = json.loads(event_file.read_text())
        if event["timestep_id"] == export["timestep_id"]:
            image_dir = data / export["system"] / event["img_dir"]
            images = list(image_dir.rglob("*.tif"))
            assert len(images) == event["img_count"] > 0
            id = UUID(event["timestep_id"])
            return Dropped(id, export["system"], event_file, image_dir, len(images), 0, datetime.now(UTC))
    raise LookupError(export["timestep_id"])


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
