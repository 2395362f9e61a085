"""The other workers of a pool that poll the same queues: they share its places."""

import asyncio
import logging
from collections.abc import Iterable

from redis.exceptions import RedisError

from blocks.reach import Reach
from flows.executions import BEAT_SECONDS
from flows.queues import DEFAULT
from flows.threads import to_free_thread

logger = logging.getLogger(__name__)


class Neighbours:
    """How many there are, as Redis was told."""

    def __init__(self, reach: Reach, pool: str, worker: str, queues: Iterable[str]) -> None:
        self.count = 0
        self._reach = reach
        self._pool = pool
        self._worker = worker
        self._queues = frozenset(queues)

    async def keep_telling(self) -> None:
        """Tell them of this worker, and learn of them, until cancelled."""
        while True:
            try:
                await to_free_thread(self._tell)
            except RedisError as error:
                logger.warning("Nobody can be told which queues are polled: %s: %s", type(error).__name__, error)
            await asyncio.sleep(BEAT_SECONDS)

    def _tell(self) -> None:
        self._reach.tell(self._pool, self._worker, self._queues)
        # Every worker polls the pool's own queue.
        self.count = self._reach.sharing(self._pool, self._worker, self._queues - {DEFAULT})
