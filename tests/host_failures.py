"""Timesteps of two systems, on hosts that fail in the middle.

`python -m tests.host_failures DIRECTORY`, in a sandbox (tests/network.py).
"""

import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr

from blocks.event_log import EventLog
from blocks.messages import EventData, Ingested, LogEvent, Uploaded
from flows.stack.demo import verify
from flows.stack.mock_microscope import Dropped, drop_timestep
from tests.hosts import Member, Site, bind, kill

INGEST, UPLOAD, STATE = (f"deploy/hosts/{role}-host.yml" for role in ("ingest", "upload", "state"))
TIMESTEPS = 5
# Of images of two in a timestep. A host sends a megabyte per second.
IMAGE_BYTES, MEGABITS = 500_000, 8.0
CUT_OFF_SECONDS = 15.0
PATIENCE = 240.0


class Watch:
    """What the stream says."""

    def __init__(self, site: Site) -> None:
        url = (site.directory / "secrets" / "archiver_redis_url").read_text().strip()
        self.log = EventLog(url=SecretStr(url))

    def said(self, kind: type[EventData]) -> list[LogEvent]:
        """Every event of a type."""
        found = []
        for page in self.log.pages(1000):
            events = (LogEvent.model_validate_json(entry.fields["event"]) for entry in page if entry.type == kind.type)
            found += list(events)
        return found

    async def until(self, kind: type[EventData], enough: Callable[[int], bool], what: str) -> None:
        """Wait until so many timesteps have such an event."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = await asyncio.to_thread(self.said, kind)
            count = len({event.data.timestep_id for event in found})
            if enough(count):
                print(f"{time.monotonic():.0f} {what}: {count}", flush=True)
                return
            assert time.monotonic() < deadline, f"{what}: {count} after {PATIENCE:g} s"
            await asyncio.sleep(0.1)


def drop(data: Path, system: str, number: int) -> Dropped:
    at = datetime(2026, 11, 23, 12, tzinfo=UTC) + timedelta(minutes=number)
    return drop_timestep(data, system, images=2, image_bytes=IMAGE_BYTES, timestamp=at, position=number + 1)


async def add_share_host(site: Site, name: str, *systems: str, files: tuple[str, ...] = (INGEST, UPLOAD)) -> Member:
    """A host with the shares of these systems."""
    data = site.directory / f"data-{name}"
    for system in systems:
        share = site.directory / "shares" / system
        (share / "events").mkdir(parents=True, exist_ok=True)
        bind(share, data / system)
    return await site.add(name, *files, ARCHIVER_DATA_DIR=str(data), ARCHIVER_SYSTEMS=",".join(systems))


async def run(directory: Path) -> None:
    """Two hosts near a share each, two for the state, two Prefect servers; half of each is lost."""
    async with Site(directory, prefect_servers=2) as site:
        a, b = await add_share_host(site, "a", "prince"), await add_share_host(site, "b", "aretha")
        c = await add_share_host(site, "c", "prince", "aretha", files=(UPLOAD,))
        first, second = await site.add("state1", STATE), await site.add("state2", STATE)
        await asyncio.gather(*(member.start() for member in (a, b, first, second)))
        for member in (a, b):
            member.host.limit(MEGABITS)
        shares = directory / "shares"
        dropped = [drop(shares, system, number) for number in range(TIMESTEPS) for system in ("prince", "aretha")]
        watch = Watch(site)
        await watch.until(Ingested, lambda count: count == len(dropped), "taken in")
        await watch.until(Uploaded, lambda count: count > 0, "uploaded before anything failed")
        a.host.cut_off()
        kill(site.central, "prefect")
        await asyncio.gather(b.kill(), first.kill())
        early = {event.data.timestep_id for event in watch.said(Uploaded)}
        assert 0 < len(early) < len(dropped), "nothing was under way: the hosts are too fast, or too slow"
        await c.start()
        await asyncio.sleep(CUT_OFF_SECONDS)
        a.host.connect()
        await watch.until(Uploaded, lambda count: count == len(dropped), "uploaded after two hosts were lost")
        dropped.append(drop(shares, "prince", TIMESTEPS))
        await watch.until(Uploaded, lambda count: count == len(dropped), "uploaded when one of them was back")
        # Whoever said it more than once said the same.
        events = {event.id: str(event.data.timestep_id) for event in watch.said(Uploaded)}
        assert Counter(events.values()) == Counter(str(one.timestep_id) for one in dropped)
        token = (directory / "secrets" / "archiver_api_token").read_text().strip()
        bearer, url = {"Authorization": f"Bearer {token}"}, f"http://{second.host.address}:8000/api/1/"
        async with httpx.AsyncClient(base_url=url, headers=bearer, trust_env=False) as client:
            exports = await recorded(client, len(dropped))
        await check_bytes(exports, dropped)
        await _check_queues(site)


async def recorded(client: httpx.AsyncClient, count: int, patience: float = PATIENCE) -> list[dict[str, Any]]:
    """The exports, once there are so many."""
    deadline = time.monotonic() + patience
    while True:
        answer = await client.get("exports", params={"limit": 500})
        exports: list[dict[str, Any]] = answer.raise_for_status().json()["data"]
        if len(exports) >= count:
            return exports
        assert time.monotonic() < deadline, f"{len(exports)} of {count} are recorded"
        await asyncio.sleep(0.5)


async def check_bytes(exports: list[dict[str, Any]], dropped: list[Dropped]) -> None:
    """One object for each timestep, with its bytes, and no other."""
    by_id = {export["timestep_id"]: export for export in exports}
    assert len(by_id) == len(exports) == len(dropped)
    assert len({export["key"] for export in exports}) == len(dropped)
    for one in dropped:
        await asyncio.to_thread(verify, by_id[str(one.timestep_id)]["url"], one)


async def _check_queues(site: Site) -> None:
    """Every run was in the queue of its system."""
    auth = (site.directory / "secrets" / "prefect_auth").read_text().strip().partition(":")
    async with httpx.AsyncClient(auth=(auth[0], auth[2]), trust_env=False) as client:
        answer = await client.post("http://prefect:4200/api/flow_runs/filter", json={"limit": 200})
        runs = answer.raise_for_status().json()
    for run in runs:
        if found := re.match(r"(?:ingest|upload) (\w+) ", run["name"]):
            assert run["work_queue_name"] == found[1], json.dumps(run, indent=1)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
