"""The flow runs that this process executes: told to all others, and ended early where somebody wants that."""

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import anyio
import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import Abort, Pause
from prefect.flows import Flow
from redis.exceptions import RedisError

from blocks.flow_run_marks import FlowRunMarks
from blocks.places import HOLD_SECONDS, Places
from flows.engine import InProcessEngine
from flows.threads import to_free_thread

logger = logging.getLogger(__name__)

# Between two signs of life, and two looks for runs that are to be cancelled (seconds).
BEAT_SECONDS = 10.0


@dataclass
class _Execution:
    """A run under way: what executes it, and what ends it early."""

    engine: InProcessEngine | None = None
    scope: anyio.CancelScope | None = None
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True
        if self.engine:
            self.engine.cancel()
        if self.scope:
            self.scope.cancel()


class Executions:
    """All of them. Each holds a place of the work pool while it executes."""

    def __init__(self, marks: FlowRunMarks, places: Places) -> None:
        self._marks = marks
        self._places = places
        self._under_way: dict[UUID, _Execution] = {}
        self._holders: set[UUID] = set()
        self._ended = asyncio.Event()

    # --- places

    async def take_place(self, holder: UUID, limit: int | None) -> bool:
        """Take a place of the pool, unless so many are taken already.

        Raises:
            RedisError: when Redis can't be asked.
        """
        if not await to_free_thread(self._places.take, holder, limit):
            return False
        self._holders.add(holder)
        return True

    async def give_back(self, holder: UUID) -> None:
        """Free the place, if `holder` has one; by itself after a while, when Redis is away."""
        self._holders.discard(holder)
        try:
            with anyio.CancelScope(shield=True):
                await to_free_thread(self._places.give_back, holder)
        except RedisError as error:
            logger.warning("A place gets free after %g s only, as Redis is away: %s", HOLD_SECONDS, error)

    # --- runs

    def __len__(self) -> int:
        """How many there are."""
        return len(self._under_way)

    def __contains__(self, flow_run_id: UUID) -> bool:
        """Whether this is one of them."""
        return flow_run_id in self._under_way

    def add(self, flow_run_id: UUID) -> None:
        """It is this process that executes the run from now on."""
        self._under_way[flow_run_id] = _Execution()

    async def execute(self, flow_run: FlowRun, flow: Flow[..., Any], *, is_new: bool) -> None:
        """Execute an added run to its end; its state is reported by the flow engine.

        Args:
            is_new: it was made as Running, to be executed here.
        """
        execution = self._under_way[flow_run.id]
        engine = InProcessEngine(flow, flow_run, is_new=is_new)
        with anyio.CancelScope() as scope:
            execution.engine, execution.scope = engine, scope
            if execution.is_cancelled:
                execution.cancel()
            try:
                await engine.run()
            except (Abort, Pause) as signal:
                logger.info("Flow run %s goes on later or elsewhere: %s", flow_run.name, signal)
            except SystemExit as end:
                # It is Crashed; the others here go on.
                logger.warning("Flow run %s wanted its process to end: exit code %s", flow_run.name, end.code)

    async def remove(self, flow_run_id: UUID, holder: UUID) -> None:
        """It has ended, or was handed back: free its place."""
        try:
            await self.give_back(holder)
        finally:
            self._under_way.pop(flow_run_id, None)
            self._ended.set()

    async def wait_for_all(self) -> None:
        """Wait until all have ended."""
        while self._under_way:
            self._ended.clear()
            await self._ended.wait()

    # --- towards others

    async def tell(self, flow_run_ids: Iterable[UUID] | None = None) -> None:
        """Say that these are executed, or all; it is said again before it is forgotten."""
        ids = frozenset(self._under_way if flow_run_ids is None else flow_run_ids)
        try:
            await to_free_thread(self._marks.beat, ids, seconds=HOLD_SECONDS)
            await to_free_thread(self._places.keep, frozenset(self._holders))
        except RedisError as error:
            logger.warning("Nobody can be told what is executed here: %s: %s", type(error).__name__, error)

    async def keep_telling(self) -> None:
        """Do so until cancelled."""
        while True:
            await self.tell()
            await asyncio.sleep(BEAT_SECONDS)

    async def keep_cancelling(self, client: PrefectClient) -> None:
        """End the runs that somebody has cancelled, until cancelled; their states become Cancelled."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            with suppress(httpx.HTTPError):  # it is asked again
                await self._cancel(client)

    async def _cancel(self, client: PrefectClient) -> None:
        if not self._under_way:
            return
        unwanted = FlowRunFilter(
            id=FlowRunFilterId(any_=list(self._under_way)),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING])),
        )
        for run in await client.read_flow_runs(flow_run_filter=unwanted):
            if execution := self._under_way.get(run.id):
                execution.cancel()
