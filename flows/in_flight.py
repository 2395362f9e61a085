"""Entries of the stream that have a run, and when to look at them again."""

import time
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass

from prefect.client.schemas.objects import StateType

from flows.runs import Driven
from flows.waiting import Lane

# Whether another worker is done with what it was left (seconds).
ELSEWHERE_SECONDS = 2.0


@dataclass
class _Entry:
    """When to look whether it is done, and when to ask for its run (monotonic seconds)."""

    lane: Lane
    look_at: float
    drive_at: float
    is_queued: bool


class InFlight:
    """What has a run, by the ids of the entries."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._systems: Counter[str] = Counter()
        self._queued: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def count(self, system: str) -> int:
        """How many have a run of this system."""
        return self._systems[system]

    def queued(self, systems: Container[str]) -> int:
        """How many of these systems wait in a queue for their first worker."""
        return sum(count for system, count in self._queued.items() if system in systems)

    def put(self, id: str, lane: Lane, driven: Driven) -> None:
        """Remember how the run of an entry is doing."""
        self.forget(id)
        now = time.monotonic()
        drive_at = now + driven.look_in
        is_queued = driven.state_type == StateType.SCHEDULED and not driven.is_retry
        look_at = min(drive_at, now + ELSEWHERE_SECONDS) if is_queued else drive_at
        self._entries[id] = _Entry(lane, look_at, drive_at, is_queued)
        self._systems[lane.system] += 1
        self._queued[lane.system] += is_queued

    def forget(self, id: str) -> None:
        """It is done, if it was in flight at all."""
        if entry := self._entries.pop(id, None):
            self._systems[entry.lane.system] -= 1
            self._queued[entry.lane.system] -= entry.is_queued

    def lane(self, id: str) -> Lane:
        """Where it came from."""
        return self._entries[id].lane

    def to_look_at(self) -> list[str]:
        """Those that may be done by now."""
        now = time.monotonic()
        return [id for id, entry in self._entries.items() if entry.look_at <= now]

    def is_to_drive(self, id: str) -> bool:
        """Whether to ask for its run, if it is not done. If not yet, it is looked at again later."""
        entry, now = self._entries[id], time.monotonic()
        entry.look_at = min(entry.drive_at, now + ELSEWHERE_SECONDS)
        return entry.drive_at <= now

    def look_at_once(self, id: str) -> None:
        """Its run has ended."""
        if entry := self._entries.get(id):
            entry.look_at = entry.drive_at = time.monotonic()
