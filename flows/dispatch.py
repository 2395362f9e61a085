"""The upload-worker: stream → one upload-timestep flow run per timestep."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Literal, cast

import httpx
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from redis.exceptions import RedisError

from blocks.event_log import Entry, EventLog, UnreadableEntry
from blocks.messages import Failed, Ingested
from blocks.reach import queue_of
from blocks.settings import Settings
from flows.entrypoint import consumer_name, entrypoint
from flows.in_flight import InFlight
from flows.queues import polled_queues
from flows.runs import Runs
from flows.upload import conclude
from flows.waiting import Lane, Waiting

logger = logging.getLogger(__name__)

# When what a dispatcher held is taken over, after it was heard of last (seconds).
TAKE_OVER_SECONDS = 60.0
# How many entries of the stream one dispatcher holds at most that it could begin. Of most it knows only the id.
HELD_AT_MOST = 20_000
# How many runs of a system wait for their retry, or are under way, at most. More wait in the stream.
IN_FLIGHT_AT_MOST = 1000
# If no place became free for this long (seconds), or others are there, runs are created for them, so many at a time.
PATIENCE_SECONDS = 3.0
AHEAD = 4
# So many runs of a system that can't be begun here wait in its queue at a time.
AHEAD_ELSEWHERE = 16


class UploadDispatcher:
    """Gives every ingested timestep of the stream an upload-timestep run, a bounded number at a time.

    An entry stays pending until its run acknowledged it, which the run does once the outcome is
    in the stream. So nothing is lost with this process. Of a backlog, the oldest and the newest are
    taken in turn: new timesteps need not wait for its end, and it gets shorter all the same.

    Every run belongs to its system's work queue. Of a system that this host does not reach, or whose queue is paused
    or limited, some runs at a time are left there for whoever may take them. What waits behind these holds up no
    other system.
    """

    group: Literal["upload-worker"] = "upload-worker"

    def __init__(self, log: EventLog, runs: Runs, reaches: Callable[[str], bool] = lambda _system: True) -> None:
        self._log = log
        self._runs = runs
        self._reaches = reaches
        self._consumer = consumer_name("upload-worker")
        # Entries held without a run, and with one.
        self._waiting = Waiting()
        self._in_flight = InFlight()
        # The systems of which runs can be begun here.
        self._here: set[str] = set()
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
        if self._waiting.count(self._here) >= HELD_AT_MOST:
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
        for entry in entries:
            if entry.type == Ingested.type and entry.id not in known:
                self._waiting.add(entry.id, Lane.of(entry))
                self._wake.set()
        others = [entry.id for entry in entries if entry.type != Ingested.type]
        await asyncio.to_thread(self._log.acknowledge, self.group, *others)

    def _known(self) -> set[str | None]:
        return {*self._waiting, *self._in_flight, self._driven}

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
        for id in self._in_flight.to_look_at():
            await self._look(id)
        systems = self._waiting.systems
        self._here = {system for system in systems if await self._may_begin(system)}
        while taken := self._take(self._here):
            is_ahead = self._in_flight.queued(self._here) >= AHEAD
            is_stuck = time.monotonic() - self._ended_at > PATIENCE_SECONDS
            may_queue = not is_ahead and (is_stuck or self._runs.are_shared)
            if not await self._give_run(*taken, may_begin=True, may_queue=may_queue):
                break
        for system in systems - self._here:
            while self._in_flight.queued({system}) < AHEAD_ELSEWHERE and (taken := self._take({system})):
                await self._give_run(*taken, may_begin=False, may_queue=True)

    async def _may_begin(self, system: str) -> bool:
        """Whether runs of a system may be begun here, where there is a place."""
        # What can't be read belongs to no system.
        return not system or (self._reaches(system) and not await self._runs.has_to_queue(queue_of(system)))

    def _take(self, systems: set[str]) -> tuple[str, Lane] | None:
        with_room = {system for system in systems if self._in_flight.count(system) < IN_FLIGHT_AT_MOST}
        return self._waiting.take(with_room, newest=self._newest_next)

    async def _give_run(self, id: str, lane: Lane, *, may_begin: bool, may_queue: bool) -> bool:
        """Give a run to an entry that was taken from what waits; if it gets none, it waits as before."""
        self._driven = id
        is_started = False
        try:
            is_started = await self._drive(id, lane, may_begin=may_begin, may_queue=may_queue)
        finally:
            self._driven = None
            if not is_started:
                self._waiting.put_back(id, lane, newest=self._newest_next)
        if is_started:
            self._newest_next = not self._newest_next
        return is_started

    async def _look(self, id: str) -> None:
        if not await asyncio.to_thread(self._log.is_pending, self.group, id):
            self._in_flight.forget(id)
        elif self._in_flight.is_to_drive(id):
            lane = self._in_flight.lane(id)
            await self._drive(id, lane, may_begin=await self._may_begin(lane.system), may_queue=True)

    async def _drive(self, id: str, lane: Lane, *, may_begin: bool, may_queue: bool) -> bool:
        """See to the entry's run. Returns whether it needs no place any more."""
        entry = await asyncio.to_thread(self._log.entry, id)
        if entry is None:
            logger.error("Removed from the stream before it was uploaded: %s", id)
            await asyncio.to_thread(self._log.acknowledge, self.group, id)
            self._in_flight.forget(id)
            return True
        try:
            timestep = cast(Ingested, entry.decode().data)
        except UnreadableEntry as error:
            about = {"timestep_id": entry.fields.get("timestep_id")}
            logger.exception("Set aside: the upload-worker can't read it", extra=about)
            await asyncio.to_thread(self._log.dead_letters(self.group).add, entry, str(error))
            self._in_flight.forget(id)
            return True
        driven = await self._runs.drive(
            work=f"{timestep.timestep_id}:{id}",
            name=f"upload {timestep.title}",
            # As text: Prefect resolves `$ref` and `__prefect_kind` in parameters, wherever they stand.
            parameters={"timestep": timestep.model_dump_json(), "entry_id": id},
            tags=[timestep.system, timestep.event.experiment_id],
            is_done=lambda: not self._log.is_pending(self.group, id),
            queue=queue_of(timestep.system),
            may_begin=may_begin,
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
            self._in_flight.forget(id)
            return True
        self._in_flight.put(id, lane, driven)
        return True

    def _look_at_once(self, id: str) -> None:
        self._ended_at = time.monotonic()
        self._in_flight.look_at_once(id)
        self._wake.set()


async def _patiently(step: Callable[[], Coroutine[None, None, None]]) -> None:
    """Repeat a step until cancelled. What it works on waits in the stream while a service is away."""
    while True:
        try:
            await step()
        except (httpx.HTTPError, ObjectNotFound, RedisError) as error:
            # Also where a deployment, a queue or a run was deleted: `archiver init` makes the first two again.
            logger.warning("Timesteps wait, because a service is away: %s: %s", type(error).__name__, error)
            await asyncio.sleep(2)


async def upload_worker(settings: Settings) -> None:
    """The entrypoint: dispatch the stream's timesteps, and execute upload runs, until a signal."""
    settings.require("data_dir", "aws_access_key_id", "aws_secret_access_key")
    async with entrypoint("upload-worker", settings, polled_queues(settings)) as this:
        await this.serve(UploadDispatcher(this.log, this.runs("upload-timestep/upload-worker"), settings.reaches).run)
