"""How events get into the stream: each once, however often it is said."""

from collections.abc import Sequence
from typing import cast

import redis

from blocks.messages import LogEvent

# How long an event's id is remembered so that it is not appended twice. Readers ignore a second
# one anyway, so this only keeps the log short.
_REMEMBER_SECONDS = 30 * 24 * 3600

# So many per round trip.
_AT_ONCE = 500

# One that was trimmed is appended anew: a database may have been restored that lacks it.
_APPEND_ONCE = """
local known = redis.call('GET', KEYS[2])
if known and #redis.call('XRANGE', KEYS[1], known, known) > 0 then return known end
local id = redis.call('XADD', KEYS[1], '*', 'event', ARGV[1], 'type', ARGV[2], 'timestep_id', ARGV[3])
redis.call('SET', KEYS[2], id, 'EX', ARGV[4])
return id
"""


def append_once(connection: redis.Redis, stream: str, events: Sequence[LogEvent]) -> list[str]:
    """Append events in this order; those that are there already stay as they are.

    Where Redis goes away meanwhile, some may be there: doing it again appends the others.

    Returns:
        The ids of their entries.
    """
    ids: list[str] = []
    for start in range(0, len(events), _AT_ONCE):
        with connection.pipeline(transaction=False) as pipeline:
            for event in events[start : start + _AT_ONCE]:
                keys = (stream, f"{stream}:appended:{event.id}")
                content = (event.model_dump_json(), event.type, event.subject or "")
                pipeline.eval(_APPEND_ONCE, len(keys), *keys, *content, str(_REMEMBER_SECONDS))
            ids += cast(list[str], pipeline.execute())
    return ids
