"""surf-archiver's messages over a real RabbitMQ end in our stream, from the real surf-archiver 0.1.3 too."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import aio_pika
import aio_pika.exceptions
import pytest
from aio_pika.abc import AbstractChannel
from pydantic import SecretStr
from sqlalchemy import Engine

import flows.bridge
from blocks.entry import Entry
from blocks.event_log import EventLog
from blocks.messages import Archived, LogEvent
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from flows.bridge import DEAD_LETTERS, QUEUE, keep_bridging
from flows.check import check
from flows.record import record_waiting
from tests.events import announced, uploaded
from tests.rabbitmq import RabbitMQ, missing_programs
from tests.surf_archiver import archive, notice, publish
from tests.test_record import the_timestep

WAIT_SECONDS = 30.0
ARCHIVE = "images/20261101_004/20261123.tar"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    if missing := missing_programs():
        pytest.skip(f"no RabbitMQ without {', '.join(missing)}: apt-get install rabbitmq-server")
    with RabbitMQ.running(tmp_path_factory.mktemp("rabbitmq")) as broker:
        yield broker


@pytest.fixture
def bridged(settings: Settings, broker: RabbitMQ, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(flows.bridge, "RECONNECT_SECONDS", 0.2)
    return settings.model_copy(update={"rabbitmq_url": SecretStr(broker.url)})


def test_the_check_tells_a_broker_that_lets_us_in(bridged: Settings, broker: RabbitMQ) -> None:
    def fault(url: str) -> str:
        findings = check(bridged.model_copy(update={"rabbitmq_url": SecretStr(url)}))
        return next(finding.fault for finding in findings if finding.about == "RabbitMQ")

    assert not fault(broker.url)
    wrong = fault(broker.url.replace("guest@", "very-secret@"))
    assert wrong.startswith("ARCHIVER_RABBITMQ_URL: ")
    assert "ACCESS_REFUSED" in wrong
    assert "very-secret" not in wrong
    assert "ARCHIVER_RABBITMQ_URL: " in fault("amqp://guest:guest@127.0.0.1:1/")


@asynccontextmanager
async def bridging(settings: Settings, log: EventLog) -> AsyncIterator[AbstractChannel]:
    """The bridge beside a channel of the test's own, from when it listens on."""
    assert settings.rabbitmq_url is not None
    bridge = asyncio.create_task(keep_bridging(settings, log))
    try:
        async with await aio_pika.connect(settings.rabbitmq_url.get_secret_value()) as connection:
            channel = await connection.channel()

            async def listens() -> bool:
                queue = await channel.declare_queue(QUEUE, durable=True)
                return bool(queue.declaration_result.consumer_count)

            await until(listens)
            yield channel
    finally:
        bridge.cancel()
        with suppress(asyncio.CancelledError):
            await bridge


