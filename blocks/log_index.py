"""Which events stand in the log, and in which entries: enough of each to compare the log with the history."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast
from uuid import UUID

from blocks.entry import Place, UnreadableEntry, place_of
from blocks.event_log import EventLog

# An event's id is among its first words. All else that it says, like the hashes of its images, stays in Redis.
_BEGINNINGS = """
local found = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])) do
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    local type, timestep_id = fields["type"] or "", fields["timestep_id"] or ""
    found[#found + 1] = {entry[1], string.sub(fields["event"] or "", 1, 100), type, timestep_id}
end
return found
"""
_ID = re.compile(r'\{"specversion":"1\.0","id":"([0-9a-f-]{36})"')
# Redis answers nobody else while it looks so many up.
_PAGE = 200


@dataclass(frozen=True)
class Said:
    """That something was said: an entry of the stream, or of the history, and the event in it."""

    entry_id: str
    event_id: UUID | None
    """None where the entry can't be read."""
    type: str
    timestep_id: str

    @property
    def place(self) -> Place:
        """Where it stands among the others."""
        return place_of(self.entry_id)

    def __str__(self) -> str:
        return f"{self.type or 'entry'} {self.entry_id}" + (f" of {self.timestep_id}" if self.timestep_id else "")


def said_in(log: EventLog, before: Place) -> Iterator[Said]:
    """What stands in the stream before a place, oldest first."""
    after = "-"
    while page := cast(list[list[str]], log.redis.eval(_BEGINNINGS, 1, log.stream, after, str(_PAGE))):
        for entry_id, beginning, type, timestep_id in page:
            if place_of(entry_id) >= before:
                return
            found = _ID.match(beginning)
            yield Said(entry_id, UUID(found[1]) if found else _read_id(log, entry_id), type, timestep_id)
        after = f"({page[-1][0]}"


def _read_id(log: EventLog, entry_id: str) -> UUID | None:
    """The id of an event that was written by somebody else, or not at all."""
    entry = log.entry(entry_id)
    try:
        return entry.decode().id if entry else None
    except UnreadableEntry:
        return None
