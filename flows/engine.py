"""Prefect's flow engine, for runs that share a process with others."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import anyio
from prefect.client.schemas.objects import FlowRun, State
from prefect.flow_engine import AsyncFlowRunEngine
from prefect.flows import Flow
from prefect.states import AwaitingRetry

HANDED_BACK = "handed back, because its worker was stopped"


class InProcessEngine(AsyncFlowRunEngine[..., Any]):
    """Executes one run of an asynchronous flow.

    Prefect's own gives every run a thread with a connection of its own that learns whether the run was
    suspended, and waits for both ends of it. Here, whoever executes many runs tells: see `cancel`.
    """

    def __init__(self, flow: Flow[..., Any], flow_run: FlowRun, *, is_new: bool) -> None:
        """Args:
        is_new: the run was made to be executed here: it has its name already, and is Running for the server.
        """
        super().__init__(flow=flow, flow_run=flow_run, parameters=flow_run.parameters)
        self._flow_run_name_set = is_new
        self._is_new = is_new
        self._is_cancelled = False

    async def run(self) -> None:
        """Execute the run; what becomes of it is told to the Prefect server."""
        async with self.start():
            while self.is_running():
                async with self.run_context():
                    _ = await self.call_flow_fn()  # its result is in the run's state

    def cancel(self) -> None:
        """Take what ends the run from now on for the wish of a person, not for a crash."""
        self._is_cancelled = True

    async def set_state(self, state: State[Any], force: bool = False) -> State[Any]:
        """Tell the server, unless it is what the server was told when the run was made."""
        if self._is_new and state.is_running():
            self._is_new = False
            await self.call_hooks()
            return self.state
        return await super().set_state(state, force=force)

    @property
    def heartbeat_seconds(self) -> None:
        """None: the worker tells for all of its runs that they are executed."""
        return

    @contextmanager
    def setup_flow_run_suspension_request(self) -> Generator[Any, None, None]:
        """Without the thread per run."""
        yield self._get_flow_run_suspension_request()

    async def handle_crash(self, exc: BaseException) -> None:
        """A run that ends because its worker does is handed back, for the next worker."""
        if self._is_cancelled:
            await self.handle_cancellation(exc)
        elif isinstance(exc, anyio.get_cancelled_exc_class()):
            with anyio.CancelScope(shield=True):
                await self.set_state(AwaitingRetry(message=HANDED_BACK), force=True)
        else:
            await super().handle_crash(exc)
