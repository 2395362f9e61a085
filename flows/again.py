"""When a run tries again: soon at first, then ever more seldom, and without a place of its pool meanwhile."""

import asyncio
import random
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as current_run
from prefect.states import AwaitingRetry
from redis.exceptions import RedisError

from blocks.event_log import EventLog
from blocks.waits import Wait

# Pauses between tries (seconds): the first, doubled each time, up to the longest.
FIRST_PAUSE = 2.0
LONGEST_PAUSE = 900.0
# With these pauses, the last of so many tries comes after about ten hours.
TRIES = 60
# How the message of a state ends that counts as one of them.
_COUNTED = re.compile(r"\(try \d+ of \d+\)$")


def elsewhere(system: str) -> str:
    """Why a run can't be done on this host, for its operator."""
    return f"this host does not reach {system}, by its ARCHIVER_SYSTEMS: left to another worker"


def reason_of(error: Exception) -> str:
    """A failure in one line, for the operator."""
    return f"{type(error).__name__}: {error}"


def try_again(reason: str, tries: int, *, longest: float = LONGEST_PAUSE, forever: bool = False) -> State[None]:
    """The state of a run whose last try failed for something that may pass; to be returned by its flow.

    Whoever is free in the pool takes the run up again when it is due.

    Args:
        reason: a sentence for the operator, who sees it as the state's message.
        tries: how many there were.
        longest: the longest pause (seconds).
        forever: there is no last try, so none is announced.
    """
    # A float can't hold 2 to the power of 1024, and a service may be away for that many tries.
    ceiling = min(FIRST_PAUSE * 2.0 ** min(tries - 1, 30), longest)
    # At random, so that many runs that failed for the same cause don't return at once.
    pause = timedelta(seconds=random.uniform(ceiling / 2, ceiling))  # noqa: S311 - spreads load, no secret
    count = "" if forever else f" of {TRIES}"
    return AwaitingRetry(scheduled_time=datetime.now(UTC) + pause, message=f"{reason} (try {tries}{count})")


async def count_tries() -> int:
    """How many of the present run's tries failed for what it is about, with this one, since it was given up last.

    Its run count is no measure: a run is begun anew as well after a worker was stopped, or a service or share was away.
    """
    tries = 1
    # As the first one, if it can't be asked: a run must not end for that.
    with suppress(httpx.HTTPError):
        async with get_client() as client:
            for state in await client.read_flow_run_states(UUID(current_run.id)):
                tries = 1 if state.is_final() else tries + bool(_COUNTED.search(state.message or ""))
    return tries


async def tell(
    state: State[None], stage: Literal["ingest", "upload"], timestep_id: UUID | None, log: EventLog
) -> State[None]:
    """Have everybody know what a timestep waits for, if it is known which; returns the state that says so."""
    if timestep_id:
        wait = Wait.of(stage, state.message, state.state_details.scheduled_time, UUID(current_run.id))
        with suppress(RedisError):  # Prefect shows the state all the same
            await asyncio.to_thread(log.waits.tell, timestep_id, wait)
    return state