async def until(ask: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not await ask():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def said(log: EventLog) -> list[Archived]:
    """What stands in the stream."""
    entries = [Entry(id, fields) for id, fields in cast(Any, log.redis.xrange(log.stream))]
    return [entry.decode().data for entry in entries if entry.type == Archived.type]  # type: ignore[misc]


async def until_said(log: EventLog, *keys: str) -> None:
    async def are_said() -> bool:
        return {archived.key for archived in said(log)} >= set(keys)

    await until(are_said)


def test_what_makes_sense_gets_into_the_stream_and_the_rest_is_kept(bridged: Settings, event_log: EventLog) -> None:
    job = uuid4()
    mixed = notice(
        {"path": ARCHIVE, "src_keys": [f"{bridged.bucket}/images/e/1/1.tar", 7, "images/e/1/2.tar"]},
        "no archive",
        {"path": "other.tar", "src_keys": ["elsewhere/images/e/1/3.tar"]},
        job=job,
    )

    async def test() -> list[tuple[bytes, str]]:
        async with bridging(bridged, event_log) as channel:
            dead_letters = await channel.declare_queue(DEAD_LETTERS, durable=True)
            await dead_letters.purge()
            sound = notice({"path": ARCHIVE, "src_keys": ["images/e/1/4.tar"]}, job=job)
            await publish(channel, b"no JSON", mixed, mixed, b"[1, 2]", sound)
            await until_said(event_log, "images/e/1/4.tar")
            kept = []
            for _ in range(4):
                message = await dead_letters.get(timeout=WAIT_SECONDS)
                assert message is not None
                kept.append((message.body, str(message.headers["reason"])))
                await message.ack()
            return kept

    kept = asyncio.run(test())
    assert [body for body, _ in kept] == [b"no JSON", mixed, mixed, b"[1, 2]"]
    assert "not valid JSON" in kept[0][1]
    assert "archives.0.src_keys.1" in kept[1][1]
    assert "archives.1" in kept[1][1]
    # Of another bucket: kept as it was said, and never the key of a timestep of ours.
    assert [archived.key for archived in said(event_log)] == [
        "images/e/1/1.tar",
        "images/e/1/2.tar",
        "elsewhere/images/e/1/3.tar",
        "images/e/1/4.tar",
    ]
    assert {archived.job_id for archived in said(event_log)} == {job}


def test_what_can_not_be_used_is_kept_also_where_its_queue_was_deleted(bridged: Settings, event_log: EventLog) -> None:
    async def test() -> None:
        async with bridging(bridged, event_log) as channel:
            await channel.queue_delete(DEAD_LETTERS)
            await publish(channel, b"no JSON at all")
            kept: list[bytes] = []

            async def is_kept() -> bool:
                try:
                    async with await aio_pika.connect(url) as connection:
                        dead_letters = await (await connection.channel()).declare_queue(DEAD_LETTERS, passive=True)
                        message = await dead_letters.get(fail=False)
                        kept.extend([message.body] if message else [])
                except aio_pika.exceptions.ChannelNotFoundEntity:
                    pass  # nobody has declared it again as yet
                return bool(kept)

            await until(is_kept)
            assert kept == [b"no JSON at all"]

    url = bridged.rabbitmq_url.get_secret_value() if bridged.rabbitmq_url else ""
    asyncio.run(test())


def test_a_message_stays_in_the_queue_until_it_is_in_the_stream(bridged: Settings, event_log: EventLog) -> None:
    async def test() -> None:
        away = EventLog(url=SecretStr("redis://127.0.0.1:1/0"))
        async with bridging(bridged, away) as channel:
            await publish(channel, notice({"path": ARCHIVE, "src_keys": ["images/e/2/1.tar"]}))
            await asyncio.sleep(0.5)
        assert said(event_log) == []
        async with bridging(bridged, event_log):
            await until_said(event_log, "images/e/2/1.tar")

    asyncio.run(test())


def test_a_broker_that_restarts_is_found_again(bridged: Settings, event_log: EventLog, broker: RabbitMQ) -> None:
    async def test() -> None:
        async with bridging(bridged, event_log):
            await asyncio.to_thread(broker.stop)
            await asyncio.to_thread(broker.start)
            async with bridging(bridged, event_log) as channel:
                await publish(channel, notice({"path": ARCHIVE, "src_keys": ["images/e/3/1.tar"]}))
                await until_said(event_log, "images/e/3/1.tar")

    with suppress(aio_pika.exceptions.AMQPError):
        # The test's own connection breaks off with the broker.
        asyncio.run(test())
    assert [archived.key for archived in said(event_log)] == ["images/e/3/1.tar"]


def test_what_the_real_surf_archiver_publishes_is_recorded(
    bridged: Settings, event_log: EventLog, broker: RabbitMQ, object_store: ObjectStore, engine: Engine, tmp_path: Path
) -> None:
    event = announced(timestamp=datetime(2020, 1, 1, tzinfo=UTC))
    object_store.client.put_object(Bucket=bridged.bucket, Key=event.key, Body=b"a timestep")
    job = uuid4()

    async def test() -> None:
        async with bridging(bridged, event_log):
            await asyncio.to_thread(archive, "0.1.3", bridged, tmp_path / "tape", job, broker.url)
            await until_said(event_log, event.key)

    asyncio.run(test())
    (archived,) = said(event_log)
    assert (archived.job_id, archived.archive) == (job, f"images/{event.experiment_id}/20200101.tar")
    assert (tmp_path / "tape" / archived.archive).exists()
    # It came before the upload was recorded.
    record_waiting(event_log, engine, "test", 10, linger_seconds=0.001)
    event_log.append(LogEvent.of(uploaded(event, bucket=bridged.bucket), "test"))
    record_waiting(event_log, engine, "test", 10, linger_seconds=0.001)
    assert the_timestep(engine).state == "archived"
