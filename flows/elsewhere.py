"""Systems whose disks other hosts have: what a scheduled run can't do here, it asks for there."""

import asyncio
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.runtime import deployment
from prefect.runtime import flow_run as current_run

from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.reach import queue_of
from blocks.settings import Settings

# An event-ingester tells what it sees every few seconds. One that has not for so long is gone.
RECENT = timedelta(minutes=10)


def seen_elsewhere(log: EventLog, here: Collection[str]) -> list[str]:
    """The systems that an event-ingester watches, but that are not among those found here."""
    since = datetime.now(UTC) - RECENT
    return [seen.name for seen in log.systems.all() if seen.at > since and seen.name not in here]


def say_elsewhere(settings: Settings, here: Iterable[ImagingSystem], say: Callable[[str], object]) -> None:
    """Tell the operator of a command which systems it does not look at."""
    with closing(EventLog.from_settings(settings)) as log:
        if others := seen_elsewhere(log, {system.name for system in here}):
            say(f"not looked at, because another host has it: {', '.join(others)}; run this there too")


async def ask_elsewhere(settings: Settings, here: Iterable[ImagingSystem], parameters: dict[str, Any]) -> None:
    """Ask for a run of the present run's deployment for each system that is elsewhere, where that is reached."""
    if deployment.id is None:
        return
    with closing(EventLog.from_settings(settings)) as log:
        others = await asyncio.to_thread(seen_elsewhere, log, {system.name for system in here})
    async with get_client() as client:
        for system in others:
            await client.create_flow_run_from_deployment(
                UUID(deployment.id),
                name=f"{current_run.name} of {system}",
                parameters={**parameters, "system": system},
                tags=[system],
                # The present run may be tried again.
                idempotency_key=f"{current_run.id}:{system}",
                work_queue_name=queue_of(system),
            )
            get_run_logger().info("%s is on another host: asked for a run there", system)
