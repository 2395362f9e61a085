"""One flow run per piece of work: created once, and again only when its run ended or died without doing it."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateDetails, StateType, WorkQueue
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.states import Running, Scheduled

from blocks.event_log import EventLog
from flows.loading import load
from flows.subject import timestep_of
from flows.worker import InProcessWorker

logger = logging.getLogger(__name__)

# Between two attempts of the same work (seconds): the first pause, doubled each time, up to the longest.
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 600.0
# How often a run that is under way is looked at (seconds).
LOOK_AGAIN_SECONDS = 15.0
# A change of the deployment or its queue in the UI counts after this long (seconds).
KNOWN_SECONDS = 10.0


@dataclass(frozen=True)
class _Deployment:
    """What is known of a deployment, and when it was asked for."""

    id: UUID
    flow: Flow[..., Any]
    is_limited: bool
    pool: str
    queue: str
    queues: dict[str, WorkQueue]
    at: float


@dataclass(frozen=True)
class _Wanted:
    """What a run shall be like."""

    name: str
    parameters: dict[str, Any]
    tags: list[str]
    queue: str | None


@dataclass(frozen=True)
class Driven:
    """How the work's newest run is doing, and in how many seconds to ask again."""

    flow_run_id: UUID
    state_type: StateType | None
    is_retry: bool
    look_in: float

    @property
    def has_begun(self) -> bool:
        """Whether anybody ever executed it: it may wait for its first place, as long as its queue is paused."""
        if self.state_type == StateType.SCHEDULED:
            return self.is_retry
        return self.state_type != StateType.PENDING


