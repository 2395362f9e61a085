"""One flow run per piece of work, on a real Prefect server."""

import asyncio
from collections.abc import Callable
from typing import Any, Literal, cast
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry, Cancelled, Completed, Crashed, Failed, Late, Pending, Running

from blocks.event_log import EventLog
from blocks.messages import LogEvent
from flows import dispatch
from flows.dispatch import NoProgress, Runs, UploadDispatcher
from tests.events import announced, ingested, said, uploaded

pytest_plugins = ["tests.prefect_server"]

GROUP: Literal["upload-worker"] = "upload-worker"
Executing = Callable[[UUID], bool]


def nobody(_run: UUID) -> bool:
    return False


def runs(client: PrefectClient, executing: Executing = nobody) -> Runs:
    return Runs("ingest-timestep/event-ingester", client, executing)


async def drive(runs: Runs, key: str = "a key", *, done: bool = False) -> FlowRun:
    parameters = {"system": "prince", "event_file": "events/1.json"}
    return await runs.drive(key, f"ingest {key}", parameters, ["prince"], is_done=lambda: done)


def test_a_piece_of_work_gets_one_run_however_often_it_is_driven(prefect: str) -> None:
    async def test() -> None:
        async with get_client() as client, get_client() as other:
            driven = await asyncio.gather(*(drive(runs(one)) for one in (client, other) * 3))
            assert len({run.id for run in driven}) == 1
            assert (await drive(runs(client), "another key")).id != driven[0].id
            known = await client.read_flow_runs()
            assert sorted(run.name for run in known) == ["ingest a key", "ingest another key"]
            assert all("prince" in run.tags for run in known)

    asyncio.run(test())


def test_work_that_is_not_done_gets_another_run_once_its_run_ended(prefect: str) -> None:
    async def gets_another(client: PrefectClient, state: State[Any]) -> bool:
        first = await drive(runs(client), key=str(state.name))
        await client.set_flow_run_state(first.id, state, force=True)
        assert (await drive(runs(client), key=str(state.name), done=True)).id == first.id
        second = await drive(runs(client), key=str(state.name))
        assert (await drive(runs(client), key=str(state.name))).id == second.id
        return second.id != first.id

    async def test() -> None:
        async with get_client() as client:
            ended: list[State[Any]] = [Completed(), Failed(), Crashed(), Cancelled()]
            live: list[State[Any]] = [Late(), AwaitingRetry(), Pending(), Running()]
            assert [await gets_another(client, state) for state in ended] == [True] * 4
            assert [await gets_another(client, state) for state in live] == [False] * 4

    asyncio.run(test())


def test_a_run_nobody_executes_is_replaced_after_a_while(prefect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LOST_SECONDS", 0.0)

    async def is_replaced(client: PrefectClient, state: State[Any]) -> None:
        first = await drive(runs(client), key=str(state.name))
        await client.set_flow_run_state(first.id, state, force=True)
        ours = runs(client, executing=lambda run: run == first.id)
        assert (await drive(ours, key=str(state.name))).id == first.id
        assert (await drive(runs(client), key=str(state.name))).id != first.id
        lost = (await client.read_flow_run(first.id)).state
        assert lost is not None
        assert lost.is_crashed()
        assert "no process executed it" in (lost.message or "")

    async def test() -> None:
        async with get_client() as client:
            await is_replaced(client, Running())
            await is_replaced(client, Pending())

    asyncio.run(test())


def test_work_that_never_gets_done_is_given_to_a_person(prefect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAX_ATTEMPTS", 3)

    async def test() -> None:
        async with get_client() as client:
            for _ in range(3):
                run = await drive(runs(client))
                await client.set_flow_run_state(run.id, Failed(), force=True)
            with pytest.raises(NoProgress, match="3 runs ended"):
                await drive(runs(client))
            assert len(await client.read_flow_runs()) == 3

    asyncio.run(test())


# --- from the stream to runs


def append(log: EventLog, *events: LogEvent) -> list[str]:
    return [log.append(event) for event in events]


def held(log: EventLog, dispatcher: UploadDispatcher) -> list[str]:
    return [entry.id for entry in log.held(GROUP, dispatcher._consumer, count=100)]


def test_every_ingested_timestep_gets_an_upload_and_the_rest_is_acknowledged(prefect: str, event_log: EventLog) -> None:
    one, two = announced(), announced(experiment_id="other")
    wanted = append(event_log, said(ingested(one)), said(uploaded(one)), said(ingested(two)))
    event_log.redis.xadd(event_log.stream, {"type": "timestep.ingested", "event": "{"})

    async def test() -> None:
        async with get_client() as client:
            dispatcher = UploadDispatcher(event_log, Runs("upload-timestep/upload-worker", client, nobody))
            for _ in range(3):
                await dispatcher.step(wait_seconds=0.01)
            found = await client.read_flow_runs()
            assert sorted(run.name for run in found) == sorted(
                f"upload prince {event.experiment_id} 2026-11-23 12:00:00" for event in (one, two)
            )
            assert {run.parameters["entry_id"] for run in found} == {wanted[0], wanted[2]}
            assert held(event_log, dispatcher) == [wanted[0], wanted[2]]
            # A dispatcher that lost its memory finds what it held, and the runs that are there.
            await UploadDispatcher(event_log, Runs("upload-timestep/upload-worker", client, nobody)).step(0.01)
            assert len(await client.read_flow_runs()) == 2

    asyncio.run(test())
    backlog = event_log.backlog(GROUP)
    assert (backlog.waiting, backlog.in_progress, backlog.set_aside) == (0, 2, 1)


class StandIn:
    """In place of Runs: to fail on purpose, and without the cost of a run."""

    def __init__(self) -> None:
        self.driven: list[str] = []
        self.failures: list[Exception] = []

    async def drive(self, key: str, name: str, parameters: dict[str, Any], **_rest: object) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.driven.append(parameters["entry_id"])


def test_no_more_than_the_limit_is_in_flight(event_log: EventLog) -> None:
    wanted = append(event_log, *(said(ingested(announced())) for _ in range(7)))

    async def test() -> None:
        stand_in = StandIn()
        dispatcher = UploadDispatcher(event_log, cast(Runs, stand_in), limit=3)
        for done in range(7):
            await dispatcher.step(0.01)
            await dispatcher.step(0.01)
            assert stand_in.driven == wanted[: done + 3]
            event_log.acknowledge(GROUP, wanted[done])

    asyncio.run(test())


def test_a_service_that_is_away_and_a_hopeless_timestep_hold_nothing_up(
    event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "LOOK_AGAIN_SECONDS", 0.5)
    wanted = append(event_log, *(said(ingested(announced())) for _ in range(3)))

    async def test() -> None:
        stand_in = StandIn()
        stand_in.failures = [httpx.ConnectError("Prefect is away"), NoProgress("hopeless")]
        running = asyncio.create_task(UploadDispatcher(event_log, cast(Runs, stand_in)).run())
        async with asyncio.timeout(15):
            while set(stand_in.driven) != set(wanted):
                assert not running.done()
                await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(test())
    assert event_log.backlog(GROUP).in_progress == 3


def test_what_a_silent_dispatcher_held_is_taken_over(event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TAKE_OVER_SECONDS", 0.2)
    (wanted,) = append(event_log, said(ingested(announced())))
    event_log.read(GROUP, "a host that is gone", count=1, wait_seconds=0.01)

    async def test() -> None:
        await asyncio.sleep(0.3)
        stand_in = StandIn()
        await UploadDispatcher(event_log, cast(Runs, stand_in)).step(0.01)
        assert stand_in.driven == [wanted]

    asyncio.run(test())
