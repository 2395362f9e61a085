"""A lease in Redis: of several processes, one at a time may work on something."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import redis

log = logging.getLogger(__name__)

# What this process holds, for `give_back_all`.
_held: "set[Lease]" = set()

# Only the holder may prolong or give back: the value tells who holds it.
_PROLONG = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
_GIVE_BACK = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class LeaseTaken(Exception):
    """Another process holds the lease; the message says for how long at most."""


class LeaseLost(Exception):
    """This process may no longer be the only one: the lease could not be prolonged in time."""


class Lease:
    """A lease this process holds, prolonged in the background. Use `hold` to get one."""

    def __init__(self, client: redis.Redis, name: str, seconds: float, wanted: Callable[[], bool]) -> None:
        self.name = name
        self._redis = client
        self._seconds = seconds
        self._wanted = wanted
        self._holder = uuid4().hex
        self._valid_until = 0.0
        self._ended = threading.Event()

    def check(self) -> None:
        """Make sure that the lease is still held; to be called before everything that only its holder may do.

        Raises:
            LeaseLost: if it ran out, can't be known to hold, or was given back.
        """
        if self._ended.is_set():
            raise LeaseLost(f"the lease {self.name} was given back, because this process ends")
        if time.monotonic() >= self._valid_until:
            raise LeaseLost(f"the lease {self.name} could not be prolonged; another process may have it")

    def _take(self) -> None:
        asked = time.monotonic()
        if not self._redis.set(self.name, self._holder, nx=True, px=self._milliseconds):
            left = max(int(self._redis.pttl(self.name)), 0) / 1000
            raise LeaseTaken(f"the lease {self.name} is held by another process, for up to {left:.0f} s")
        # Counted from before the question: Redis can't see it end sooner than we do.
        self._valid_until = asked + self._seconds

    def _prolong(self) -> None:
        while not self._ended.wait(self._seconds / 3) and self._wanted():
            asked = time.monotonic()
            try:
                if not self._redis.eval(_PROLONG, 1, self.name, self._holder, str(self._milliseconds)):
                    self._valid_until = 0
                    return
                self._valid_until = asked + self._seconds
            except redis.RedisError as error:
                log.warning("lease %s can't be prolonged: %s", self.name, error)

    def _give_back(self) -> None:
        # In this order: whoever asks from now on is told no, before others are told yes.
        self._ended.set()
        try:
            self._redis.eval(_GIVE_BACK, 1, self.name, self._holder)
        except redis.RedisError as error:
            log.warning("lease %s can't be given back and will run out: %s", self.name, error)

    @property
    def _milliseconds(self) -> int:
        return int(self._seconds * 1000)


@contextmanager
def hold(
    client: redis.Redis, name: str, seconds: float = 30, wanted: Callable[[], bool] = lambda: True
) -> Iterator[Lease]:
    """Hold the lease `name` for the time of the block.

    Args:
        seconds: after which others get it when this process dies.
        wanted: whether the block's work still is. If not, the lease is left to run out: its thread may hang.

    Raises:
        LeaseTaken: if another process holds it.
    """
    lease = Lease(client, name, seconds, wanted)
    lease._take()
    keeper = threading.Thread(target=lease._prolong, name=f"lease {name}", daemon=True)
    keeper.start()
    _held.add(lease)
    try:
        yield lease
    finally:
        lease._ended.set()
        keeper.join()
        lease._give_back()
        _held.discard(lease)


def give_back_all(seconds: float = 2) -> None:
    """Give back what this process holds, so that others need not wait until its leases run out.

    For a process that is about to end while threads of it are at work: their next `check` fails. What
    is on its way at this moment may still arrive, as it may after a crash.

    Args:
        seconds: after which Redis is not waited for any longer.
    """

    def give_back() -> None:
        for lease in list(_held):
            lease._give_back()

    giver = threading.Thread(target=give_back, name="giving back leases", daemon=True)
    giver.start()
    giver.join(seconds)