class Runs:
    """Creates the flow runs of one deployment, at most one live run per piece of work.

    With a worker of the deployment's pool, a run is executed there at once where a place is free. Then it
    is created as Running: no other worker can take it, and the server need not be told again. All others are
    Scheduled, for any worker of their queue.
    """

    def __init__(
        self, deployment: str, client: PrefectClient, log: EventLog, worker: InProcessWorker | None = None
    ) -> None:
        self._name = deployment
        self._client = client
        self._log = log
        self._worker = worker
        self._known: _Deployment | None = None

    @property
    def are_shared(self) -> bool:
        """Whether other workers are there for the same runs."""
        return self._worker is not None and self._worker.neighbours.count > 0

    async def has_to_queue(self, queue: str | None = None) -> bool:
        """Whether the runs of a queue, or of the deployment's own, can't be begun where they are created.

        What limits more than the pool does, or is paused, is heeded by the Prefect server when it hands out a queued
        run. And a deployment may have been put into another pool, whose workers execute it as they do.
        """
        deployment = await self._deployment()
        if self._worker is not None and deployment.pool != self._worker.pool:
            return True
        found = deployment.queues.get(queue or deployment.queue)
        return deployment.is_limited or (found is not None and (found.is_paused or found.concurrency_limit is not None))

    async def drive(
        self,
        work: str,
        name: str,
        parameters: dict[str, Any],
        tags: list[str],
        is_done: Callable[[], bool],
        *,
        queue: str | None = None,
        may_begin: bool = True,
        may_queue: bool = True,
        on_end: Callable[[], None] = lambda: None,
    ) -> Driven | None:
        """See to it that a run does this work. Called again and again, until the work is done.

        Where the last run ended without doing it, the next attempt gets a run of its own, after a
        pause that grows with every attempt. What killed its process may pass, so there is no last one.
        A run that a person cancelled is the exception: nothing follows it.

        Args:
            work: identifies the work, for ever. Begins with the timestep's id and a colon, where it is about one.
            is_done: asked only after a run has ended, so that one which ends right now is not taken
                for one that left its work undone.
            queue: the work queue that it belongs to; the deployment's own if none is given.
            may_begin: without it, it is left to another worker.
            may_queue: without it, no run is created while there is no place for it here.
            on_end: called when a run ends that is executed here.

        Returns:
            How the run of the newest attempt is doing; None if there is no place.
        """
        attempt = await asyncio.to_thread(self._log.flow_runs.attempt, work)
        wanted = _Wanted(name, parameters, tags, queue)
        run = await self._start(wanted, f"{work}:{attempt}", on_end, may_begin=may_begin, may_queue=may_queue)
        if run is None or run.state is None or not run.state.is_final() or run.state.type == StateType.CANCELLED:
            return _driven(run, LOOK_AGAIN_SECONDS) if run else None
        pause = min(FIRST_PAUSE * 2.0 ** min(attempt - 1, 30), LONGEST_PAUSE)
        left = pause - (datetime.now(UTC) - run.state.timestamp).total_seconds()
        if left > 0 or await asyncio.to_thread(is_done):
            return _driven(run, max(left, 0.0))
        about = {"timestep_id": str(timestep_of(work) or "")}
        logger.info("Attempt %d of %s, after its run ended as %s", attempt + 1, name, run.state.name, extra=about)
        await asyncio.to_thread(self._log.flow_runs.begin_attempt, work, attempt + 1)
        again = await self._start(wanted, f"{work}:{attempt + 1}", on_end, may_begin=may_begin)
        return _driven(again, LOOK_AGAIN_SECONDS) if again else None

    async def run_once(self, name: str, parameters: dict[str, Any], patience: float = 120.0) -> State[Any] | None:
        """Have a run of its own do something now; returns its state at the end, None of one that was deleted.

        It is waited for however long it takes, as another one beside it would do the same work. Only where it was
        executed here and is over, its state may stay what it was: that is returned when patience ends.

        Args:
            patience: so often (seconds) it is said that the run is not over.
        """
        ended = asyncio.Event()
        run = cast(FlowRun, await self._start(_Wanted(name, parameters, [], None), str(uuid4()), ended.set))
        said = time.monotonic()
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), timeout=0.5)
            try:
                # Where it is executed here, this is asked only once.
                run = await self._client.read_flow_run(run.id)
            except ObjectNotFound:
                return None
            except httpx.HTTPError as error:
                logger.warning("It can't be asked how the run %s is doing: %s", name, error)
            if run.state is not None and run.state.is_final():
                return run.state
            if time.monotonic() - said > patience:
                if ended.is_set():
                    return run.state
                logger.error("The run %s is waited for, and is %s", name, run.state and run.state.name)
                said = time.monotonic()
            if ended.is_set():
                await asyncio.sleep(0.5)

    async def _start(
        self, wanted: _Wanted, key: str, on_end: Callable[[], None], *, may_begin: bool = True, may_queue: bool = True
    ) -> FlowRun | None:
        """The run with this key. If it is new, it is executed here if there is a place."""
        deployment = await self._deployment()
        may_begin = may_begin and self._worker is not None and not await self.has_to_queue(wanted.queue)
        claim = await self._worker.claim() if self._worker is not None and may_begin else None
        if self._worker is None or claim is None:
            return await self._create(deployment, wanted, key, Scheduled()) if may_queue else None
        try:
            details = StateDetails(transition_id=claim)
            state: State[Any] = Running(message=f"{self._worker.name} executes it", state_details=details)
            run = await self._create(deployment, wanted, key, state)
        except BaseException:
            await self._worker.give_back(claim)
            raise
        # Only who created it may execute it: the key may be known, and its run under way elsewhere.
        if run.state is not None and run.state.state_details.transition_id == claim:
            self._worker.begin(run, deployment.flow, claim).add_done_callback(lambda _: on_end())
        else:
            await self._worker.give_back(claim)
        return run

    async def _create(self, deployment: _Deployment, wanted: _Wanted, key: str, state: State[Any]) -> FlowRun:
        return await self._client.create_flow_run_from_deployment(
            deployment.id,
            parameters=wanted.parameters,
            state=state,
            name=wanted.name,
            tags=wanted.tags,
            idempotency_key=key,
            work_queue_name=wanted.queue,
        )

    async def keep_known(self) -> None:
        """Ask about the deployment before what is known of it is too old, so that no new run waits for that."""
        while True:
            # Whoever needs a run is told what is wrong.
            with suppress(httpx.HTTPError, ObjectNotFound):
                self._known = await self._ask()
            await asyncio.sleep(KNOWN_SECONDS / 2)

    async def _deployment(self) -> _Deployment:
        if self._known is None or time.monotonic() - self._known.at > KNOWN_SECONDS:
            self._known = await self._ask()
        return self._known

    async def _ask(self) -> _Deployment:
        asked = time.monotonic()
        found = await self._client.read_deployment_by_name(self._name)
        queues = await self._client.read_work_queues(work_pool_name=found.work_pool_name)
        return _Deployment(
            id=found.id,
            flow=await load(cast(str, found.entrypoint)),
            is_limited=found.global_concurrency_limit is not None,
            pool=cast(str, found.work_pool_name),
            queue=cast(str, found.work_queue_name),
            queues={queue.name: queue for queue in queues},
            at=asked,
        )


def _driven(run: FlowRun, look_in: float) -> Driven:
    state = run.state
    scheduled = state.state_details.scheduled_time if state is not None and state.is_scheduled() else None
    wait = scheduled.timestamp() - time.time() if scheduled else 0.0
    return Driven(run.id, state.type if state else None, run.run_count > 0, look_in + max(wait, 0.0))
