"""A site of several hosts, each with the services of its role in deploy/hosts, as processes in a network."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from flows.stack.service import Service
from flows.stack.supervisor import Supervisor
from tests.compose import PRODUCTION, merged
from tests.containers import Containers, make_secrets, postgres_of
from tests.network import Host, make_network
from tests.relay import Relay

REPLICAS = "deploy/hosts/prefect-replicas.yml"


class Member:
    """One host of a site, with its containers."""

    def __init__(self, host: Host, containers: Containers, supervisor: Supervisor) -> None:
        self.host = host
        self.containers = containers
        self.supervisor = supervisor

    async def start(self) -> None:
        """Start all containers of its role, and wait until they are healthy."""
        await self.containers.start(self.supervisor, *self.containers.compose.services)

    async def kill(self) -> None:
        """As if its power had failed: nothing gets to say good-bye, and nothing is started again."""
        kill(self.supervisor, *self.containers.compose.services)
        await self.supervisor.stop()


def kill(supervisor: Supervisor, *names: str) -> None:
    """Send SIGKILL to services; they are started again, as by the container engine."""
    for name in names:
        if pid := supervisor.pids[name]:
            os.kill(pid, signal.SIGKILL)


class Site:
    """A central host with its servers, to which hosts of other roles are added.

    Args:
        directory: for all that the hosts keep.
        prefect_servers: with two, the second one is on a host of its own, and all find both under one name.
        object_storage: its address; without one, it is in memory, on the central host.
        limited: whether the containers of the central host have the memory that compose.yml gives them, and no more.
    """

    def __init__(
        self, directory: Path, prefect_servers: int = 1, object_storage: str = "", limited: bool = False
    ) -> None:
        self.directory = directory
        self._second_prefect = prefect_servers > 1
        self._object_storage = object_storage
        self._limited = limited
        self._stack = AsyncExitStack()
        self._added = 1
        self.data = directory / "data"

    async def __aenter__(self) -> Self:
        self.address = make_network()
        make_secrets(self.directory)
        for place in (self.data, self.directory / "staging"):
            place.mkdir()
        self.names = {name: [self.address] for name in ("postgres", "redis", "prefect", "s3")}
        second = self._next_host("second") if self._second_prefect else None
        if second:
            self.names["prefect"].append(second.address)
        self._resolve_names()
        replicas = [REPLICAS] if second else []
        files = (*PRODUCTION, "deploy/hosts/central.yml", *replicas)
        compose = merged(self.directory, *files, profiles=(), **self._variables("central"))
        self.containers = Containers(self.directory, compose, self.directory / "secrets", limited=self._limited)
        self.central = await self._stack.enter_async_context(Supervisor(self.directory / "logs"))
        servers = [postgres_of(self.containers).service()]
        await self.central.start(*servers, *([] if self._object_storage else [self._objects_in_memory()]))
        # As the container engine publishes it: the server itself listens on loopback.
        await self._stack.enter_async_context(Relay(self.address, 5432))
        await self.containers.start(self.central, "redis")
        await self.containers.start(self.central, "prefect")
        await self.central.run(self.containers.service("init"))
        if second:
            await (await self._member(second, "deploy/hosts/prefect-host.yml")).start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._stack.aclose()

    async def add(self, name: str, *files: str, **variables: str) -> Member:
        """A further host with the services of these files, which are not started yet."""
        return await self._member(self._next_host(name), *files, **variables)

    def _next_host(self, name: str) -> Host:
        self._added += 1
        return Host(name, self._added, self.directory)

    async def _member(self, host: Host, *files: str, **variables: str) -> Member:
        mine = {**self._variables(host.name), "PRIVATE_ADDRESS": host.address, **variables}
        compose = await asyncio.to_thread(lambda: merged(host.directory, *files, profiles=(), **mine))
        containers = Containers(host.directory, compose, self.directory / "secrets", host.inside(self.names))
        supervisor = await self._stack.enter_async_context(Supervisor(host.directory / "logs"))
        return Member(host, containers, supervisor)

    def _variables(self, consumer: str) -> dict[str, str]:
        return {
            "ARCHIVER_CONSUMER": consumer,
            "ARCHIVER_DATA_DIR": str(self.data),
            "ARCHIVER_STAGING_DIR": str(self.directory / "staging"),
            "AWS_ENDPOINT_URL": self._object_storage or "http://s3:5000",
            "CENTRAL_ADDRESS": self.address,
            "PRIVATE_ADDRESS": self.address,
            "SECOND_PREFECT_ADDRESS": self.names["prefect"][-1],
        }

    def _resolve_names(self) -> None:
        hosts = self.directory / "hosts"
        lines = [f"{address} {name}\n" for name, addresses in self.names.items() for address in addresses]
        hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)

    def _objects_in_memory(self) -> Service:
        (self.directory / "objects").mkdir()
        env = {"PATH": os.defpath, "TMPDIR": str(self.directory / "objects"), "S3_IGNORE_SUBDOMAIN_BUCKETNAME": "true"}
        argv = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", "5000"]
        return Service(name="s3", argv=argv, env=env)


def bind(source: Path, target: Path) -> None:
    """Have a directory in another place too, as a share that a further host has mounted."""
    target.mkdir(parents=True)
    subprocess.run(["mount", "--bind", source, target], check=True)
