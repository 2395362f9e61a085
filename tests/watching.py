"""The watcher at work on real directories, and a microscope that drops timesteps there."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, cast
from uuid import uuid4

from prefect.client.schemas.objects import StateType

from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.event_log import EventLog
from blocks.image_directory import NotAllowed
from blocks.imaging_system import ImagesMissing, ImagingSystem
from flows.outcome import reject, take_in, with_images
from flows.runs import Driven, Runs
from flows.watch import Watcher
from tests.events import document
from tests.images import tiff

PATIENCE = 20.0


class Ingest:
    """In place of Runs: does what an ingest-timestep run does, without the seconds that Prefect takes for it."""

    def __init__(self, root: Path, log: EventLog) -> None:
        self._root = root
        self._log = log
        self.runs: Counter[str] = Counter()
        self.keys: list[str] = []
        self.cancels = 0
        self.cancelled: set[str] = set()
        self.failures: list[Exception] = []
        self.watching: Literal["auto", "native", "polling"] = "native"
        self.strictness: Literal["strict", "accept"] = "strict"
        self.seconds = 0.0
        self.state_type = StateType.RUNNING
        self.at_once = self.most_at_once = 0
        self._running: set[asyncio.Task[None]] = set()

    async def configured(self, name: str, root: Path) -> ImagingSystem:
        return ImagingSystem(name=name, root=root, watching=self.watching, strictness=self.strictness)

    async def drive(self, work: str, name: str, parameters: dict[str, Any], **_rest: object) -> Driven:
        if self.failures:
            raise self.failures.pop(0)
        if self.cancels:
            self.cancels -= 1
            self.cancelled.add(work)
        self.keys.append(work)
        if work in self.cancelled:
            return Driven(uuid4(), StateType.CANCELLED, False, 0.0)
        self.runs[f"{parameters['system']}/{parameters['event_file']}"] += 1
        if not self.seconds:
            await asyncio.to_thread(self._ingest, **parameters)
            return Driven(uuid4(), StateType.COMPLETED, False, 0.0)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self._running.add(asyncio.create_task(self._run_for_a_while(parameters)))
        return Driven(uuid4(), self.state_type, False, 0.0)

    async def _run_for_a_while(self, parameters: dict[str, Any]) -> None:
        """Like a run in the pool: whoever asked for it does not wait for its end."""
        await asyncio.sleep(self.seconds)
        await asyncio.to_thread(self._ingest, **parameters)
        self.at_once -= 1

    def _ingest(self, system: str, event_file: str) -> None:
        source = ImagingSystem(name=system, root=self._root, strictness=self.strictness)
        event: ImagingEvent | None = None
        seen = source.fingerprint(event_file)
        try:
            event = source.read_event(event_file)
            seen = with_images(seen, source, event_file, event)
            warnings = source.judge(source.survey(event), in_time=False)
            take_in(source, event_file, event, seen, self._log, warnings)
        except (InvalidEventFile, ImagesMissing) as error:
            reject(source, event_file, event, str(error), seen, self._log, may_pass=isinstance(error, NotAllowed))


class Microscope:
    """Drops timesteps of one image into a root."""

    def __init__(self, root: Path, name: str = "prince") -> None:
        self.directory = root / name
        self.events = self.directory / "events"
        self.events.mkdir(parents=True)

    def event(self, images: int = 1, **fields: Any) -> str:
        """The content of an event file whose images are there."""
        img_dir = f"t-{uuid4().hex}"
        for number in range(images):
            (self.directory / img_dir / "Img").mkdir(parents=True, exist_ok=True)
            (self.directory / img_dir / "Img" / f"{number}.tif").write_bytes(tiff())
        known = {"img_count": 1, "img_dir": img_dir}
        return json.dumps(document(**(known | fields)))

    def drop(self, name: str, **fields: Any) -> Path:
        path = self.events / name
        path.write_text(self.event(**fields))
        return path


@asynccontextmanager
async def watching(root: Path, log: EventLog, ingest: Ingest) -> AsyncIterator[None]:
    """A watcher at work, which must not end by itself."""
    task = asyncio.create_task(Watcher(root, log, cast(Runs, ingest), ingest.configured).run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        await asyncio.sleep(0.02)


def said(log: EventLog) -> list[tuple[str, str]]:
    """Type and event file of everything in the stream."""
    entries = cast(list[tuple[str, dict[str, str]]], log.redis.xrange(log.stream))
    data = [json.loads(fields["event"]) for _, fields in entries]
    return [(event["type"].split(".")[1], event["data"]["event_file"]) for event in data]


def taken_in(log: EventLog, *names: str) -> Callable[[], bool]:
    return lambda: {("ingested", f"events/{name}") for name in names} <= set(said(log))


def rejected(log: EventLog, name: str) -> Callable[[], bool]:
    return lambda: ("rejected", f"events/{name}") in said(log)
