"""Every secret is rotated in the words of docs/runbook.md, while timesteps arrive.

`python -m tests.rotation DIRECTORY`, in a sandbox (tests/network.py).
"""

import asyncio
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import boto3
import httpx
import psycopg
import redis
from botocore.exceptions import ClientError

from blocks.messages import Failed, Uploaded
from flows.stack.mock_microscope import Dropped, drop_timestep
from tests.compose import ENTRYPOINTS, ROOT
from tests.compose_engine import ComposeEngine
from tests.containers import own
from tests.host_failures import Watch, check_bytes, recorded
from tests.hosts import Site
from tests.rados_gateway import RadosGateway

API = "http://127.0.0.1:8000"
INTERVAL_SECONDS = 4.0
PATIENCE = 300.0
# What tests/containers.py has written for both.
FIRST_KEY, SECOND_KEY, SECOND_SECRET = "development", "second-key", "second-secret"

Secrets = Mapping[str, str]


def steps() -> dict[str, str]:
    """The commands of each kind of secret in the runbook, by the words in bold before them."""
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    section = runbook.partition("\n## Rotate credentials and tokens\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"\*\*(.+?)\*\*.*?\n```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL))


def lets_in_api(secrets: Secrets) -> bool:
    bearer = {"Authorization": f"Bearer {secrets['archiver_api_token']}"}
    return _admits(httpx.get(f"{API}/api/1/exports", headers=bearer, timeout=60, trust_env=False))


def lets_in_webhook(secrets: Secrets) -> bool:
    bearer = {"Authorization": f"Bearer {secrets['archiver_webhook_token']}"}
    nothing = {"job_id": str(uuid4()), "date": "2026-11-23", "archives": []}
    url = f"{API}/api/1/webhooks/surf-archiver"
    return _admits(httpx.post(url, headers=bearer, json=nothing, timeout=60, trust_env=False))


def lets_in_prefect(secrets: Secrets) -> bool:
    user, _, password = secrets["prefect_auth"].partition(":")
    url = "http://127.0.0.1:4200/api/admin/version"
    return _admits(httpx.get(url, auth=(user, password), timeout=60, trust_env=False))


def _admits(answer: httpx.Response) -> bool:
    if answer.status_code in (401, 403):
        return False
    answer.raise_for_status()
    return True


def lets_in_database(secrets: Secrets) -> bool:
    try:
        psycopg.connect(host="127.0.0.1", user="archiver", password=secrets["pgpassword"]).close()
    except psycopg.OperationalError as error:
        if "password authentication failed" not in str(error):
            raise
        return False
    return True


def lets_in_redis(secrets: Secrets) -> bool:
    with redis.Redis.from_url(secrets["archiver_redis_url"]) as client:
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return False


def lets_in_storage(secrets: Secrets) -> bool:
    s3 = boto3.client(
        "s3",
        endpoint_url=secrets["endpoint"],
        aws_access_key_id=secrets["aws_access_key_id"],
        aws_secret_access_key=secrets["aws_secret_access_key"],
        region_name="us-east-1",
    )
    try:
        s3.head_bucket(Bucket="timesteps")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 403:
            raise
        return False
    return True


# Whom each kind of secret lets in; by the words of the runbook.
DOORS: dict[str, list[Callable[[Secrets], bool]]] = {
    "tokens of the API": [lets_in_api, lets_in_webhook],
    "object storage": [lets_in_storage],
    "Prefect's": [lets_in_prefect],
    "PostgreSQL's": [lets_in_database],
    "Redis'": [lets_in_redis],
}


@asynccontextmanager
async def microscopes(data: Path) -> AsyncIterator[list[Dropped]]:
    """Timesteps that two systems drop all the time."""
    dropped: list[Dropped] = []

    async def drop() -> None:
        start = datetime.now(UTC).replace(microsecond=0)
        while True:
            number = len(dropped)
            system, at = ("prince", "aretha")[number % 2], start + timedelta(seconds=number)
            dropped.append(drop_timestep(data, system, images=3, image_bytes=40_000, timestamp=at))
            await asyncio.sleep(INTERVAL_SECONDS)

    dropping = asyncio.create_task(drop())
    yield dropped
    dropping.cancel()
    await asyncio.wait([dropping])


async def run(directory: Path) -> None:
    """One rotation after the other; after each, the old secret is good for nothing, and what was dropped arrives."""
    (directory / "ceph").mkdir()
    with RadosGateway.running(directory / "ceph") as gateway:
        gateway.add_key(FIRST_KEY, FIRST_KEY)
        async with Site(directory, object_storage=gateway.url) as site:
            own(directory / "staging", site.containers.compose.services["init"]["user"])
            await site.containers.start(site.central, *ENTRYPOINTS)
            before = read_secrets(directory, gateway)
            engine = ComposeEngine(directory, site.containers, site.central, before["pgpassword"])
            async with microscopes(site.data) as dropped:
                await arrive(site, dropped, 2)
                for what, doors in DOORS.items():
                    commands = steps()[what]
                    if what == "object storage":
                        gateway.add_key(SECOND_KEY, SECOND_SECRET)
                        commands = typed(directory, commands)
                    started = time.monotonic()
                    await engine.shell(commands)
                    if what == "object storage":
                        gateway.remove_key(FIRST_KEY)
                    print(f"{what}: {time.monotonic() - started:.1f} s", flush=True)
                    now = read_secrets(directory, gateway)
                    for lets_in in doors:
                        assert not await asyncio.to_thread(lets_in, before), lets_in
                    for lets_in in (lets_in for doors in DOORS.values() for lets_in in doors):
                        assert await asyncio.to_thread(lets_in, now), lets_in
                    # Those that came meanwhile, and one that came since.
                    await arrive(site, dropped, len(dropped) + 1)
                    before = now
                await engine.shell("docker compose run --rm --no-deps init archiver init --check")
            await check_all(site, dropped, before)


def read_secrets(directory: Path, gateway: RadosGateway) -> Secrets:
    """What is in the operator's files now."""
    files = {path.name: path.read_text().strip() for path in (directory / "secrets").iterdir()}
    return files | {"endpoint": gateway.url}


def typed(directory: Path, commands: str) -> str:
    """The commands, with what the operator types into them."""
    for name, value in (("aws_access_key_id", SECOND_KEY), ("aws_secret_access_key", SECOND_SECRET)):
        (directory / name).write_text(f"{value}\n")
        assert f"/dev/stdin secrets/{name}\n" in commands
        commands = commands.replace(f"/dev/stdin secrets/{name}\n", f"/dev/stdin secrets/{name} <{name}\n")
    return commands


async def arrive(site: Site, dropped: list[Dropped], count: int) -> None:
    """Wait until so many timesteps were dropped, and those are uploaded."""
    watch = Watch(site)
    deadline = time.monotonic() + PATIENCE
    while True:
        there = {event.data.timestep_id for event in await asyncio.to_thread(watch.said, Uploaded)}
        missing = [one.timestep_id for one in dropped[:count] if one.timestep_id not in there]
        if not missing and len(dropped) >= count:
            print(f"{count} have arrived", flush=True)
            return
        assert time.monotonic() < deadline, f"not uploaded after {PATIENCE:g} s: {missing}"
        await asyncio.sleep(0.2)


async def check_all(site: Site, dropped: list[Dropped], secrets: Secrets) -> None:
    """Every timestep arrived once, image by image, and nothing was given up or set aside."""
    await arrive(site, dropped, len(dropped))
    watch = Watch(site)
    events = {event.id: event.data.timestep_id for event in watch.said(Uploaded)}
    assert Counter(events.values()) == Counter(one.timestep_id for one in dropped)
    assert watch.said(Failed) == []
    bearer = {"Authorization": f"Bearer {secrets['archiver_api_token']}"}
    async with httpx.AsyncClient(base_url=f"{API}/api/1/", headers=bearer, timeout=60, trust_env=False) as client:
        exports = await recorded(client, len(dropped), PATIENCE)
        status = (await client.get("status")).raise_for_status().json()
    assert [group["dead_letters"] for group in status["groups"]] == [0, 0]
    await check_bytes(exports, dropped)
    print(f"all {len(dropped)} are there", flush=True)


if __name__ == "__main__":
    # For the gateway, which is there before the network.
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    asyncio.run(run(Path(sys.argv[1])))
