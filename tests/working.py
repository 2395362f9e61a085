"""Entrypoints at work in this process, and what there is to see of them."""

import asyncio
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from blocks.event_file import ImagingEvent, parse_event_file
from blocks.event_log import Backlog, EventLog
from blocks.messages import EventData, Ingested, LogEvent
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from tests.events import document
from tests.images import tiff

PATIENCE = 120.0
AT = "2026-11-23 10:42:07"


def drop(settings: Settings, system: str = "prince", images: int = 2, size: int = 3000, **fields: Any) -> ImagingEvent:
    """Images, and then the event file that announces them; gives back what it says."""
    directory = cast(Path, settings.data_dir) / system
    timestep_id = uuid4()
    (directory / "events").mkdir(parents=True, exist_ok=True)
    (directory / timestep_id.hex / "Img").mkdir(parents=True)
    for number in range(images):
        (directory / timestep_id.hex / "Img" / f"{number}.tif").write_bytes(tiff(os.urandom(size)))
    known = {"timestep_id": str(timestep_id), "timestamp": f"{AT}Z", "img_count": images, "img_dir": timestep_id.hex}
    content = json.dumps(document(**(known | fields)), ensure_ascii=False)
    (directory / "events" / f"{timestep_id.hex}.json").write_text(content)
    return parse_event_file(content.encode(), cast(Any, None))


def announced(log: EventLog, event: ImagingEvent, system: str = "prince") -> str:
    """It was ingested already; gives back its entry."""
    data = Ingested(timestep_id=event.timestep_id, system=system, event_file="events/1.json", event=event)
    return log.append(LogEvent.of(data, "test"))


def said(log: EventLog, *types: type[EventData]) -> list[Any]:
    """What the stream says of these types, oldest first."""
    entries = cast(list[tuple[str, dict[str, str]]], log.redis.xrange(log.stream))
    data = (LogEvent.model_validate_json(fields["event"]).data for _, fields in entries)
    return [one for one in data if isinstance(one, types)]


def unpacked(store: ObjectStore, key: str) -> dict[str, bytes]:
    content = store.client.get_object(Bucket=store.bucket_name, Key=key)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name: cast(io.BufferedReader, tar.extractfile(member)).read() for member in tar}


def assert_stored(settings: Settings, store: ObjectStore, event: ImagingEvent, system: str = "prince") -> None:
    """Each image, byte for byte, and all that the microscope said."""
    members = unpacked(store, event.key)
    directory = cast(Path, settings.data_dir) / system / event.img_dir
    images = {f"./{path.relative_to(directory)}": path.read_bytes() for path in directory.rglob("*.tif")}
    assert {name: members.get(name) for name in images} == images
    assert json.loads(members["./metadata.json"]) == {"system": system, **event.document()}


@asynccontextmanager
async def working(*entrypoints: Callable[[Settings], Any], settings: Settings) -> AsyncIterator[None]:
    """Entrypoints at work, which must not end by themselves."""
    tasks = [asyncio.create_task(entrypoint(settings)) for entrypoint in entrypoints]
    try:
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=20)


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE} s"
        await asyncio.sleep(0.1)


async def when(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until something is true of the Prefect server."""
    async with asyncio.timeout(PATIENCE):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.2)


async def flow_runs() -> list[FlowRun]:
    async with get_client() as client:
        return await client.read_flow_runs()


async def final_states() -> list[str]:
    """The states of all flow runs once they have ended."""
    async with asyncio.timeout(PATIENCE):
        while True:
            states = [run.state for run in await flow_runs()]
            if all(state is not None and state.is_final() for state in states):
                return sorted(str(state.name) for state in states if state is not None)
            await asyncio.sleep(0.2)


def is_done(log: EventLog) -> bool:
    return log.backlog("upload-worker") == Backlog(0, 0, 0)


def start_worker(log_file: Path, consumer: str = "another host") -> subprocess.Popen[bytes]:
    """An upload-worker in a process of its own."""
    env = os.environ | {"PREFECT_WORKER_QUERY_SECONDS": "1", "ARCHIVER_CONSUMER": consumer}
    with log_file.open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "flows.cli", "upload-worker"], env=env, stdout=log, stderr=log)
