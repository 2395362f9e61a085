"""What Prefect costs a timestep: latency when idle, rate of a burst, CPU per process; beside a stock process worker.

The whole stack on this machine, object storage in memory. One JSON object comes last; `rate_ratio` is the rate of
the burst over that of two stock process workers on the same work, with the same limits, right after it.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import psutil
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.deployments import arun_deployment
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker
from rich.console import Console
from rich.table import Table

from blocks.event_log import EventLog
from blocks.messages import Ingested, LogEvent, Uploaded
from blocks.settings import Settings
from flows.stack.mock_microscope import Dropped, drop_timestep
from flows.stack.up import Stack, running_stack

SYSTEM = "prince"
START = datetime(2026, 11, 23, 10, 0, tzinfo=UTC)
PATIENCE = 900.0
# Longer than images are looked at for a second time.
SETTLE_SECONDS = 2.5
console = Console()


class Followed:
    """What the stream says, from now on."""

    def __init__(self, log: EventLog) -> None:
        self._redis = log.redis
        self._stream = log.stream
        self._last = str(cast(dict[str, str], self._redis.xinfo_stream(self._stream))["last-generated-id"])

    def events(self) -> Iterator[LogEvent]:
        """Each event as it comes."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            answer = cast(list[Any], self._redis.xread({self._stream: self._last}, block=1000) or [])
            for _, entries in answer:
                for id, fields in entries:
                    self._last = id
                    yield LogEvent.model_validate_json(fields["event"])
        raise TimeoutError(f"not all arrived within {PATIENCE:.0f} s")

    def uploads(self, wanted: set[UUID], on_ingested: Callable[[LogEvent], None] = lambda _: None) -> dict[UUID, float]:
        """When the object of each of these timesteps was proven, in seconds since the epoch."""
        found: dict[UUID, float] = {}
        for event in self.events():
            if isinstance(event.data, Ingested) and event.data.timestep_id in wanted:
                on_ingested(event)
            if isinstance(event.data, Uploaded) and event.data.timestep_id in wanted:
                found[event.data.timestep_id] = event.data.proof.verified_at.timestamp()
                if len(found) == len(wanted):
                    break
        return found


class Microscope:
    """Drops small timesteps. Their images are there for a while before they are announced, as with a real one."""

    def __init__(self, root: Path, images: int, image_bytes: int) -> None:
        self._root = root
        self._images = images
        self._image_bytes = image_bytes
        self._dropped = 0

    def drop(self, count: int = 1) -> tuple[set[UUID], float]:
        """Announce timesteps, all at once; returns their ids, and when (seconds since the epoch)."""
        with tempfile.TemporaryDirectory(dir=self._root.parent) as aside:
            (Path(aside) / SYSTEM).mkdir()
            dropped = [self._write(Path(aside)) for _ in range(count)]
            for one in dropped:
                one.image_dir.rename(self._root / SYSTEM / one.image_dir.name)
            time.sleep(SETTLE_SECONDS)
            began = time.time()
            for one in dropped:
                one.event_file.rename(self._root / SYSTEM / "events" / one.event_file.name)
        return {one.timestep_id for one in dropped}, began

    def _write(self, root: Path) -> Dropped:
        self._dropped += 1
        at = START + timedelta(seconds=self._dropped)
        return drop_timestep(root, SYSTEM, images=self._images, image_bytes=self._image_bytes, timestamp=at)


