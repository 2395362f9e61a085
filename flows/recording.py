"""The state-manager: has the stream's events recorded as they come, and what RabbitMQ tells put into the stream."""

import asyncio
import logging

import httpx
from prefect.exceptions import ObjectNotFound
from redis.exceptions import RedisError

from blocks.event_log import EventLog
from blocks.settings import Settings
from flows.bridge import keep_bridging
from flows.entrypoint import Companion, consumer_name, entrypoint
from flows.runs import Runs

logger = logging.getLogger(__name__)

# Events are recorded at once when it is quiet, and at least this long (seconds) after the run before.
RECORD_SECONDS = 2.0


async def keep_recording(log: EventLog, runs: Runs) -> None:
    """Run record-events whenever the stream has something for the state-manager, until cancelled."""
    consumer = consumer_name("state-manager")
    while True:
        try:
            if not await asyncio.to_thread(log.has_work, "state-manager"):
                await asyncio.sleep(0.3)
                continue
            state = await runs.run_once(f"record events of {consumer}", {"consumer": consumer})
        except (httpx.HTTPError, ObjectNotFound, RedisError) as error:
            logger.warning("Events wait in the stream, because a service is away: %s: %s", type(error).__name__, error)
            await asyncio.sleep(2)
            continue
        if state is None or not state.is_completed():
            logger.error("Events were not recorded, and will be tried again: %s", state)
            await asyncio.sleep(5)
        await asyncio.sleep(RECORD_SECONDS)


async def state_manager(settings: Settings) -> None:
    """The entrypoint: have the stream's events recorded, and execute these runs, until a signal."""
    settings.require("database_url")
    async with entrypoint("state-manager", settings) as this:
        runs = this.runs("record-events/state-manager")
        companions: list[Companion] = [lambda: keep_recording(this.log, runs)]
        if settings.rabbitmq_url:
            companions.append(lambda: keep_bridging(settings, this.log))
        await this.serve(*companions)
