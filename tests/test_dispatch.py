"""One flow run per piece of work, on a real Prefect server."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Completed, Crashed, Failed, Late, Pending, Running
from redis.exceptions import ConnectionError as RedisConnectionError

from blocks.event_log import Backlog, EventLog
from blocks.messages import Failed as FailedEvent
from blocks.messages import LogEvent
from blocks.settings import Settings
from flows import dispatch, runs, sweep
from flows.again import try_again
from flows.dispatch import UploadDispatcher
from flows.init import initialize
from flows.runs import Driven, Runs
from flows.worker import InProcessWorker
from tests.dispatching import GROUP, StandIn, append, held, step
from tests.events import announced, ingested, said, uploaded
from tests.watching import until

pytest_plugins = ["tests.prefect_server"]


def not_done() -> bool:
    return False


def runs_by(client: PrefectClient, log: EventLog) -> Runs:
    return Runs("ingest-timestep/event-ingester", client, log)


async def drive(runs: Runs, work: str = "a key", is_done: Callable[[], bool] = not_done) -> Driven:
    parameters = {"system": "prince", "event_file": "events/1.json"}
    return cast(Driven, await runs.drive(work, f"ingest {work}", parameters, ["prince"], is_done))


async def runs_of(client: PrefectClient, work: str) -> list[FlowRun]:
    """The runs of a piece of work, the newest first."""
    wanted = FlowRunFilter(name=FlowRunFilterName(any_=[f"ingest {work}"]))
    return await client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC)


def test_a_piece_of_work_gets_one_run_however_often_it_is_driven(prefect: str, event_log: EventLog) -> None:
    async def test() -> None:
        async with get_client() as client, get_client() as other:
            await asyncio.gather(*(drive(runs_by(one, event_log)) for one in (client, other) * 3))
            await drive(runs_by(client, event_log), "another key")
            known = await client.read_flow_runs()
            assert sorted(run.name for run in known) == ["ingest a key", "ingest another key"]
            assert all("prince" in run.tags for run in known)

    asyncio.run(test())


def test_a_run_that_is_wanted_waits_for_no_question_about_its_deployment(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with get_client() as client:
            ask, asked = client.read_deployment_by_name, asyncio.Queue[str]()

            async def read(name: str) -> Any:
                asked.put_nowait(name)
                if asked.qsize() == 2:
                    raise httpx.ConnectError("Prefect is away")
                return await ask(name)

            monkeypatch.setattr(client, "read_deployment_by_name", read)
            monkeypatch.setattr(runs, "KNOWN_SECONDS", 0.2)
            driver = runs_by(client, event_log)
            keeping = asyncio.create_task(driver.keep_known())
            async with asyncio.timeout(20):
                while asked.qsize() < 4:  # noqa: ASYNC110 -- it has survived the second
                    await asyncio.sleep(0.05)
            keeping.cancel()
            await asyncio.wait([keeping])
            monkeypatch.setattr(runs, "KNOWN_SECONDS", 60.0)
            before = asked.qsize()
            await drive(driver)
            assert asked.qsize() == before
            monkeypatch.setattr(runs, "KNOWN_SECONDS", 0.0)
            await drive(driver)
            assert asked.qsize() == before + 1

    asyncio.run(test())


def test_a_run_of_its_own_is_waited_for_until_it_is_over(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with get_client() as client, get_client() as other:
            read, asked = client.read_flow_run, asyncio.Queue[UUID]()

            async def read_flow_run(id: UUID) -> FlowRun:
                asked.put_nowait(id)
                if asked.qsize() == 2:
                    raise httpx.ConnectError("Prefect is away")
                return await read(id)

            monkeypatch.setattr(client, "read_flow_run", read_flow_run)
            parameters = {"system": "prince", "event_file": "events/1.json"}
            endings: tuple[State[Any] | None, ...] = (Completed(), None)
            for state in endings:
                once = runs_by(client, event_log).run_once("record events of test", parameters, patience=0.1)
                waiting = asyncio.create_task(once)
                before = asked.qsize()
                async with asyncio.timeout(20):
                    while asked.qsize() < before + 4:  # noqa: ASYNC110 -- long after its patience
                        await asyncio.sleep(0.05)
                assert not waiting.done()
                run_id = next(run.id for run in await other.read_flow_runs() if not cast(State, run.state).is_final())
                if state:
                    await other.set_flow_run_state(run_id, state, force=True)
                else:
                    await other.delete_flow_run(run_id)
                end = await asyncio.wait_for(waiting, 20)
                assert (end and end.type) == (state and state.type)
            assert len(await other.read_flow_runs()) == 1

    asyncio.run(test())
    assert "The run record events of test is waited for, and is Scheduled" in caplog.messages


def test_work_that_is_not_done_gets_another_run_once_its_run_ended(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FIRST_PAUSE", 0.0)

    async def number_of_runs(client: PrefectClient, state: State[Any], is_done: Callable[[], bool]) -> int:
        work = f"{state.name} {is_done()}"
        await drive(runs_by(client, event_log), work)
        (first,) = await runs_of(client, work)
        await client.set_flow_run_state(first.id, state, force=True)
        for _ in range(2):
            await drive(runs_by(client, event_log), work, is_done)
        return len(await runs_of(client, work))

    async def test() -> None:
        async with get_client() as client:
            ended: list[State[Any]] = [Completed(), Failed(), Crashed()]
            live: list[State[Any]] = [Late(), AwaitingRetry(), Pending(), Running(), Cancelled()]
            assert [await number_of_runs(client, state, not_done) for state in ended] == [2] * 3
            assert [await number_of_runs(client, state, not_done) for state in live] == [1] * 5
            # One that did its work just now is not repeated.
            assert await number_of_runs(client, Completed(), lambda: True) == 1

    asyncio.run(test())


def test_the_pause_before_the_next_attempt_grows(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with get_client() as client:
            ours = runs_by(client, event_log)
            for attempt in range(1, 5):
                monkeypatch.setattr(runs, "FIRST_PAUSE", 0.0)
                assert (await drive(ours)).state_type == StateType.SCHEDULED
                newest = (await runs_of(client, "a key"))[0]
                await client.set_flow_run_state(newest.id, Failed(), force=True)
                # 1000 s are waited for before the second attempt, 8000 s before the fifth.
                monkeypatch.setattr(runs, "FIRST_PAUSE", 1000.0)
                monkeypatch.setattr(runs, "LONGEST_PAUSE", 1000.0 * 2 ** (attempt - 1))
                driven = await drive(ours)
                assert driven.state_type == StateType.FAILED
                assert driven.look_in > 900 * 2 ** (attempt - 1)
                assert len(await runs_of(client, "a key")) == attempt

    asyncio.run(test())


def test_a_run_that_no_process_executes_is_crashed(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def state_after_sweep(client: PrefectClient, work: str, state: State[Any], beats: bool) -> State[Any]:
        await drive(runs_by(client, event_log), work)
        (run,) = await runs_of(client, work)
        await client.set_flow_run_state(run.id, state, force=True)
        if beats:
            event_log.flow_runs.beat([run.id], seconds=60)
        await sweep.end_lost(await sweep.under_way("event-ingester", client), client, event_log)
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
            # What a person wanted to end has ended with its process.
            assert (await state_after_sweep(client, "unwanted", Cancelling(), beats=False)).is_cancelled()

    asyncio.run(test())


def test_a_worker_that_still_waits_for_prefect_is_not_ended_by_the_sweep(
    run_settings: Settings, event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "BEAT_SECONDS", 0.01)
    worker = InProcessWorker(work_pool_name="upload-worker")
    beat = tmp_path / "beat"

    async def test() -> None:
        async with get_client() as client:
            sweeping = asyncio.create_task(sweep.keep_swept(worker, "upload-worker", client, event_log, beat))
            for _ in range(3):  # each round, before it looks for anything
                beat.unlink(missing_ok=True)
                await until(beat.exists, "a sign of life")
            assert not sweeping.done()
            sweeping.cancel()

    asyncio.run(test())


def test_a_lost_run_that_nobody_makes_anew_is_taken_up_again(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "LOST_SECONDS", 0.0)

    async def test() -> None:
        async with get_client() as client:
            await drive(runs_by(client, event_log), "retried")
            (retried,) = await runs_of(client, "retried")
            before: list[State[Any]] = [Failed(), *[Running(), AwaitingRetry()] * 10]
            for state in before:
                await client.set_flow_run_state(retried.id, state, force=True)
            by_hand = await client.create_flow_run_from_deployment(cast(UUID, retried.deployment_id))
            for run in (retried, by_hand):
                await client.set_flow_run_state(run.id, Running(), force=True)
            await sweep.end_lost(await sweep.under_way("event-ingester", client), client, event_log)
            for run in (retried, by_hand):
                lost = cast(State[Any], (await client.read_flow_run(run.id)).state)
                assert lost.name == "AwaitingRetry"
                assert "no process executed it" in (lost.message or "")
                again = cast(datetime, lost.state_details.scheduled_time)
                assert again < datetime.now(UTC) + timedelta(seconds=10)

    asyncio.run(test())


def test_a_run_whose_work_queue_was_deleted_makes_room_for_another(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "STRANDED_SECONDS", 0.0)
    pool = "event-ingester"

    async def test() -> None:
        async with get_client() as client:
            await drive(runs_by(client, event_log), "waits")
            (waits,) = await runs_of(client, "waits")
            queue = await client.create_work_queue("short-lived", work_pool_name=pool)
            stranded = await client.create_flow_run_from_deployment(
                cast(UUID, waits.deployment_id), idempotency_key="x", work_queue_name=queue.name
            )
            await client.delete_work_queue_by_id(queue.id)
            await sweep.end_stranded(pool, client)
            states = [(await client.read_flow_run(run.id)).state_name for run in (waits, stranded)]
            assert states == ["Scheduled", "Crashed"]

    asyncio.run(test())


def test_the_sweep_sees_more_runs_than_the_server_gives_at_once(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "PAGE", 2)
    monkeypatch.setattr(sweep, "STRANDED_SECONDS", 0.0)
    pool = "event-ingester"

    async def test() -> None:
        async with get_client() as client:
            queue = await client.create_work_queue("short-lived", work_pool_name=pool)
            deployment = (await client.read_deployment_by_name("ingest-timestep/event-ingester")).id
            made = [
                await client.create_flow_run_from_deployment(deployment, work_queue_name=queue.name) for _ in range(3)
            ]
            await client.delete_work_queue_by_id(queue.id)
            await sweep.end_stranded(pool, client)
            assert [(await client.read_flow_run(run.id)).state_name for run in made] == ["Crashed"] * 3
            for number in range(3):
                await drive(runs_by(client, event_log), str(number))
                (run,) = await runs_of(client, str(number))
                await client.set_flow_run_state(run.id, Running(), force=True)
            assert len(await sweep.under_way(pool, client)) == 3

    asyncio.run(test())


# --- from the stream to runs


def test_a_dispatcher_goes_on_once_its_deployment_that_was_deleted_is_there_again(
    run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(runs, "KNOWN_SECONDS", 0.0)

    async def test() -> None:
        async with get_client() as client:
            deployment = await client.read_deployment_by_name("upload-timestep/upload-worker")
            await client.delete_deployment(deployment.id)
            dispatcher = UploadDispatcher(event_log, Runs("upload-timestep/upload-worker", client, event_log))
            running = asyncio.create_task(dispatcher.run())
            try:
                append(event_log, said(ingested(announced())))
                await asyncio.sleep(3)
                assert not running.done()
            finally:
                await asyncio.to_thread(initialize, run_settings)
            async with asyncio.timeout(30):
                while not await client.read_flow_runs():  # noqa: ASYNC110 -- the server can't tell by itself
                    await asyncio.sleep(0.2)
            running.cancel()
            await asyncio.wait([running])

    asyncio.run(test())


def test_every_ingested_timestep_gets_an_upload_and_the_rest_is_acknowledged(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "PATIENCE_SECONDS", 0.0)
    one, two = announced(), announced(experiment_id="other")
    wanted = append(event_log, said(ingested(one)), said(uploaded(one)), said(ingested(two)))
    event_log.redis.xadd(event_log.stream, {"type": "timestep.ingested", "event": "{"})

    async def test() -> None:
        async with get_client() as client:
            dispatcher = UploadDispatcher(event_log, Runs("upload-timestep/upload-worker", client, event_log))
            for _ in range(3):
                await step(dispatcher)
            found = await client.read_flow_runs()
            assert sorted(run.name for run in found) == sorted(
                f"upload prince {event.experiment_id} 2026-11-23 12:00:00" for event in (one, two)
            )
            assert {run.parameters["entry_id"] for run in found} == {wanted[0], wanted[2]}
            assert held(event_log, dispatcher) == [wanted[0], wanted[2]]
            # A dispatcher that lost its memory finds what it held, and the runs that are there.
            await step(UploadDispatcher(event_log, Runs("upload-timestep/upload-worker", client, event_log)))
            assert len(await client.read_flow_runs()) == 2

    asyncio.run(test())
    backlog = event_log.backlog(GROUP)
    assert (backlog.waiting, backlog.in_progress, backlog.set_aside) == (0, 2, 1)


def test_a_cancelled_upload_is_given_up_until_somebody_asks_for_it_again(
    prefect: str, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(runs, "LOOK_AGAIN_SECONDS", 0.0)
    append(event_log, said(ingested(announced())))

    async def test() -> None:
        async with get_client() as client:
            dispatcher = UploadDispatcher(event_log, Runs("upload-timestep/upload-worker", client, event_log))
            await step(dispatcher)
            (run,) = await client.read_flow_runs()
            await client.set_flow_run_state(run.id, Cancelled(), force=True)
            await step(dispatcher)
            assert [one.id for one in await client.read_flow_runs()] == [run.id]
            last = cast(list[tuple[str, dict[str, str]]], event_log.redis.xrevrange(event_log.stream, count=1))
            failed = LogEvent.model_validate_json(last[0][1]["event"]).data
            assert isinstance(failed, FailedEvent)
            assert (failed.flow_run_id, failed.reason) == (run.id, "its flow run was cancelled in Prefect")

    asyncio.run(test())
    assert event_log.backlog(GROUP).in_progress == 0


def test_of_a_backlog_the_oldest_and_the_newest_are_taken_in_turn_as_places_get_free(event_log: EventLog) -> None:
    wanted = append(event_log, *(said(ingested(announced())) for _ in range(7)))

    async def test() -> None:
        stand_in = StandIn(places=2)
        dispatcher = UploadDispatcher(event_log, cast(Runs, stand_in))
        await step(dispatcher)
        await step(dispatcher)
        assert stand_in.driven == [wanted[0], wanted[6]]
        late = append(event_log, said(ingested(announced())))
        stand_in.places = 3
        await step(dispatcher)
        assert stand_in.driven[2:] == [wanted[1], late[0], wanted[2]]
        stand_in.places = 10
        await step(dispatcher)
        assert sorted(stand_in.driven) == wanted + late

    asyncio.run(test())


def test_what_finds_no_place_for_long_is_left_to_other_workers_a_few_at_a_time(
    event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = append(event_log, *(said(ingested(announced())) for _ in range(20)))

    async def test() -> None:
        stand_in = StandIn(places=2)
        dispatcher = UploadDispatcher(event_log, cast(Runs, stand_in))
        await step(dispatcher)
        assert stand_in.queued == []
        monkeypatch.setattr(dispatch, "PATIENCE_SECONDS", 0.0)
        await step(dispatcher)
        await step(dispatcher)
        assert len(stand_in.queued) == dispatch.AHEAD
        # What another worker has done makes room for more.
        event_log.acknowledge(GROUP, *stand_in.queued)
        for id in stand_in.queued:
            dispatcher._in_flight.look_at_once(id)
        await step(dispatcher)
        assert len(stand_in.queued) == 2 * dispatch.AHEAD
        assert set(stand_in.driven) | set(stand_in.queued) < set(wanted)

    asyncio.run(test())


def test_a_backlog_of_thousands_has_a_few_runs_at_a_time_and_progresses_at_both_ends(event_log: EventLog) -> None:
    wanted = append(event_log, *(said(ingested(announced())) for _ in range(2000)))

    async def test() -> None:
        stand_in = StandIn(places=0)
        dispatcher = UploadDispatcher(event_log, cast(Runs, stand_in))
        for _ in range(5):
            await dispatcher.read(wait_seconds=0.01)
        assert event_log.backlog(GROUP) == Backlog(waiting=0, in_progress=2000, set_aside=0)
        done: list[str] = []
        for _ in range(25):
            stand_in.places = 4
            await dispatcher.start()
            begun = [*dispatcher._in_flight]
            assert len(begun) <= 4
            event_log.acknowledge(GROUP, *begun)
            done += begun
            for id in begun:
                dispatcher._in_flight.look_at_once(id)
        assert sorted(done) == wanted[:50] + wanted[-50:]
        # A new one does not wait for them.
        (new,) = append(event_log, said(ingested(announced())))
        await dispatcher.read(wait_seconds=0.01)
        stand_in.places = 2
        await dispatcher.start()
        assert new in [*dispatcher._in_flight]

    asyncio.run(test())


def test_a_service_that_is_away_loses_nothing(event_log: EventLog) -> None:
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


def test_what_a_dispatcher_held_that_is_gone_is_taken_over(
    event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "TAKE_OVER_SECONDS", 0.2)
    gone, held_elsewhere = append(event_log, *(said(ingested(announced())) for _ in range(2)))
    event_log.read(GROUP, "a host that is gone", count=1, wait_seconds=0.01)
    event_log.read(GROUP, "a host that is there", count=1, wait_seconds=0.01)

    async def test() -> None:
        await asyncio.sleep(0.3)
        event_log.take_over_from_absent(GROUP, "a host that is there", absent_seconds=60)
        stand_in = StandIn()
        await step(UploadDispatcher(event_log, cast(Runs, stand_in)))
        assert stand_in.driven == [gone]
        assert event_log.is_pending(GROUP, held_elsewhere)

    asyncio.run(test())


def test_what_redis_handed_out_without_its_answer_arriving_is_found_again(
    event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        stand_in = StandIn()
        dispatcher = UploadDispatcher(event_log, cast(Runs, stand_in))
        await step(dispatcher)
        (lost,) = append(event_log, said(ingested(announced())))
        event_log.read(GROUP, dispatcher._consumer, count=1, wait_seconds=0.01)
        monkeypatch.setattr(dispatch, "TAKE_OVER_SECONDS", 0.0)
        await step(dispatcher)
        assert stand_in.driven == [lost]

    asyncio.run(test())


def test_a_failing_acknowledgement_loses_nothing(event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = append(event_log, said(ingested(announced())), said(uploaded(announced())))

    def away(_log: EventLog, _group: str, *ids: str) -> None:
        if ids:
            raise RedisConnectionError("Redis is away")

    async def test() -> None:
        stand_in = StandIn()
        dispatcher = UploadDispatcher(event_log, cast(Runs, stand_in))
        monkeypatch.setattr(EventLog, "acknowledge", away)
        with pytest.raises(RedisConnectionError):
            await dispatcher.read(0.01)
        await dispatcher.start()
        assert stand_in.driven == [wanted]

    asyncio.run(test())


def test_a_pause_has_its_longest_however_many_tries_there_were() -> None:
    assert "try 5000" in str(try_again("its share is away", 5000, forever=True).message)
