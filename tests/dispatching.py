"""A dispatcher taken step by step, and what can stand in for the runs that it asks for."""

from typing import Any, Literal
from uuid import uuid4

from prefect.client.schemas.objects import StateType

from blocks.event_log import EventLog
from blocks.messages import LogEvent
from flows.dispatch import UploadDispatcher
from flows.runs import Driven

GROUP: Literal["upload-worker"] = "upload-worker"


def append(log: EventLog, *events: LogEvent) -> list[str]:
    return [log.append(event) for event in events]


def held(log: EventLog, dispatcher: UploadDispatcher) -> list[str]:
    return [entry.id for entry in log.held(GROUP, dispatcher._consumer, count=100)]


async def step(dispatcher: UploadDispatcher) -> None:
    await dispatcher.read(wait_seconds=0.01)
    await dispatcher.start()


class StandIn:
    """In place of Runs: with so many places, to fail on purpose, and without the cost of a run."""

    def __init__(self, places: int = 1000) -> None:
        self.places = places
        self.driven: list[str] = []
        self.queued: list[str] = []
        self.paused: set[str] = set()
        self.failures: list[Exception] = []
        self.are_shared = False

    async def has_to_queue(self, queue: str) -> bool:
        return queue in self.paused

    async def drive(
        self, work: str, parameters: dict[str, Any], may_begin: bool, may_queue: bool, **_rest: object
    ) -> Driven | None:
        if self.failures:
            raise self.failures.pop(0)
        if may_begin and self.places:
            self.places -= 1
        elif may_queue:
            self.queued.append(parameters["entry_id"])
            return Driven(uuid4(), StateType.SCHEDULED, False, 1000.0)
        else:
            return None
        self.driven.append(parameters["entry_id"])
        return Driven(uuid4(), StateType.PENDING, False, 1000.0)
