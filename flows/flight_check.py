"""Checks every hour that the whole way is open, from a microscope's directory to the database. If not: an alarm."""

import asyncio
from contextlib import ExitStack, closing
from uuid import UUID

from prefect import State, flow, get_run_logger, states
from prefect.runtime import flow_run as current_run
from prefect.states import Completed
from redis.exceptions import RedisError

from blocks.database import create_engine
from blocks.event_log import EventLog
from blocks.flight_outcome import Verdict
from blocks.lease import LeaseTaken, hold
from blocks.settings import Settings, get_settings
from blocks.synthetic_timestep import IMAGES, SYSTEM
from flows.again import elsewhere, try_again
from flows.bounded import Broken, NotPossible
from flows.flight import Flight, Limits
from flows.notification import notify
from flows.withdrawal import Places

TITLE = "Flight check of the timestep archiver"
# Another one under way is waited for so long (seconds): its process may have been killed.
ALONE_SECONDS = 40.0
# So often a run comes to a host that does not reach its system, before it is told that none does.
TRIES = 10


@flow(name="flight-check", flow_run_name="flight check", persist_result=False)
async def flight_check(
    ingest_seconds: float = 120.0, upload_seconds: float = 600.0, record_seconds: float = 120.0
) -> State[None]:
    """Send a synthetic timestep the whole way, compare what arrives with what was sent, and remove all of it.

    Args:
        ingest_seconds: in which it has to be taken in.
        upload_seconds: in which it then has to be in object storage; others may be uploaded meanwhile.
        record_seconds: in which it then has to be in the database, and in the end has to be out of it.

    Returns:
        Completed, also where it is not possible; or Failed, with a sentence that says what to look at.
    """
    settings = get_settings()
    settings.require("data_dir", "database_url")
    tries = current_run.run_count
    if not settings.reaches(SYSTEM) and tries < TRIES:
        return try_again(elsewhere(SYSTEM), tries, longest=5.0, forever=True)
    engine = create_engine(settings)
    try:
        with closing(EventLog.from_settings(settings)) as log, ExitStack() as stack:
            if not await _is_alone(log, stack):
                return Completed(message="another flight check is under way")
            if not settings.reaches(SYSTEM):
                sentence = f"no host was found that reaches {SYSTEM}: name it in the ARCHIVER_SYSTEMS of one"
                return await conclude("not possible", sentence, settings, log)
            limits = Limits(ingest_seconds, upload_seconds, record_seconds)
            verdict, sentence = await check(Places.of(settings, engine, log), limits)
            return await conclude(verdict, sentence, settings, log)
    finally:
        engine.dispose()


async def _is_alone(log: EventLog, stack: ExitStack) -> bool:
    """Take the lease of flight checks, for as long as the stack is open; False if another one keeps it."""
    until = asyncio.get_running_loop().time() + ALONE_SECONDS
    while True:
        try:
            stack.enter_context(hold(log.redis, f"{log.stream}:lease:{SYSTEM}"))
        except LeaseTaken:
            if asyncio.get_running_loop().time() > until:
                return False
            await asyncio.sleep(1)
        else:
            return True


async def check(places: Places, limits: Limits) -> tuple[Verdict, str]:
    """Check the way; returns what came of it, whatever that is, with a sentence for a person."""
    flight = Flight(places, limits, get_run_logger().info, UUID(current_run.id))
    try:
        await flight.clear()
        seconds = await flight.go()
    except NotPossible as error:
        return "not possible", str(error)
    except Broken as error:
        return "failed", str(error)
    except Exception as error:
        get_run_logger().exception("broken off")
        return "failed", f"it was broken off by {type(error).__name__}: {error}"
    return "good", f"a timestep of {IMAGES} images went the whole way in {seconds:.1f} s, and was removed again"


async def conclude(verdict: Verdict, sentence: str, settings: Settings, log: EventLog) -> State[None]:
    """Tell people where it is news, everybody else in any case, and end the run."""
    # People are told first: should this process die in between, they are told twice.
    is_alarmed = await _tell_people(
        verdict, sentence, settings.report_block, was_alarmed=await asyncio.to_thread(_was_alarmed, log)
    )
    try:
        await asyncio.to_thread(log.flights.tell, verdict, sentence, is_alarmed=is_alarmed)
    except RedisError as error:
        get_run_logger().warning("the API does not know of it: %s", error)
    if verdict == "failed":
        return states.Failed(message=sentence)
    return Completed(message=sentence, name="NotPossible" if verdict == "not possible" else "Completed")


def _was_alarmed(log: EventLog) -> bool:
    try:
        before = log.flights.last()
    except RedisError:
        return False
    return before is not None and before.is_alarmed


async def _tell_people(verdict: Verdict, sentence: str, block: str | None, *, was_alarmed: bool) -> bool:
    """Send a message when it fails for the first time, and when it is good again; returns whether they are alarmed."""
    is_failed = verdict == "failed"
    if block is None or verdict == "not possible" or is_failed == was_alarmed:
        return was_alarmed
    try:
        await notify(block, TITLE, f"It failed: {sentence}" if is_failed else f"It is good again: {sentence}")
    except Exception as error:
        # Whatever a block raises: the run's own outcome must not be hidden by it. The next one tells them.
        get_run_logger().exception("nobody could be told: %s", error)
        return was_alarmed
    return is_failed
