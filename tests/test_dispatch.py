"""One flow run per piece of work, on a real Prefect server."""

import asyncio
from collections.abc import Callable
from typing import Any, Literal, cast

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import AwaitingRetry, Cancelled, Completed, Crashed, Failed, Late, Pending, Running
from redis.exceptions import ConnectionError as RedisConnectionError

from blocks.event_log import EventLog
from blocks.messages import LogEvent
from flows import dispatch, sweep
from flows.dispatch import Runs, UploadDispatcher
from tests.events import announced, ingested, said, uploaded

pytest_plugins = ["tests.prefect_server"]

GROUP: Literal["upload-worker"] = "upload-worker"


def not_done() -> bool:
    return False


def runs(client: PrefectClient, log: EventLog) -> Runs:
    return Runs("ingest-timestep/event-ingester", client, log)


async def drive(runs: Runs, work: str = "a key", is_done: Callable[[], bool] = not_done) -> bool:
    parameters = {"system": "prince", "event_file": "events/1.json"}
    return await runs.drive(work, f"ingest {work}", parameters, ["prince"], is_done)


async def runs_of(client: PrefectClient, work: str) -> list[FlowRun]:
    """The runs of a piece of work, the newest first."""
    wanted = FlowRunFilter(name=FlowRunFilterName(any_=[f"ingest {work}"]))
    return await client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC)


def test_a_piece_of_work_gets_one_run_however_often_it_is_driven(prefect: str, event_log: EventLog) -> None:
    async def test() -> None:
        async with get_client() as client, get_client() as other:
            assert all(await asyncio.gather(*(drive(runs(one, event_log)) for one in (client, other) * 3)))
            await drive(runs(client, event_log), "another key")
            known = await client.read_flow_runs()
            assert sorted(run.name for run in known) == ["ingest a key", "ingest another key"]
            assert all("prince" in run.tags for run in known)

    asyncio.run(test())


def test_work_that_is_not_done_gets_another_run_once_its_run_ended(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "FIRST_PAUSE", 0.0)

    async def number_of_runs(client: PrefectClient, state: State[Any], is_done: Callable[[], bool]) -> int:
        work = f"{state.name} {is_done()}"
        await drive(runs(client, event_log), work)
        (first,) = await runs_of(client, work)
        await client.set_flow_run_state(first.id, state, force=True)
        for _ in range(2):
            await drive(runs(client, event_log), work, is_done)
        return len(await runs_of(client, work))

    async def test() -> None:
        async with get_client() as client:
            ended: list[State[Any]] = [Completed(), Failed(), Crashed(), Cancelled()]
            live: list[State[Any]] = [Late(), AwaitingRetry(), Pending(), Running()]
            assert [await number_of_runs(client, state, not_done) for state in ended] == [2] * 4
            assert [await number_of_runs(client, state, not_done) for state in live] == [1] * 4
            # One that did its work just now is not repeated.
            assert await number_of_runs(client, Completed(), lambda: True) == 1

    asyncio.run(test())


def test_the_pause_before_the_next_attempt_grows(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with get_client() as client:
            ours = runs(client, event_log)
            for attempt in range(1, 5):
                monkeypatch.setattr(dispatch, "FIRST_PAUSE", 0.0)
                assert await drive(ours)
                newest = (await runs_of(client, "a key"))[0]
                await client.set_flow_run_state(newest.id, Failed(), force=True)
                # 1000 s are waited for before the second attempt, 8000 s before the fifth.
                monkeypatch.setattr(dispatch, "FIRST_PAUSE", 1000.0)
                monkeypatch.setattr(dispatch, "LONGEST_PAUSE", 1000.0 * 2 ** (attempt - 1))
                assert not await drive(ours)
                assert len(await runs_of(client, "a key")) == attempt

    asyncio.run(test())


def test_a_run_that_no_process_executes_is_crashed(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def state_after_sweep(client: PrefectClient, work: str, state: State[Any], beats: bool) -> State[Any]:
        await drive(runs(client, event_log), work)
        (run,) = await runs_of(client, work)
        await client.set_flow_run_state(run.id, state, force=True)
        if beats:
            event_log.beat([run.id], seconds=60)
        await sweep.crash_lost("event-ingester", client, event_log)
        return cast(State[Any], (await client.read_flow_run(run.id)).state)

    async def test() -> None:
        async with get_client() as client:
            assert (await state_after_sweep(client, "young", Running(), beats=False)).is_running()
            monkeypatch.setattr(sweep, "LOST_SECONDS", 0.0)
            assert (await state_after_sweep(client, "executed elsewhere", Running(), beats=True)).is_running()
            assert (await state_after_sweep(client, "done", Completed(), beats=False)).is_completed()
            states: list[State[Any]] = [Running(), Pending()]
            for state in states:
                lost = await state_after_sweep(client, f"lost {state.name}", state, beats=False)
                assert lost.is_crashed()
                assert "no process executed it" in (lost.message or "")

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
            dispatcher = UploadDispatcher(event_log, Runs("upload-timestep/upload-worker", client, event_log))
            for _ in range(3):
                await dispatcher.step(wait_seconds=0.01)
            found = await client.read_flow_runs()
            assert sorted(run.name for run in found) == sorted(
                f"upload prince {event.experiment_id} 2026-11-23 12:00:00" for event in (one, two)
            )
            assert {run.parameters["entry_id"] for run in found} == {wanted[0], wanted[2]}
            assert held(event_log, dispatcher) == [wanted[0], wanted[2]]
            # A dispatcher that lost its memory finds what it held, and the runs that are there.
            await UploadDispatcher(event_log, Runs("upload-timestep/upload-worker", client, event_log)).step(0.01)
            assert len(await client.read_flow_runs()) == 2

    asyncio.run(test())
    backlog = event_log.backlog(GROUP)
    assert (backlog.waiting, backlog.in_progress, backlog.set_aside) == (0, 2, 1)


class StandIn:
    """In place of Runs: to fail on purpose, and without the cost of a run."""

    def __init__(self) -> None:
        self.driven: list[str] = []
        self.failures: list[Exception] = []
        self.pausing: set[str] = set()

    async def drive(
        self, work: str, name: str, parameters: dict[str, Any], tags: list[str], is_done: Callable[[], bool]
    ) -> bool:
        if self.failures:
            raise self.failures.pop(0)
        self.driven.append(parameters["entry_id"])
        return parameters["entry_id"] not in self.pausing


def test_timesteps_that_wait_for_their_next_attempt_hold_no_other_up(event_log: EventLog) -> None:
    wanted = append(event_log, *(said(ingested(announced())) for _ in range(6)))

    async def test() -> None:
        stand_in = StandIn()
        stand_in.pausing = set(wanted[:3])
        dispatcher = UploadDispatcher(event_log, cast(Runs, stand_in), limit=3)
        for _ in range(4):
            await dispatcher.step(0.01)
        assert stand_in.driven == wanted

    asyncio.run(test())


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


def test_a_service_that_is_away_loses_nothing(event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LOOK_AGAIN_SECONDS", 0.5)
    wanted = append(event_log, *(said(ingested(announced())) for _ in range(3)))

    async def test() -> None:
        stand_in = StandIn()
        stand_in.failures = [httpx.ConnectError("Prefect is away"), RedisConnectionError("Redis is away")]
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
