"""How far a reader of the stream is behind its end, and what of the stream nobody needs any more."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

import redis

from blocks.dead_letters import DeadLetters
from blocks.entry import GROUPS

# Counted where the entries are: many of them are large.
_COUNT_BEHIND = """
local count, last = 0, ARGV[1]
repeat
    local page = redis.call('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', 500)
    count = count + #page
    if #page > 0 then last = page[#page][1] end
until #page < 500
return count
"""

# What Redis says of a group.
GroupInfo = Mapping[str, int | str]


@dataclass(frozen=True)
class Backlog:
    """How far a group is behind the end of the stream, in entries."""

    waiting: int
    in_progress: int
    set_aside: int


def count_behind(connection: redis.Redis, stream: str, group: GroupInfo) -> int:
    """How many entries a group has not taken."""
    # Redis 7 counts the lag itself, mostly; 6.2 leaves that to us.
    lag = group.get("lag")
    if lag is None:
        lag = cast(int, connection.eval(_COUNT_BEHIND, 1, stream, str(group["last-delivered-id"])))
    return int(lag)


def oldest_behind(connection: redis.Redis, stream: str, group: GroupInfo) -> datetime | None:
    """When the oldest entry that a group has not acknowledged was appended; None where there is none."""
    pending = cast(dict[str, str | None], connection.xpending(stream, str(group["name"])))["min"]
    after = f"({group['last-delivered-id']}"
    untaken = cast(list[tuple[str, object]], connection.xrange(stream, after, count=1))
    ids = [*([pending] if pending else []), *(id for id, _ in untaken)]
    return datetime.fromtimestamp(min(_place(id)[0] for id in ids) / 1000, UTC) if ids else None


def remove_unneeded(connection: redis.Redis, stream: str, before: datetime) -> int:
    """Remove the entries from before that time that nobody needs any more; returns how many.

    An entry is needed until every group, also a foreign one, has acknowledged it, and while it is set aside.
    """
    needed = [_place(f"{int(before.timestamp() * 1000)}-0")]
    for info in cast(list[dict[str, str | int]], connection.xinfo_groups(stream)):
        milliseconds, number = _place(str(info["last-delivered-id"]))
        needed.append((milliseconds, number + 1))
        if info["pending"]:
            pending = cast(dict[str, str], connection.xpending(stream, str(info["name"])))
            needed.append(_place(pending["min"]))
    needed += [_place(letter.entry.id) for group in GROUPS for letter in DeadLetters(connection, stream, group)]
    milliseconds, number = min(needed)
    return connection.xtrim(stream, minid=f"{milliseconds}-{number}", approximate=False)


def _place(id: str) -> tuple[int, int]:
    milliseconds, _, number = id.partition("-")
    return int(milliseconds), int(number)
