"""Logs are JSON, and name the timestep they are about."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import Engine

from blocks.event_log import EventLog
from blocks.logs import log_about, log_as_json
from blocks.object_store import ObjectStore
from blocks.proven_object import Image
from blocks.settings import Settings
from tests.events import announced, uploaded
from tests.gateway import record
from tests.served_api import served

ONE, OTHER = UUID(int=1), UUID(int=2)

logger = logging.getLogger("blocks.of_the_tests")


class Lines(io.StringIO):
    """What was logged."""

    def read_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def lines() -> Iterator[Lines]:
    root = logging.getLogger()
    handlers = list(root.handlers)
    stream = Lines()
    logger.setLevel(logging.INFO)
    log_as_json(stream)
    yield stream
    root.handlers[:] = handlers


def test_a_line_says_when_who_and_what(lines: Lines) -> None:
    logger.info("recorded %d events", 3)
    (line,) = lines.read_lines()
    assert line.pop("time").startswith("20")
    assert line == {"level": "INFO", "logger": "blocks.of_the_tests", "message": "recorded 3 events"}


def test_an_exception_stays_in_its_line(lines: Lines) -> None:
    try:
        int("two\nlines")
    except ValueError:
        logger.exception("it failed")
    (line,) = lines.read_lines()
    assert "ValueError: invalid literal" in line["exc_info"]


def test_every_line_names_the_timestep_that_it_concerns(lines: Lines) -> None:
    async def work(timestep_id: UUID) -> None:
        log_about(timestep_id)
        logger.info("begins")
        await asyncio.sleep(0)
        await asyncio.to_thread(logger.info, "in a thread")

    async def both() -> None:
        await asyncio.gather(work(ONE), work(OTHER))
        logger.info("of nothing")

    asyncio.run(both())
    found = lines.read_lines()
    for timestep_id in (ONE, OTHER):
        about = [line["message"] for line in found if line.get("timestep_id") == str(timestep_id)]
        assert about == ["begins", "in a thread"]
    assert "timestep_id" not in found[-1]


def test_a_timestep_is_known_by_its_name_in_the_message(lines: Lines) -> None:
    logger.info("Timestep %s was announced before", ONE)
    logger.info("/api/1/timesteps/%s/images: object storage is away", ONE)
    logger.info("stream entry %s", OTHER, extra={"timestep_id": str(ONE)})
    logger.info("flow run %s", OTHER)
    assert [line.get("timestep_id") for line in lines.read_lines()] == [str(ONE)] * 3 + [None]


def test_requests_are_logged_without_their_query(
    lines: Lines, settings: Settings, object_store: ObjectStore, event_log: EventLog
) -> None:
    with served(settings) as url:
        log_as_json(lines)
        httpx.get(f"{url}/api/1/timesteps/{ONE}?token=hunter2")
    (line,) = (line for line in lines.read_lines() if line["logger"] == "uvicorn.access")
    assert (line["method"], line["status"], line["timestep_id"]) == ("GET", 404, str(ONE))
    assert line["path"] == f"/api/1/timesteps/{ONE}"
    assert "hunter2" not in lines.getvalue()


def test_an_error_in_the_middle_of_an_image_names_its_timestep(
    lines: Lines, settings: Settings, object_store: ObjectStore, event_log: EventLog, engine: Engine
) -> None:
    event = announced()
    content = bytes(3_000_000)
    etag = object_store.client.put_object(Bucket=settings.bucket, Key=event.key, Body=content)["ETag"].strip('"')
    image = Image(name="Img/a.tif", offset=0, size=len(content), sha256="ab" * 32)
    record(engine, event_log, uploaded(event, bucket=settings.bucket, etag=etag, images=[image]))
    with served(settings) as url:
        log_as_json(lines)
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{url}/api/1/timesteps/{event.timestep_id}/images/{image.name}")
        httpx.get(f"{url}/health")
    found = lines.read_lines()
    (error,) = (line for line in found if line["level"] == "ERROR")
    assert "has SHA-256" in error["exc_info"]
    assert error["timestep_id"] == str(event.timestep_id)
    assert "timestep_id" not in next(line for line in found if line.get("path") == "/health")
