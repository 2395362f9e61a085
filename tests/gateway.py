"""What the tests of the gateway share."""

from typing import Any

from fastapi.testclient import TestClient
from httpx import Response
from sqlalchemy import Engine

from blocks.event_log import EventLog
from blocks.messages import EventData, LogEvent
from flows.record import record_waiting


def record(engine: Engine, log: EventLog, *said: EventData) -> None:
    """Let the stages say something, and the state-manager record it."""
    for data in said:
        log.append(LogEvent.of(data, "test"))
    record_waiting(log, engine, "test", limit=500, linger_seconds=0.001)


def pages(client: TestClient, path: str, **query: Any) -> list[list[dict[str, Any]]]:
    """All pages of a list."""
    found = []
    cursor = None
    while True:
        answer = client.get(path, params={**query, **({"cursor": cursor} if cursor else {})})
        assert answer.status_code == 200, answer.text
        page = answer.json()
        found.append(page["data"])
        cursor = page["next"]
        if cursor is None:
            return found


def problem(answer: Response, status: int) -> str:
    """The detail of a problem document of this status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    return str(document["detail"])
