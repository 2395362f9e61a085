"""A process that is killed at its n-th step: from then on, nothing it does has any effect."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from blocks.event_log import EventLog
from blocks.s3_wire import S3Wire

_STEPS: tuple[tuple[Any, str], ...] = (
    (redis.Redis, "execute_command"),
    (redis.client.Pipeline, "execute"),
    (S3Wire, "call"),
    (S3Wire, "request"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "mkdir"),
    (os, "rename"),
    (Path, "write_bytes"),
)


class Killed(BaseException):
    """In place of SIGKILL: nothing that runs while it is raised has any effect either."""


class Mortal:
    """Counts what this thread does to Redis, the bucket and the disk, and ends it at one of these steps."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        self._last: int | None = None
        self._thread = threading.get_ident()
        for target, name in _STEPS:
            patch.setattr(target, name, self._counted(getattr(target, name)))

    @contextmanager
    def killed_at(self, step: int | None) -> Iterator[None]:
        """Work that is killed before its step of this number, if it has so many."""
        self.steps, self._last = 0, step
        try:
            yield
        except Killed:
            assert step is not None
        finally:
            self._last = None

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            if threading.get_ident() == self._thread:
                self.steps += 1
                if self._last is not None and self.steps >= self._last:
                    raise Killed
            return original(*arguments, **named)

        return step


def let_leases_run_out(log: EventLog) -> None:
    """As their time does."""
    if leases := log.redis.keys("*:lease:*"):
        log.redis.delete(*leases)
