"""How soon event files are noticed, and what many old ones cost.

    .venv/bin/python bench/ingest.py [--files 100000] [--timesteps 20]

Part one: a start-up and rescans of one system with many event files that are all dealt with, in a process of its
own, so that its memory can be told. Part two: on a whole stack, the time from the moment an event file is renamed
into place until Prefect has a flow run for it.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parent.parent))

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from bench.surroundings import redis_server
from blocks.event_log import EventLog
from blocks.fingerprint import Fingerprint
from blocks.imaging_system import ImagingSystem
from blocks.settings import Settings
from flows import system_watch
from flows.runs import Runs
from flows.stack.mock_microscope import drop_timestep
from flows.stack.up import running_stack
from flows.system_watch import SystemWatch

SYSTEM = "prince"


class _EnoughError(Exception):
    """It was rescanned often enough."""


class _TimedWatch(SystemWatch):
    """Ends after some rescans, and remembers what each of them took (seconds of wall clock and processor)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rescans: list[tuple[float, float]] = []
        self.first_ended = 0.0

    async def _rescan(self) -> None:
        before = time.perf_counter(), time.process_time()
        await super()._rescan()
        self.rescans.append((time.perf_counter() - before[0], time.process_time() - before[1]))
        self.first_ended = self.first_ended or time.perf_counter()
        if len(self.rescans) == 6:
            raise _EnoughError


def make_old_files(events: Path, count: int, log: EventLog) -> None:
    """Event files that were taken in, and the register that says so."""
    events.mkdir(parents=True)
    system = ImagingSystem(name=SYSTEM, root=events.parent.parent)
    for number in range(count):
        (events / f"20261123_{number:06}_Plate004.json").write_text("{}")
    with log.redis.pipeline(transaction=False) as pipeline:
        for name, status in system.event_files():
            verdict = Fingerprint(file=Fingerprint.state_of(status)).model_dump_json()
            pipeline.hset(f"{log.stream}:event-files:{SYSTEM}", name, verdict)
        pipeline.execute()


async def _nothing_configured(name: str, root: Path) -> ImagingSystem:
    return ImagingSystem(name=name, root=root)


def watch_old_files(root: str, url: str, answer: Any) -> None:
    """The watch of a system, from its start on; runs in a process of its own."""
    system_watch.RESCAN_SECONDS = 0.1
    log = EventLog(url=SecretStr(url))
    watch = _TimedWatch(SYSTEM, Path(root), log, cast(Runs, None), _nothing_configured)
    begun = time.perf_counter()
    with suppress(ExceptionGroup):
        asyncio.run(watch.run())
    again = watch.rescans[1:]
    answer.send(
        {
            "start_seconds": watch.first_ended - begun,
            "rescan_seconds": max(wall for wall, _ in again),
            "rescan_cpu_seconds": max(cpu for _, cpu in again),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )


def measure_old_files(files: int) -> dict[str, float]:
    """What `files` event files that are dealt with cost at the start and at every rescan."""
    with tempfile.TemporaryDirectory() as home, redis_server(Path(home)) as url:
        make_old_files(Path(home, "root", SYSTEM, "events"), files, EventLog(url=SecretStr(url)))
        here, there = multiprocessing.Pipe(duplex=False)
        # Not forked: its memory is to be its own.
        process = multiprocessing.get_context("spawn").Process(
            target=watch_old_files, args=(str(Path(home, "root")), url, there)
        )
        process.start()
        there.close()
        try:
            return cast(dict[str, float], here.recv())
        finally:
            process.join(10)


async def measure_detection(timesteps: int) -> list[float]:
    """Seconds from an event file that comes to its flow run, one timestep after the other."""
    delays = []
    with tempfile.TemporaryDirectory() as home:
        os.environ["ARCHIVER_HOME"] = home
        async with running_stack(Settings(home=Path(home)), trial=True) as stack:
            root = cast(Path, stack.settings.data_dir)
            with temporary_settings({PREFECT_API_URL: stack.settings.prefect_api_url}):
                for number in range(timesteps + 1):
                    dropped = drop_timestep(
                        root, SYSTEM, images=1, image_bytes=1000, timestamp=datetime.now(UTC), position=number + 1
                    )
                    run = await _run_of(f"ingest {SYSTEM} events/{dropped.event_file.name}")
                    delays.append((cast(datetime, run.created) - dropped.at).total_seconds())
                    await asyncio.sleep(1)
    return delays[1:]  # the first one creates the system


async def _run_of(name: str) -> FlowRun:
    async with asyncio.timeout(60), get_client() as client:
        while True:
            for run in await client.read_flow_runs():
                if run.name == name:
                    return run
            await asyncio.sleep(0.1)


def main() -> int:
    """Measure, print a table, and the figures as one line of JSON; returns 1 where one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, help="event files that are dealt with")
    parser.add_argument("--timesteps", type=int, default=20, help="timesteps whose detection is timed")
    options = parser.parse_args()
    figures: dict[str, float] = {"files": options.files, **measure_old_files(options.files)}
    delays = asyncio.run(measure_detection(options.timesteps))
    figures |= {"detection_median_seconds": statistics.median(delays), "detection_worst_seconds": max(delays)}
    table = Table(title=f"{options.files} old event files; {options.timesteps} new timesteps")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("at most", justify="right")
    limits = {"start_seconds": 10, "peak_mib": 300, "rescan_seconds": 1, "detection_worst_seconds": 0.3}
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}", str(limits.get(name, "")))
    Console().print(table)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
    return int(any(figures[name] > limit for name, limit in limits.items()))


if __name__ == "__main__":
    sys.exit(main())
