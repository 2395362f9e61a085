"""Which systems the living workers of a work pool reach. It lives beside the log, in the same Redis."""

import json
import re
from collections.abc import Iterable
from typing import cast

import redis

# A worker that has said nothing for this long (seconds) is gone.
GONE_SECONDS = 60.0


# What uploads.
UPLOAD_POOL = "upload-worker"


def queue_of(system: str) -> str:
    """The work queue of a system's runs."""
    # Prefect takes no name with one of these.
    return re.sub(r"[/%&<>]", "_", system)


class Reach:
    """Told by each worker again and again. Every method asks Redis, and blocks while it does."""

    def __init__(self, connection: redis.Redis, stream: str) -> None:
        self._redis = connection
        self._stream = stream

    def tell(self, pool: str, worker: str, queues: Iterable[str]) -> None:
        """Say that a worker is there, and which queues of its pool it polls; none named means all."""
        said = json.dumps({"at": self._now(), "queues": sorted(queues)})
        self._redis.hset(self._key(pool), worker, said)

    def unreached(self, pool: str, queues: Iterable[str]) -> set[str]:
        """Those of the queues that no living worker polls."""
        left = set(queues)
        for polled in self._polled(pool).values():
            if not polled:
                return set()
            left -= polled
        return left

    def sharing(self, pool: str, worker: str, queues: Iterable[str]) -> int:
        """How many other living workers poll one of these queues too, of which none named means all."""
        mine = set(queues)
        others = [polled for name, polled in self._polled(pool).items() if name != worker]
        return sum(not mine or not polled or not mine.isdisjoint(polled) for polled in others)

    def not_uploading(self, systems: Iterable[str]) -> set[str]:
        """Those of the systems that no living upload-worker reaches."""
        queues = {system: queue_of(system) for system in systems}
        unreached = self.unreached(UPLOAD_POOL, queues.values())
        return {system for system, queue in queues.items() if queue in unreached}

    def _polled(self, pool: str) -> dict[str, set[str]]:
        """The living workers of a pool, with what they poll."""
        since = self._now() - GONE_SECONDS
        polled: dict[str, set[str]] = {}
        for worker, text in cast(dict[str, str], self._redis.hgetall(self._key(pool))).items():
            said = json.loads(text)
            if said["at"] < since:
                self._redis.hdel(self._key(pool), worker)
            else:
                polled[worker] = set(said["queues"])
        return polled

    def _now(self) -> float:
        # By Redis' clock, because the workers' may differ.
        seconds, microseconds = self._redis.time()
        return seconds + microseconds / 1e6

    def _key(self, pool: str) -> str:
        return f"{self._stream}:reach:{pool}"
