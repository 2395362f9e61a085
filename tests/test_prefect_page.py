"""What the page about the Prefect UI says of states and their messages, word by word: each of them is brought about."""

import asyncio
import os
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelling, Completed, Late, Pending, Running
from redis.exceptions import ConnectionError as RedisConnectionError

from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.lease import hold
from blocks.messages import Ingested, LogEvent
from blocks.object_store import ObjectStore
from blocks.settings import Settings, get_settings
from flows import executions, shares, sweep, upload
from flows.dispatch import upload_worker
from flows.upload import OBJECT_STORE, lease_name
from flows.watch import event_ingester
from tests.working import PATIENCE, announced, drop, flow_runs, until, working

pytest_plugins = ["tests.prefect_server"]

pytestmark = pytest.mark.soak

PAGE = Path(__file__).parent.parent / "docs" / "prefect.md"
# They need no explanation.
PLAIN = {"Running", "Completed", "Cancelling"}

SLOW = 5_000_000  # bytes per image: two parts, the second of which waits ten seconds


class Row(NamedTuple):
    """What the page says of a state: its names, and its message as a pattern."""

    names: tuple[str, ...]
    message: str

    @classmethod
    def of(cls, line: str) -> Self:
        names, message, _ = (cell.strip() for cell in line.removeprefix("|").split("|", 2))
        # Words of the message are in backticks; other words stand for what differs, as a number and an ellipsis do.
        parts = [re.escape(part) if place % 2 else ".*" for place, part in enumerate(message.split("`")) if part]
        pattern = re.sub(r"\d+", r"\\d+", "".join(parts)).replace("…", ".*")
        pattern = pattern.replace(re.escape("upload-worker@host"), r"\S+@\S+")
        return cls(tuple(re.findall(r"\*(\w+)\*", names)), pattern)

    def is_about(self, state: State[Any]) -> bool:
        return state.name in self.names and re.match(self.message, state.message or "") is not None


def table() -> list[Row]:
    """The page's table of states, but for those of the flight check, which has tests of its own."""
    section = PAGE.read_text().partition("## What a state means\n")[2].partition("\n## ")[0]
    lines = section.splitlines()
    return [Row.of(line) for line in lines if line.startswith("| *") and "(flight check)" not in line]


class Operator:
    """Looks at the runs, and brings them about."""

    def __init__(self, settings: Settings, log: EventLog, store: ObjectStore, client: PrefectClient) -> None:
        self.settings = settings
        self.log = log
        self.store = store
        self.client = client
        self.seen: dict[str, State[Any]] = {}

    async def look(self) -> None:
        """Take every state that any run ever had."""
        for run in await flow_runs():
            for state in await self.client.read_flow_run_states(run.id):
                self.seen[str(state.id)] = state

    async def sees(self, name: str, message: str = "") -> None:
        """Wait until a run has been in this state."""
        async with asyncio.timeout(PATIENCE):
            while not any(state.name == name and message in (state.message or "") for state in self.seen.values()):
                await asyncio.sleep(0.2)
                await self.look()

    def announce(self, plate: int, size: int = 3000) -> ImagingEvent:
        """A timestep that was taken in, with images of so many bytes."""
        event = drop(self.settings, plate=plate, size=size)
        announced(self.log, event)
        return event

    async def slow_down(self) -> None:
        """Have uploads take long enough for something to happen meanwhile."""
        slow = self.store.model_copy(update={"bytes_per_second": 500_000})
        await slow.without_keys().asave(OBJECT_STORE, overwrite=True)

    async def uploading(self, event: ImagingEvent) -> FlowRun:
        """The run that uploads this timestep, once it does."""
        lease = lease_name(self.log, event.key)
        await until(lambda: self.log.redis.exists(lease), "the upload")
        (run,) = [run for run in await flow_runs() if str(event.timestep_id) in (run.idempotency_key or "")]
        return run

    async def starts_too_early(self, system: str) -> None:
        """Start an ingest by hand of an event file that may still be being written."""
        await ImagingSystem(settle_seconds=600).asave(system, overwrite=True)
        path = cast(Path, self.settings.data_dir) / system / "events" / "half.json"
        path.parent.mkdir(parents=True)
        path.write_text("{")
        ingest = await self.client.read_deployment_by_name("ingest-timestep/event-ingester")
        of_it = {"system": system, "event_file": "events/half.json"}
        await self.client.create_flow_run_from_deployment(ingest.id, parameters=of_it)

    def directory(self, event: ImagingEvent) -> Path:
        return cast(Path, self.settings.data_dir) / "prince" / event.img_dir


