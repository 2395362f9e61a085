"""Entries of the stream that one group could not work on, each with the reason."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, cast

import redis

from blocks.entry import Entry

# Pending again for the group, and idle for so long that whoever looks next takes it over at once.
_REDRIVE = """
if #redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2]) == 0 then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], 'replay', 0, ARGV[2], 'IDLE', 86400000, 'FORCE', 'JUSTID')
redis.call('XDEL', KEYS[2], ARGV[3])
return 1
"""

Outcome = Literal["given again", "gone"]
_Page = list[tuple[str, dict[str, str]]]


@dataclass(frozen=True)
class DeadLetter:
    """An entry that was set aside."""

    id: str
    """Its own, in the dead-letter stream."""
    entry: Entry
    reason: str

    @property
    def entry_id(self) -> str:
        """Of its entry in the stream."""
        return self.entry.id

    @property
    def type(self) -> str:
        """Of its event, as far as it can be told."""
        return self.entry.type

    @property
    def timestep_id(self) -> str:
        """The timestep it is about; empty where there is none."""
        return self.entry.fields.get("timestep_id", "")

    @property
    def set_aside_at(self) -> datetime:
        return datetime.fromtimestamp(int(self.id.split("-")[0]) / 1000, UTC)


class DeadLetters:
    """What a group has set aside. It lives beside the log, in the same Redis."""

    def __init__(self, connection: redis.Redis, stream: str, group: str) -> None:
        self._redis = connection
        self._stream = stream
        self._group = group
        self._letters = f"{stream}:dead-letter:{group}"

    def __len__(self) -> int:
        return self._redis.xlen(self._letters)

    def __iter__(self) -> Iterator[DeadLetter]:
        """Oldest first."""
        after = "-"
        while page := cast(_Page, self._redis.xrange(self._letters, after, count=100)):
            yield from map(_letter, page)
            after = f"({page[-1][0]}"

    def newest(self, count: int) -> list[DeadLetter]:
        """The last ones, newest first."""
        return list(map(_letter, cast(_Page, self._redis.xrevrange(self._letters, count=count))))

    def add(self, entry: Entry, reason: str) -> None:
        """Take an entry out of the group's work, and keep it with the reason."""
        fields = {**entry.fields, "entry_id": entry.id, "reason": reason}
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xadd(self._letters, fields)  # type: ignore[arg-type]
            pipeline.xack(self._stream, self._group, entry.id)
            pipeline.execute()

    def redrive(self, letter: DeadLetter) -> Outcome:
        """Give a letter's entry to the group once more, as if it had just failed to finish it.

        Returns:
            "gone" when the entry is not in the stream any more; then the letter stays.
        """
        keys = (self._stream, self._letters)
        given = self._redis.eval(_REDRIVE, len(keys), *keys, self._group, letter.entry.id, letter.id)
        return "given again" if given else "gone"

    def discard(self, letter: DeadLetter) -> None:
        """Forget a letter for good."""
        self._redis.xdel(self._letters, letter.id)


def _letter(row: tuple[str, dict[str, str]]) -> DeadLetter:
    id, fields = row
    content = {name: value for name, value in fields.items() if name not in ("entry_id", "reason")}
    return DeadLetter(id, Entry(fields["entry_id"], content), fields["reason"])