def cpu_seconds() -> Counter[str]:
    """CPU time used so far by each part of the stack, its children included, and by this process."""
    used: Counter[str] = Counter()
    for child in psutil.Process().children():
        name = _name(child)
        for process in (child, *child.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            used[name] += times.user + times.system + times.children_user + times.children_system
    return used


def _name(process: psutil.Process) -> str:
    try:
        command = process.cmdline()
    except psutil.ZombieProcess:
        return "a process that ended"
    if "flows.cli" in command:
        return command[command.index("flows.cli") + 1]
    if "worker" in command:
        return "stock worker"
    program = Path(command[0]).name
    if program.startswith(("postgres", "redis-server")):
        return program.split(":")[0]
    return "s3 (moto)" if "moto.server" in command else "prefect server"


@contextmanager
def stock_workers(stack: Stack, limit: int) -> Iterator[None]:
    """Two of Prefect's process workers, one for each stage."""
    env = {**os.environ, **stack.env, "PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_LOGGING_LEVEL": "WARNING"}
    start = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--limit", str(limit)]
    log = stack.settings.home / "logs" / "stock.log"
    with log.open("wb") as output:
        workers = [
            subprocess.Popen([*start, "--pool", pool], env=env, stdout=output, stderr=output)
            for pool in ("stock-ingest", "stock-upload")
        ]
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(60)


async def deploy_stock(client: PrefectClient) -> None:
    """The same flows once more, for process pools."""
    template = ProcessWorker.get_default_base_job_template()
    for pool, name in (
        ("stock-ingest", "ingest-timestep/event-ingester"),
        ("stock-upload", "upload-timestep/upload-worker"),
    ):
        await client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
        ours = await client.read_deployment_by_name(name)
        await client.create_deployment(
            ours.flow_id,
            "stock",
            work_pool_name=pool,
            entrypoint=ours.entrypoint,
            path=str(Path(__file__).parent.parent),
            pull_steps=[],
            parameter_openapi_schema=ours.parameter_openapi_schema,
        )


async def run_stock(stack: Stack, client: PrefectClient, log: EventLog, microscope: Microscope, count: int) -> float:
    """The time (seconds) that process workers take for the same work, once they are there."""
    await stack.supervisor.stop("event-ingester", "upload-worker")
    await deploy_stock(client)
    root = cast(Path, stack.settings.data_dir) / SYSTEM / "events"
    with stock_workers(stack, 4):
        for pool in ("stock-ingest", "stock-upload"):
            while not await client.read_workers_for_work_pool(pool):  # noqa: ASYNC110 -- it is another process
                await asyncio.sleep(0.2)
        known = {path.name for path in root.iterdir()}
        followed = Followed(log)
        loop = asyncio.get_running_loop()
        wanted, began = await asyncio.to_thread(microscope.drop, count)
        files = [path.name for path in root.iterdir() if path.name not in known]

        async def start(name: str, parameters: dict[str, Any]) -> None:
            await arun_deployment(name, client=client, parameters=parameters, timeout=0, as_subflow=False)

        def upload(event: LogEvent) -> None:
            parameters = {"timestep": cast(Ingested, event.data).model_dump_json()}
            asyncio.run_coroutine_threadsafe(start("upload-timestep/stock", parameters), loop)

        following = asyncio.create_task(asyncio.to_thread(followed.uploads, wanted, upload))
        for file in files:
            await start("ingest-timestep/stock", {"system": SYSTEM, "event_file": f"events/{file}"})
        return max((await following).values()) - began


async def bench(home: Path, idle: int, burst: int, stock: int, images: int, image_bytes: int) -> dict[str, Any]:
    """Run all of it; returns the figures."""
    settings = Settings(home=home)
    (home / "data" / SYSTEM / "events").mkdir(parents=True)
    async with running_stack(settings, trial=True) as stack:
        log = EventLog.from_settings(stack.settings)
        microscope = Microscope(cast(Path, stack.settings.data_dir), images, image_bytes)
        followed = Followed(log)
        for _ in range(3):  # the first of each process imports what it needs
            await asyncio.to_thread(followed.uploads, (await asyncio.to_thread(microscope.drop))[0])

        latencies = []
        before = cpu_seconds()
        for _ in range(idle):
            wanted, began = await asyncio.to_thread(microscope.drop)
            latencies += [at - began for at in (await asyncio.to_thread(followed.uploads, wanted)).values()]
        idle_cpu = cpu_seconds() - before

        before = cpu_seconds()
        wanted, began = await asyncio.to_thread(microscope.drop, burst)
        verified = await asyncio.to_thread(followed.uploads, wanted)
        seconds = max(verified.values()) - began
        burst_cpu = cpu_seconds() - before

        stock_seconds = None
        if stock:
            with temporary_settings({PREFECT_API_URL: stack.settings.prefect_api_url}):
                client = get_client()
            async with client:
                stock_seconds = await run_stock(stack, client, log, microscope, stock)
        log.close()

    _print_cpu(idle_cpu, idle, burst_cpu, burst)
    quantiles = statistics.quantiles(latencies, n=20)
    figures: dict[str, Any] = {
        "idle_timesteps": idle,
        "idle_median_seconds": round(statistics.median(latencies), 3),
        "idle_p95_seconds": round(quantiles[18], 3),
        "burst_timesteps": burst,
        "burst_per_second": round(burst / seconds, 2),
        "burst_cpu_seconds_per_timestep": round(sum(burst_cpu.values()) / burst, 3),
    }
    if stock_seconds is not None:
        figures["stock_timesteps"] = stock
        figures["stock_per_second"] = round(stock / stock_seconds, 3)
        figures["rate_ratio"] = round(burst / seconds / (stock / stock_seconds), 1)
    return figures


def _print_cpu(idle_cpu: Counter[str], idle: int, burst_cpu: Counter[str], burst: int) -> None:
    table = Table("process", "CPU s per timestep, one at a time", "CPU s per timestep, burst")
    for name in sorted({*idle_cpu, *burst_cpu}, key=lambda name: -burst_cpu[name]):
        table.add_row(name, f"{idle_cpu[name] / idle:.3f}", f"{burst_cpu[name] / burst:.3f}")
    console.print(table)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--idle", type=int, default=40, help="timesteps, one at a time")
    parser.add_argument("--burst", type=int, default=100, help="timesteps, all at once")
    parser.add_argument("--stock", type=int, default=8, help="timesteps for the stock worker; 0 for none")
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--image-bytes", type=int, default=20_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flow-overhead-") as home:
        os.environ["ARCHIVER_HOME"] = home
        figures = asyncio.run(bench(Path(home), given.idle, given.burst, given.stock, given.images, given.image_bytes))
    console.print(f"load of this machine at the end: {os.getloadavg()[0]:.1f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
