"""What a backlog does: runs in flight, memory, latency of new timesteps, and whether its end is told well.

The whole stack on this machine, object storage in memory, and so many tiny timesteps in front of one upload-worker;
with `--files`, so many event files in front of the event-ingester. They are real, and share their images. It stops
when `--until` of them are stored. One JSON object comes last: `rss_peak_ratio` is of the upload-worker's memory
before, `latency_ratio` of the median latency before, `eta_error` the median of |told - true| / true; what was not
waited for is taken to go on at the same rate.
"""

import asyncio
import json
import os
import statistics
import tempfile
import threading
import time
from argparse import ArgumentParser
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import psutil
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console
from rich.table import Table

from bench.flow_overhead import START, SYSTEM, Followed, Microscope
from blocks.event_file import parse_event_file
from blocks.event_log import EventLog
from blocks.messages import Ingested, LogEvent, Uploaded
from blocks.settings import Settings
from flows.stack.up import Stack, running_stack
from tests.images import tiff

IMAGES, IMAGE_BYTES = 2, 3000
# A new timestep is dropped so often while the backlog is worked on (seconds), and its end is asked for.
NEW_EVERY = 10.0
# Longer than a paused pool is taken for one that is not (seconds).
PAUSE_SECONDS = 15.0
# Before so long (seconds), nobody can tell the pace.
PACE_SECONDS = 60.0
console = Console()


@dataclass
class Arrivals:
    """When the object of each timestep was proven, in seconds since the epoch; as the stream says it."""

    followed: Followed
    at: dict[UUID, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        for event in self.followed.events():
            if isinstance(event.data, Uploaded):
                self.at[event.data.timestep_id] = event.data.proof.verified_at.timestamp()

    async def of(self, timestep_id: UUID) -> float:
        """Wait for one."""
        while timestep_id not in self.at:  # noqa: ASYNC110 -- a thread adds it
            await asyncio.sleep(0.05)
        return self.at[timestep_id]


@dataclass
class Seen:
    """What was seen while the backlog was worked on."""

    in_flight: list[int] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    # When it was asked, what was told, and how many of the backlog were still to be done.
    told: list[tuple[float, float | None, int]] = field(default_factory=list)


def announcements(root: Path, count: int) -> list[dict[str, Any]]:
    """The event files of a backlog, oldest first; all share one image directory."""
    (root / SYSTEM / "backlog" / "Img").mkdir(parents=True)
    for number in range(IMAGES):
        (root / SYSTEM / "backlog" / "Img" / f"{number}.tif").write_bytes(tiff(os.urandom(IMAGE_BYTES)))
    return [
        {
            "timestep_id": str(uuid4()),
            "plate": 4,
            "cross_date": "2026-11-01",
            "position": 1,
            "timestamp": (START - timedelta(seconds=count - number)).isoformat(),
            "img_count": IMAGES,
            "img_dir": "backlog",
        }
        for number in range(count)
    ]


def lay(events: list[dict[str, Any]], root: Path, log: EventLog, *, as_files: bool) -> None:
    """Put the backlog in front of the event-ingester, or as taken in in front of the upload-worker."""
    for event in events:
        content = json.dumps(event)
        name = f"events/{event['timestep_id']}.json"
        if as_files:
            (root / SYSTEM / name).write_text(content)
            continue
        parsed = parse_event_file(content.encode(), cast(Any, None))
        data = Ingested(timestep_id=parsed.timestep_id, system=SYSTEM, event_file=name, event=parsed)
        log.append(LogEvent.of(data, "bench"))


async def count_in_flight(client: PrefectClient) -> int:
    """Flow runs of the upload-worker's pool that have begun, are about to, or wait."""
    types = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]
    in_flight = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)))
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=["upload-worker"]))
    return await client.count_flow_runs(flow_run_filter=in_flight, work_pool_filter=pool)


async def latency(microscope: Microscope, arrivals: Arrivals) -> float:
    """From an event file to its proven object, in seconds."""
    (timestep_id,), began = await asyncio.to_thread(microscope.drop)
    return await arrivals.of(timestep_id) - began


async def watch(
    stack: Stack, client: PrefectClient, process: psutil.Process, backlog: set[UUID], arrivals: Arrivals, seen: Seen
) -> None:
    """Look every second, until cancelled."""
    ask_at = 0.0
    async with httpx.AsyncClient(base_url=stack.api_url, trust_env=False, timeout=30) as api:
        while True:
            seen.in_flight.append(await count_in_flight(client))
            seen.rss.append(process.memory_info().rss)
            if time.monotonic() >= ask_at:
                status = (await api.get("/api/1/status")).raise_for_status().json()
                left = len(backlog - arrivals.at.keys())
                seen.told.append((time.time(), status["state"]["done_in_seconds"], left))
                ask_at = time.monotonic() + NEW_EVERY
            await asyncio.sleep(1)


