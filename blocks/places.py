"""The places of a work pool: how many runs may execute at once, over all processes on all hosts."""

from collections.abc import Iterable
from uuid import UUID

import redis

# How long a place stays taken when its holder says nothing any more (seconds).
HOLD_SECONDS = 45.0

# By Redis' clock, because the holders' may differ.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local limit = tonumber(ARGV[3])
if limit >= 0 and not redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('ZCARD', KEYS[1]) >= limit then return 0 end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
return 1
"""
_KEEP = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now + tonumber(ARGV[1]), ARGV[i]) end
"""


class Places:
    """Who holds a place of one work pool. Every method asks Redis, and blocks while it does."""

    def __init__(self, client: redis.Redis, pool: str) -> None:
        self._redis = client
        self._key = f"places:{pool}"

    def take(self, holder: UUID, limit: int | None) -> bool:
        """Take a place for `holder`, unless `limit` others hold one; none means no limit."""
        arguments = (str(holder), str(int(HOLD_SECONDS * 1000)), str(-1 if limit is None else limit))
        return bool(self._redis.eval(_TAKE, 1, self._key, *arguments))

    def keep(self, holders: Iterable[UUID]) -> None:
        """Say that these still need their places; also one that had run out meanwhile is held again."""
        if names := [str(holder) for holder in holders]:
            self._redis.eval(_KEEP, 1, self._key, str(int(HOLD_SECONDS * 1000)), *names)

    def give_back(self, holder: UUID) -> None:
        """Free the place, if `holder` has one."""
        self._redis.zrem(self._key, str(holder))

    def taken(self) -> int:
        """How many places are held now, or were until lately."""
        return self._redis.zcard(self._key)
