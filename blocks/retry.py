"""Asking again after failures that pass by themselves."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from blocks.object_errors import ObjectStoreError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Transient(Exception):
    """An attempt failed in a way that may pass by itself.

    Attributes:
        pause: seconds the other side asks to wait, if it does.
    """

    def __init__(self, message: str, pause: float = 0) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True)
class Patience:
    """How long to go on. All in seconds."""

    give_up_after: float = 120
    first_pause: float = 0.25
    longest_pause: float = 10

    def retry(self, what: str, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it no longer raises `Transient`.

        The pauses double, and are drawn at random so that many clients don't return at once.

        Raises:
            ObjectStoreError: when patience ends, with the last cause.
        """
        started = time.monotonic()
        ceiling = self.first_pause
        attempts = 0
        while True:
            attempts += 1
            try:
                return attempt()
            except Transient as error:
                pause = max(error.pause, random.uniform(ceiling / 2, ceiling))  # noqa: S311 - spreads load, no secret
                waited = time.monotonic() - started
                if waited + pause > self.give_up_after:
                    raise ObjectStoreError(
                        f"{what}: gave up after {attempts} attempts in {waited:.0f} s; the last one: {error}"
                    ) from error
                log.warning("%s: %s; trying again in %.1f s", what, error, pause)
            time.sleep(pause)
            ceiling = min(2 * ceiling, self.longest_pause)
