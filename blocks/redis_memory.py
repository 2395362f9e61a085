"""How full Redis is. It holds the log in memory: a Redis that is full refuses to be told more, and everything waits."""

from dataclasses import dataclass
from typing import Self

import redis

# Of what it may have; above that, somebody has to make room.
_FULL = 0.8


@dataclass(frozen=True)
class RedisMemory:
    """What Redis holds, and may hold, in bytes."""

    used: int
    limit: int | None
    """None where it has no limit of its own."""
    policy: str
    """What it does when it is full; all but `noeviction` drops what others rely on."""

    @classmethod
    def of(cls, connection: redis.Redis) -> Self:
        """Ask Redis."""
        said = connection.info("memory")
        return cls(said["used_memory"], said.get("maxmemory") or None, said.get("maxmemory_policy", "noeviction"))

    def warning(self) -> str | None:
        """What to do about it, for a person; None while there is room."""
        if not self.limit or self.used <= _FULL * self.limit:
            return None
        return f"Redis is {self.used / self.limit:.0%} full: shorten ARCHIVER_STREAM_DAYS, or raise its maxmemory"
