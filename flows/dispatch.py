"""The upload-worker: stream → one upload-timestep flow run per timestep."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Literal, cast

import httpx
from prefect.client.schemas.objects import StateType
from redis.exceptions import RedisError

from blocks.event_log import Entry, EventLog, UnreadableEntry
from blocks.messages import Failed, Ingested
from blocks.settings import Settings
from flows.entrypoint import consumer_name, entrypoint
from flows.runs import Runs
from flows.upload import conclude

logger = logging.getLogger(__name__)

# When what a dispatcher held is taken over, after it was heard of last (seconds).
TAKE_OVER_SECONDS = 60.0
# How many entries of the stream one dispatcher holds at most. Of most it knows only the id.
HELD_AT_MOST = 20_000
# How many runs wait for their retry, or are under way, at most. More wait in the stream.
IN_FLIGHT_AT_MOST = 1000
# If no place became free for this long (seconds), runs are created for others to take, so many at a time.
PATIENCE_SECONDS = 3.0
AHEAD = 4


class UploadDispatcher:
    """Gives every ingested timestep of the stream an upload-timestep run, a bounded number at a time.

    An entry stays pending until its run acknowledged it, which the run does once the outcome is
    in the stream. So nothing is lost with this process. Of a backlog, the oldest and the newest are
    taken in turn: new timesteps need not wait for its end, and it gets shorter all the same.
    """

    group: Literal["upload-worker"] = "upload-worker"

    def __init__(self, log: EventLog, runs: Runs) -> None:
        self._log = log
        self._runs = runs
        self._consumer = consumer_name("upload-worker")
        # Entries held without a run, and when to look again at those with one.
        self._waiting: deque[str] = deque()
        self._looks: dict[str, float] = {}
        self._queued: set[str] = set()
        self._wake = asyncio.Event()
        self._newest_next = False
        self._ended_at = time.monotonic()
        self._driven: str | None = None
        self._took_over = float("-inf")

    async def run(self) -> None:
        """Dispatch until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_patiently(self.read))
            group.create_task(_patiently(self._keep_starting))

    # --- from the stream

    async def read(self, wait_seconds: float = 1.0) -> None:
        """Take what is new in the stream, and what nobody looks after any more."""
        now = time.monotonic()
        if now - self._took_over > TAKE_OVER_SECONDS / 3:
            # This tells the others, too, that this dispatcher is there.
            await asyncio.to_thread(
                self._log.take_over_from_absent, self.group, self._consumer, absent_seconds=TAKE_OVER_SECONDS
            )
            await self._remember()
            self._took_over = now
        if len(self._waiting) >= HELD_AT_MOST:
            await asyncio.sleep(wait_seconds)
            return
        await self._hold(
            await asyncio.to_thread(self._log.read, self.group, self._consumer, count=500, wait_seconds=wait_seconds)
        )

    async def _remember(self) -> None:
        """Find what a process of this name was given and this one does not know: an answer of Redis may be lost.

        What a former process held is found so, and what was taken over.
        """
        given = await asyncio.to_thread(self._log.held_ids, self.group, self._consumer)
        if self._known().issuperset(given):
            return
        last = "0"
        while page := await asyncio.to_thread(self._log.held, self.group, self._consumer, count=500, after=last):
            await self._hold(page)
            last = page[-1].id

    async def _hold(self, entries: list[Entry]) -> None:
        known = self._known()
        # First of all, as Redis may be away for what follows.
        self._waiting.extend(entry.id for entry in entries if entry.type == Ingested.type and entry.id not in known)
        if self._waiting:
            self._wake.set()
        others = [entry.id for entry in entries if entry.type != Ingested.type]
        await asyncio.to_thread(self._log.acknowledge, self.group, *others)

    def _known(self) -> set[str | None]:
        return {*self._waiting, *self._looks, self._driven}

    # --- to runs

    async def _keep_starting(self) -> None:
        self._wake.clear()
        await self.start()
        # Not asyncio.wait_for: before Python 3.12, one that is cancelled as it wakes forgets that it was.
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._wake.wait()

    async def start(self) -> None:
        """Start what there is room for, and see to what is in flight for long."""
        now = time.monotonic()
        for id in [id for id, at in self._looks.items() if at <= now]:
            await self._look(id)
        while self._waiting and len(self._looks) < IN_FLIGHT_AT_MOST:
            may_queue = len(self._queued) < AHEAD and time.monotonic() - self._ended_at > PATIENCE_SECONDS
            id = self._waiting.pop() if self._newest_next else self._waiting.popleft()
            self._driven = id
            try:
                is_started = await self._drive(id, may_queue=may_queue)
            except BaseException:
                self._waiting.append(id)
                raise
            finally:
                self._driven = None
            if not is_started:
                self._waiting.append(id) if self._newest_next else self._waiting.appendleft(id)
                return
            self._newest_next = not self._newest_next

    async def _look(self, id: str) -> None:
        if await asyncio.to_thread(self._log.is_pending, self.group, id):
            await self._drive(id, may_queue=True)
        else:
            self._forget(id)

    def _forget(self, id: str) -> None:
        self._looks.pop(id, None)
        self._queued.discard(id)

    async def _drive(self, id: str, *, may_queue: bool) -> bool:
        """See to the entry's run. Returns whether it needs no place any more."""
        entry = await asyncio.to_thread(self._log.entry, id)
        if entry is None:
            logger.error("Removed from the stream before it was uploaded: %s", id)
            await asyncio.to_thread(self._log.acknowledge, self.group, id)
            self._forget(id)
            return True
        try:
            timestep = cast(Ingested, entry.decode().data)
        except UnreadableEntry as error:
            about = {"timestep_id": entry.fields.get("timestep_id")}
            logger.exception("Set aside: the upload-worker can't read it", extra=about)
            await asyncio.to_thread(self._log.dead_letters(self.group).add, entry, str(error))
            self._forget(id)
            return True
        driven = await self._runs.drive(
            work=f"{timestep.timestep_id}:{id}",
            name=f"upload {timestep.title}",
            # As text: Prefect resolves `$ref` and `__prefect_kind` in parameters, wherever they stand.
            parameters={"timestep": timestep.model_dump_json(), "entry_id": id},
            tags=[timestep.system, timestep.event.experiment_id],
            is_done=lambda: not self._log.is_pending(self.group, id),
            may_queue=may_queue,
            on_end=lambda: self._look_at_once(id),
        )
        if driven is None:
            return False
        if driven.state_type == StateType.CANCELLED:
            reason = "its flow run was cancelled in Prefect"
            failed = Failed(
                timestep_id=timestep.timestep_id,
                system=timestep.system,
                stage="upload",
                reason=reason,
                event=timestep.event,
                flow_run_id=driven.flow_run_id,
            )
            await asyncio.to_thread(conclude, failed, id, self._log)
            self._forget(id)
            return True
        self._looks[id] = time.monotonic() + driven.look_in
        if driven.state_type == StateType.SCHEDULED and not driven.is_retry:
            self._queued.add(id)
        else:
            self._queued.discard(id)
        return True

    def _look_at_once(self, id: str) -> None:
        self._ended_at = time.monotonic()
        if id in self._looks:
            self._looks[id] = self._ended_at
        self._wake.set()


async def _patiently(step: Callable[[], Coroutine[None, None, None]]) -> None:
    """Repeat a step until cancelled. What it works on waits in the stream while a service is away."""
    while True:
        try:
            await step()
        except (httpx.HTTPError, RedisError) as error:
            logger.warning("Timesteps wait, because a service is away: %s: %s", type(error).__name__, error)
            await asyncio.sleep(2)


async def upload_worker(settings: Settings) -> None:
    """The entrypoint: dispatch the stream's timesteps, and execute upload runs, until a signal."""
    settings.require("data_dir", "aws_access_key_id", "aws_secret_access_key")
    async with entrypoint("upload-worker", settings) as this:
        await this.serve(UploadDispatcher(this.log, this.runs("upload-timestep/upload-worker")).run)
