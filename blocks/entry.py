"""An entry of the stream, and the groups that read it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import ValidationError

from blocks.messages import LogEvent

Group = Literal["upload-worker", "state-manager"]
GROUPS: tuple[Group, ...] = ("upload-worker", "state-manager")


# The milliseconds since 1970 when it was appended, and its number among the entries of that moment.
Place = tuple[int, int]


def place_of(id: str) -> Place:
    """Where the entry of this id stands in the stream."""
    milliseconds, _, number = id.partition("-")
    return int(milliseconds), int(number)


class UnreadableEntry(Exception):
    """An entry of the stream that is not one of our events; the message says why."""


@dataclass(frozen=True)
class Entry:
    """An entry of the stream, as it was delivered to a group."""

    id: str
    fields: dict[str, str]

    @property
    def type(self) -> str:
        """The event's type, readable without decoding the event."""
        return self.fields.get("type", "")

    @property
    def place(self) -> Place:
        """Where it stands among the others."""
        return place_of(self.id)

    def decode(self) -> LogEvent:
        """The event in this entry.

        Raises:
            UnreadableEntry: when it can't be decoded.
        """
        return self._event

    @cached_property
    def _event(self) -> LogEvent:
        try:
            return LogEvent.read(self.fields["event"], self.type)
        except KeyError:
            raise UnreadableEntry(f"stream entry {self.id} has no field 'event'") from None
        except ValidationError as error:
            raise UnreadableEntry(f"stream entry {self.id} is not an event of ours: {error}") from error
