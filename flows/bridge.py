"""What surf-archiver up to 0.1.3 publishes over AMQP, taken into the stream."""

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from pydantic import SecretStr
from redis.exceptions import RedisError

from blocks.errors import ArchiverError
from blocks.event_log import EventLog
from blocks.messages import LogEvent
from blocks.settings import Settings
from blocks.surf_archiver import SOURCE, InvalidNotice, Reading, read_notice

if TYPE_CHECKING:
    from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage

logger = logging.getLogger(__name__)

EXCHANGE = "surf-data-archive"
QUEUE = "state-manager"
# What could not be used of the messages: whole messages, each with the reason in its header `reason`.
DEAD_LETTERS = "state-manager.dead-letter"

RECONNECT_SECONDS = 5.0
_MAX_REASON = 2000  # characters; a broker limits the size of headers


class BridgeNotInstalled(ArchiverError):
    """ARCHIVER_RABBITMQ_URL is set, but what speaks AMQP is not installed."""


async def keep_bridging(settings: Settings, log: EventLog) -> None:
    """Take notices from the broker's queue into the stream, until cancelled.

    Raises:
        BridgeNotInstalled: without the extra `amqp`.
    """
    away = _what_the_broker_raises()
    while True:
        try:
            await _bridge(settings, log)
        except away as error:
            logger.warning("surf-archiver's broker is away, so its notices wait: %s: %s", type(error).__name__, error)
        await asyncio.sleep(RECONNECT_SECONDS)


async def why_closed(settings: Settings) -> str:
    """Why the broker does not let us in; empty where it does.

    Raises:
        BridgeNotInstalled: without the extra `amqp`.
    """
    away = _what_the_broker_raises()
    try:
        await (await _connect(settings)).close()
    except away as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _what_the_broker_raises() -> tuple[type[Exception], ...]:
    try:
        from aio_pika.exceptions import AMQPError, ChannelInvalidStateError
    except ModuleNotFoundError as error:
        raise BridgeNotInstalled(
            "ARCHIVER_RABBITMQ_URL is set, which needs aio-pika: pip install 'timestep-archiver[amqp]'"
        ) from error
    # The last is no AMQPError: what acknowledges a message whose channel has closed meanwhile raises it.
    return AMQPError, OSError, ChannelInvalidStateError


async def _connect(settings: Settings) -> "AbstractConnection":
    from aio_pika import connect

    return await connect(cast(SecretStr, settings.rabbitmq_url).get_secret_value(), timeout=10)


async def _bridge(settings: Settings, log: EventLog) -> None:
    """Take in what comes, for as long as the broker stays."""
    from aio_pika import ExchangeType

    async with await _connect(settings) as connection:
        # What finds no queue of dead letters is not acknowledged: both begin anew, when the queue is declared.
        channel = await connection.channel(on_return_raises=True)
        await channel.set_qos(prefetch_count=10)
        # As surf-archiver declares it; it is gone whenever the broker restarts, our queues are not.
        exchange = await channel.declare_exchange(EXCHANGE, ExchangeType.FANOUT)
        await channel.declare_queue(DEAD_LETTERS, durable=True)
        queue = await channel.declare_queue(QUEUE, durable=True)
        await queue.bind(exchange)
        logger.info("Listening to surf-archiver at the broker")
        async with queue.iterator() as messages:
            async for message in messages:
                await _take_in(message, channel, settings.bucket, log)


async def _take_in(message: "AbstractIncomingMessage", channel: "AbstractChannel", bucket: str, log: EventLog) -> None:
    """Acknowledge a message once everything in it that makes sense is in the stream, and the rest is kept."""
    try:
        reading = await asyncio.to_thread(read_notice, message.body, bucket)
    except InvalidNotice as error:
        reading = Reading(refused=[str(error)])
    await _append([LogEvent.of(archived, SOURCE) for archived in reading.archived], log)
    if reading.refused:
        await _keep(message, "; ".join(reading.refused), channel)
    await message.ack()
    logger.info("surf-archiver's notice: %d keys, %d refused", len(reading.archived), len(reading.refused))


async def _append(events: list[LogEvent], log: EventLog) -> None:
    while True:
        try:
            await asyncio.to_thread(log.append_all, events)
        except RedisError as error:
            logger.warning("surf-archiver's notice waits, because Redis is away: %s", error)
            await asyncio.sleep(2)
        else:
            return


async def _keep(message: "AbstractIncomingMessage", reason: str, channel: "AbstractChannel") -> None:
    from aio_pika import DeliveryMode, Message

    logger.warning("surf-archiver's notice is kept in the queue %s: %s", DEAD_LETTERS, reason)
    copy = Message(message.body, headers={"reason": reason[:_MAX_REASON]}, delivery_mode=DeliveryMode.PERSISTENT)
    await channel.default_exchange.publish(copy, DEAD_LETTERS)
