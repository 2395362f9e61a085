"""What stands in for `docker compose`, in the words of the pages for operators, for services that are processes."""

import asyncio
import json
import os
import stat
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from flows.stack.postgres import programs_directory
from flows.stack.service import StartError
from flows.stack.supervisor import Supervisor
from tests.containers import Containers

# The command `docker`: hands over its arguments and its input, and ends as it is told.
_DOCKER = """#!{python}
import json, socket, sys
with socket.socket(socket.AF_UNIX) as engine:
    engine.connect({address!r})
    engine.sendall(json.dumps([sys.argv[1:], sys.stdin.read()]).encode())
    engine.shutdown(socket.SHUT_WR)
    status, said = json.load(engine.makefile())
print(said, end="", file=sys.stderr if status else sys.stdout)
sys.exit(status)
"""


class ComposeEngine:
    """The services of one host, which run under a supervisor.

    Args:
        directory: where `secrets` and `scripts` are.
        password: of PostgreSQL, which its own container does not ask for.
    """

    def __init__(self, directory: Path, containers: Containers, supervisor: Supervisor, password: str) -> None:
        self._directory = directory
        self._containers = containers
        self._supervisor = supervisor
        self._password = password

    async def shell(self, script: str) -> str:
        """What a script prints in which `docker compose` is this; it has to end well."""
        address = self._directory / "engine.sock"
        docker = self._directory / "engine" / "docker"
        docker.parent.mkdir(exist_ok=True)
        docker.write_text(_DOCKER.format(python=sys.executable, address=str(address)))
        docker.chmod(stat.S_IRWXU)
        env = {"PATH": f"{docker.parent}:{os.defpath}"}
        async with await asyncio.start_unix_server(self._serve, address):
            code, said = await _output("bash", "-euo", "pipefail", "-c", script, env=env, cwd=self._directory)
        assert code == 0, f"{script}\n{said}"
        return said

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arguments, given = json.loads(await reader.read())
        try:
            answer = await self._do(arguments, given)
        except StartError as error:
            answer = 1, str(error)
        writer.write(json.dumps(answer).encode())
        await writer.drain()
        writer.close()

    async def _do(self, arguments: list[str], given: str) -> tuple[int, str]:
        match arguments:
            case ["compose", "up", "-d", "--no-deps", "--force-recreate", *names]:
                await self._recreate(names)
                return 0, ""
            case ["compose", "exec", "-T", "postgres", program, *rest]:
                env = {"PATH": os.defpath, "PGHOST": "127.0.0.1", "PGPASSWORD": self._password}
                return await _output(str(programs_directory() / program), *rest, env=env, given=given)
            case ["compose", "run", "--rm", "--no-deps", name, *command]:
                await self._supervisor.run(self._containers.service(name, *command))
                return 0, ""
            case _:
                return 1, f"not known here: {arguments}"

    async def _recreate(self, names: list[str]) -> None:
        """All of these are stopped before any is started, each time those first that others depend on."""
        for stage in self._stages(names):
            await self._supervisor.stop(*stage)
        for stage in self._stages(names):
            await self._containers.start(self._supervisor, *stage)

    def _stages(self, names: list[str]) -> Iterator[tuple[str, ...]]:
        services = self._containers.compose.services
        needs = {name: set(services[name].get("depends_on", {})).intersection(names) for name in names}
        sorter = TopologicalSorter(needs)
        sorter.prepare()
        while stage := sorter.get_ready():
            yield stage
            sorter.done(*stage)


async def _output(
    *command: str, env: dict[str, str], given: str | None = None, cwd: Path | None = None
) -> tuple[int, str]:
    """How a command ended, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=env,
        cwd=cwd,
        stdin=asyncio.subprocess.PIPE if given is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(300):
        said, _ = await process.communicate(given.encode() if given is not None else None)
    return process.returncode or 0, said.decode()
