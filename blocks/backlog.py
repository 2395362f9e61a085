"""How far a reader of the stream is behind its end, and what of the stream nobody needs any more."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import cast

import redis

from blocks.dead_letters import DeadLetters
from blocks.entry import GROUPS, Group, place_of
from blocks.errors import ArchiverError

# Entries are counted one by one up to here: it keeps everybody else from Redis meanwhile.
COUNTED = 10_000

# Counted where the entries are: many of them are large.
_COUNT_BEHIND = """
local count, last = 0, ARGV[1]
repeat
    local page = redis.call('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', 500)
    count = count + #page
    if #page > 0 then last = page[#page][1] end
until #page < 500 or count > tonumber(ARGV[2])
return count
"""

# What Redis says of a group.
GroupInfo = Mapping[str, int | str]


class GroupMissing(ArchiverError):
    """The stream was not set up; the message says how."""


@dataclass(frozen=True)
class Backlog:
    """How far a group is behind the end of the stream, in entries."""

    waiting: int
    in_progress: int
    set_aside: int
    has_more: bool = False
    """Whether more are waiting than were counted."""
    oldest_at: datetime | None = field(default=None, compare=False)
    """When the oldest entry that the group has not acknowledged was appended; None where there is none."""


def read_backlog(connection: redis.Redis, stream: str, group: str) -> Backlog:
    """How many entries a group has not taken, not finished, and set aside.

    Raises:
        GroupMissing: when nobody set the stream up.
    """
    info = _find_group(connection, stream, group)
    waiting, has_more = _count_behind(connection, stream, info)
    return Backlog(
        waiting=waiting,
        has_more=has_more,
        in_progress=int(info["pending"]),
        set_aside=len(DeadLetters(connection, stream, group)),
        oldest_at=_oldest_behind(connection, stream, info),
    )


def has_work(connection: redis.Redis, stream: str, group: Group) -> bool:
    """Whether there is an entry that a group has not acknowledged.

    Raises:
        GroupMissing: when nobody set the stream up.
    """
    newest = cast(dict[str, str], connection.xinfo_stream(stream))["last-generated-id"]
    info = _find_group(connection, stream, group)
    return bool(info["pending"]) or info["last-delivered-id"] != newest


def last_delivered(connection: redis.Redis, stream: str, group: Group) -> str:
    """The id of the entry that a group took last.

    Raises:
        GroupMissing: when nobody set the stream up.
    """
    return str(_find_group(connection, stream, group)["last-delivered-id"])


def no_such_group(stream: str, group: str) -> GroupMissing:
    """What to raise when the stream lacks a group."""
    return GroupMissing(f"the stream {stream} has no group {group}; run `archiver init`")


def group_names(connection: redis.Redis, stream: str) -> list[str]:
    """Who reads the stream: ours first, then foreign ones by their names."""
    found = {str(info["name"]) for info in cast(list[GroupInfo], connection.xinfo_groups(stream))}
    return [*GROUPS, *sorted(found.difference(GROUPS))]


def _find_group(connection: redis.Redis, stream: str, group: str) -> GroupInfo:
    for info in cast(list[GroupInfo], connection.xinfo_groups(stream)):
        if info["name"] == group:
            return info
    raise no_such_group(stream, group)


def _count_behind(connection: redis.Redis, stream: str, group: GroupInfo) -> tuple[int, bool]:
    """How many entries a group has not taken, and whether there are more."""
    # Redis 7 counts the lag itself, mostly; 6.2 leaves that to us.
    if (lag := group.get("lag")) is not None:
        return int(lag), False
    counted = cast(int, connection.eval(_COUNT_BEHIND, 1, stream, str(group["last-delivered-id"]), str(COUNTED)))
    return min(counted, COUNTED), counted > COUNTED


def _oldest_behind(connection: redis.Redis, stream: str, group: GroupInfo) -> datetime | None:
    pending = cast(dict[str, str | None], connection.xpending(stream, str(group["name"])))["min"]
    after = f"({group['last-delivered-id']}"
    untaken = cast(list[tuple[str, object]], connection.xrange(stream, after, count=1))
    ids = [*([pending] if pending else []), *(id for id, _ in untaken)]
    return datetime.fromtimestamp(min(place_of(id)[0] for id in ids) / 1000, UTC) if ids else None


def remove_unneeded(connection: redis.Redis, stream: str, before: datetime) -> int:
    """Remove the entries from before that time that nobody needs any more; returns how many.

    An entry is needed until every group, also a foreign one, has acknowledged it, and while it is set aside.
    """
    needed = [place_of(f"{int(before.timestamp() * 1000)}-0")]
    for info in cast(list[dict[str, str | int]], connection.xinfo_groups(stream)):
        milliseconds, number = place_of(str(info["last-delivered-id"]))
        needed.append((milliseconds, number + 1))
        if info["pending"]:
            pending = cast(dict[str, str], connection.xpending(stream, str(info["name"])))
            needed.append(place_of(pending["min"]))
    needed += [place_of(letter.entry.id) for group in GROUPS for letter in DeadLetters(connection, stream, group)]
    milliseconds, number = min(needed)
    return connection.xtrim(stream, minid=f"{milliseconds}-{number}", approximate=False)
