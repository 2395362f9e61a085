"""Entries of the stream that wait for their runs."""

import json
from collections import deque
from collections.abc import Container, Iterator
from typing import NamedTuple, Self

from blocks.entry import Entry, place_of


class Lane(NamedTuple):
    """What waits behind each other: timesteps of one system that have the same priority."""

    system: str
    priority: int

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """The lane of an entry. One that can't be read belongs to no system: who takes it will see."""
        try:
            # Not decoded whole, as of a backlog there may be very many.
            data = json.loads(entry.fields["event"])["data"]
            return cls(str(data["system"]), int(data.get("priority", 0)))
        except (AttributeError, KeyError, TypeError, ValueError):
            return cls("", 0)


class Waiting:
    """The ids of what waits, in lanes. The highest priority comes first; of that, the oldest or the newest."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, deque[str]] = {}

    def __iter__(self) -> Iterator[str]:
        return (id for ids in self._lanes.values() for id in ids)

    @property
    def systems(self) -> set[str]:
        """Those of which something waits."""
        return {lane.system for lane in self._lanes}

    def count(self, systems: Container[str]) -> int:
        """How many wait of these systems."""
        return sum(len(ids) for lane, ids in self._lanes.items() if lane.system in systems)

    def add(self, id: str, lane: Lane) -> None:
        """Have it wait as the newest."""
        self._lanes.setdefault(lane, deque()).append(id)

    def take(self, systems: Container[str], *, newest: bool) -> tuple[str, Lane] | None:
        """Of these systems, the oldest or the newest of those with the highest priority; None if none waits."""
        lanes = [lane for lane in self._lanes if lane.system in systems]
        if not lanes:
            return None
        highest = max(lane.priority for lane in lanes)
        ends = {lane: self._lanes[lane][-1 if newest else 0] for lane in lanes if lane.priority == highest}
        lane = (max if newest else min)(ends, key=lambda lane: place_of(ends[lane]))
        ids = self._lanes[lane]
        id = ids.pop() if newest else ids.popleft()
        if not ids:
            del self._lanes[lane]
        return id, lane

    def put_back(self, id: str, lane: Lane, *, newest: bool) -> None:
        """Undo that it was taken."""
        ids = self._lanes.setdefault(lane, deque())
        ids.append(id) if newest else ids.appendleft(id)