async def drop_new(microscope: Microscope, arrivals: Arrivals, seen: Seen) -> None:
    """Drop a new timestep now and then, until cancelled."""
    while True:
        seen.latencies.append(await latency(microscope, arrivals))
        await asyncio.sleep(NEW_EVERY)


async def bench(home: Path, count: int, until: int, *, as_files: bool) -> dict[str, Any]:
    """Run all of it; returns the figures."""
    (home / "data" / SYSTEM / "events").mkdir(parents=True)
    async with running_stack(Settings(home=home), trial=True) as stack:
        root = cast(Path, stack.settings.data_dir)
        log = EventLog.from_settings(stack.settings)
        microscope = Microscope(root, IMAGES, IMAGE_BYTES)
        arrivals = Arrivals(Followed(log))
        for _ in range(3):  # the first of each process imports what it needs
            await latency(microscope, arrivals)
        idle = [await latency(microscope, arrivals) for _ in range(10)]
        process = psutil.Process(cast(int, stack.supervisor.pids["upload-worker"]))
        rss_before = process.memory_info().rss

        events = await asyncio.to_thread(announcements, root, count)
        ids = [UUID(event["timestep_id"]) for event in events]
        with temporary_settings({PREFECT_API_URL: stack.settings.prefect_api_url}):
            client = get_client()
        async with client:
            await client.update_work_pool("upload-worker", WorkPoolUpdate(is_paused=True))
            await asyncio.sleep(PAUSE_SECONDS)
            await asyncio.to_thread(lay, events, root, log, as_files=as_files)
            await client.update_work_pool("upload-worker", WorkPoolUpdate(is_paused=False))
            began = time.time()
            seen = Seen()
            watching = asyncio.create_task(watch(stack, client, process, set(ids), arrivals, seen))
            dropping = asyncio.create_task(drop_new(microscope, arrivals, seen))
            while len(arrivals.at.keys() & set(ids)) < min(until, count):
                for task in (watching, dropping):
                    if task.done():
                        task.result()
                await asyncio.sleep(0.5)
            ended = time.time()
            watching.cancel()
            dropping.cancel()
        log.close()

    done = [at for id in ids if (at := arrivals.at.get(id)) and at <= ended]
    halves = [sum(id in arrivals.at for id in half) for half in (ids[: count // 2], ids[count // 2 :])]
    errors = list(eta_errors(seen, began, ended, count - len(done)))
    return {
        "backlog": count,
        "of": "event files" if as_files else "timesteps",
        "done": len(done),
        "done_of_older_half": halves[0],
        "done_of_newer_half": halves[1],
        "per_second": round(len(done) / (ended - began), 2),
        "runs_in_flight_at_most": max(seen.in_flight),
        "rss_before_mb": round(rss_before / 1e6, 1),
        "rss_peak_ratio": round(max(seen.rss) / rss_before, 3),
        "rss_end_ratio": round(seen.rss[-1] / rss_before, 3),
        "idle_latency_seconds": round(statistics.median(idle), 2),
        "latency_seconds": round(statistics.median(seen.latencies), 2),
        "latency_ratio": round(statistics.median(seen.latencies) / statistics.median(idle), 2),
        "eta_asked": len(errors),
        "eta_error": round(statistics.median(errors), 3) if errors else None,
        "eta_error_worst": round(max(errors), 3) if errors else None,
    }


def eta_errors(seen: Seen, began: float, ended: float, left_at_end: int) -> list[float]:
    """How far what was told was from the truth, each time, as a part of it."""
    errors = []
    for at, told, left in seen.told:
        if told is None or at - began < PACE_SECONDS or ended - at < PACE_SECONDS:
            continue
        rate = (left - left_at_end) / (ended - at)
        errors.append(abs(told - left / rate) / (left / rate))
    return errors


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="timesteps in the backlog")
    parser.add_argument("--until", type=int, default=1500, help="so many of them are waited for")
    parser.add_argument("--files", action="store_true", help="event files in front of the event-ingester")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="backlog-") as home:
        os.environ["ARCHIVER_HOME"] = home
        figures = asyncio.run(bench(Path(home), given.count, given.until, as_files=given.files))
    table = Table("", "")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    console.print(f"load of this machine at the end: {os.getloadavg()[0]:.1f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
