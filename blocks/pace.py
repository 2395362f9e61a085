"""A limit on the bytes per second that this process sends."""

import threading
import time
from functools import cache


class Pace:
    """Spreads what is sent over time, so that no second carries more than the limit."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def wait_for(self, size: int) -> None:
        """Wait until `size` more bytes may be sent."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + size / self._rate
        time.sleep(start - now)


@cache
def shared_pace(bytes_per_second: int) -> Pace:
    """The one pace of this process for a limit: several uploads at once share it."""
    return Pace(bytes_per_second)
