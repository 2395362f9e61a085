"""What consumers of the stream hold that nobody hears of any more."""

from typing import cast

import redis

from blocks.entry import Entry, Group


def take_from_absent(
    connection: redis.Redis, stream: str, group: Group, consumer: str, absent_seconds: float, count: int
) -> list[Entry]:
    """Take what other consumers of a group hold that have not asked for anything for so long, up to `count` of each."""
    milliseconds = int(absent_seconds * 1000)
    taken: list[Entry] = []
    for other in cast(list[dict[str, int | str]], connection.xinfo_consumers(stream, group)):
        if other["name"] == consumer or not other["pending"] or int(other["idle"]) < milliseconds:
            continue
        name = cast(str, other["name"])
        pending = connection.xpending_range(stream, group, "-", "+", count, name, idle=milliseconds)
        ids = [entry["message_id"] for entry in cast(list[dict[str, str]], pending)]
        if ids:
            answer = connection.xclaim(stream, group, consumer, milliseconds, ids)  # type: ignore[arg-type]
            # An entry that was removed from the stream comes without its fields.
            claimed = cast(list[tuple[str | None, dict[str, str] | None]], answer)
            taken += [Entry(id, fields) for id, fields in claimed if id and fields]
    return taken