def test_the_page_tells_every_state_and_message_and_no_other(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVER_STAGING_BUDGET_BYTES", "10000")  # room for one timestep
    get_settings.cache_clear()

    async def test() -> list[State[Any]]:
        async with get_client() as client:
            operator = Operator(run_settings, event_log, object_store, client)
            await ingests(operator, monkeypatch)
            await uploads(operator, monkeypatch)
            await processes_that_end(operator, monkeypatch)
            await runs_that_wait(operator, monkeypatch)
            return list(operator.seen.values())

    page, told = table(), set()
    for state in asyncio.run(test()):
        if rows := [row for row in page if row.is_about(state)]:
            # Of several, that which says most.
            told.add(max(rows, key=lambda row: len(row.message)))
        else:
            assert state.name in PLAIN, f"the page does not tell {state.name}: {state.message}"
    unseen = set(page) - told
    assert not unseen, "the page tells what never was seen"


async def ingests(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that happens to an ingest."""
    await ImagingSystem(staging="always").asave("bowie", overwrite=True)
    append, away = EventLog.append, [RedisConnectionError("Redis is away")]

    def fail_once(log: EventLog, event: LogEvent) -> str:
        if event.type == Ingested.type and away:
            raise away.pop()
        return append(log, event)

    monkeypatch.setattr(EventLog, "append", fail_once)
    async with working(event_ingester, settings=operator.settings):
        drop(operator.settings, "prince")
        await operator.sees("AwaitingRetry", "Redis is away")
        drop(operator.settings, "nina", img_count=3)
        for _ in range(2):
            drop(operator.settings, "bowie")
        broken = drop(operator.settings, "ella")
        (cast(Path, operator.settings.data_dir) / "ella" / "events" / f"{broken.img_dir}.json").write_text("{")
        await operator.starts_too_early("miles")
        await operator.sees("AwaitingEventFile")
        await operator.sees("AwaitingImages")
        await operator.sees("AwaitingSpace")
        await operator.sees("Failed", "InvalidEventFile")
    # What was taken in is none of the uploads that follow.
    operator.log.redis.xgroup_setid(operator.log.stream, "upload-worker", "$")


async def uploads(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that happens to an upload while its worker lives."""
    (operator.directory(operator.announce(1)) / "surplus.tif").touch()
    taken, lacking, leased = (operator.announce(plate) for plate in (2, 3, 4))
    operator.store.client.put_object(Bucket=operator.store.bucket_name, Key=taken.key, Body=b"another's")
    (operator.directory(lacking) / "Img" / "0.tif").unlink()
    hanging, answers, statvfs = drop(operator.settings, "joni"), threading.Event(), os.statvfs
    announced(operator.log, hanging, "joni")
    monkeypatch.setattr(shares, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(os, "statvfs", lambda path: answers.wait() if "joni" in str(path) else statvfs(path))
    with hold(operator.log.redis, lease_name(operator.log, leased.key)):
        async with working(upload_worker, settings=operator.settings):
            await operator.sees("Failed", "InvalidEventFile: ")
            await operator.sees("Failed", "KeyTaken: ")
            await operator.sees("AwaitingRetry", "ImagesMissing: ")
            await operator.sees("AwaitingRetry", "LeaseTaken: ")
            await operator.sees("AwaitingRetry", "SystemAway: ")
            answers.set()
            # As after ten hours.
            monkeypatch.setattr(upload, "TRIES", 1)
            await operator.sees("Failed", "ImagesMissing: ")


async def processes_that_end(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to runs whose process ends, and to those that somebody cancels."""
    monkeypatch.setattr(executions, "BEAT_SECONDS", 1.0)
    await operator.slow_down()
    async with working(upload_worker, settings=operator.settings):
        run = await operator.uploading(operator.announce(5, SLOW))
        await operator.client.set_flow_run_state(run.id, Cancelling())  # the UI's Cancel
        await operator.sees("Cancelled")
        await operator.uploading(operator.announce(6, SLOW))
    await operator.sees("AwaitingRetry", "handed back")
    monkeypatch.setattr(sweep, "LOST_SECONDS", 0.0)
    deployment = await operator.client.read_deployment_by_name("upload-timestep/upload-worker")
    for key in ("a key", None):
        run = await operator.client.create_flow_run_from_deployment(deployment.id, idempotency_key=key)
        await operator.client.set_flow_run_state(run.id, Late(), force=True)
        await operator.client.set_flow_run_state(run.id, Running(), force=True)
    lost = await sweep.under_way("upload-worker", operator.client)
    await sweep.end_lost(lost, operator.client, operator.log)
    await operator.look()


async def runs_that_wait(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to runs before any process has them."""
    monkeypatch.setattr(sweep, "STRANDED_SECONDS", 0.0)
    client = operator.client
    queue = await client.create_work_queue("short-lived", work_pool_name="event-ingester")
    purge = (await client.read_deployment_by_name("purge-timesteps/event-ingester")).id
    await client.create_flow_run_from_deployment(purge, work_queue_name=queue.name)
    await client.delete_work_queue_by_id(queue.id)
    await sweep.end_stranded("event-ingester", client)
    one, two = [await client.create_flow_run_from_deployment(purge) for _ in range(2)]
    for run in (one, two):
        await client.set_flow_run_state(run.id, Pending())  # as the worker does that takes it
    await client.set_flow_run_state(one.id, Completed(), force=True)
    await operator.look()
