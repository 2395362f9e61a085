"""What Redis is asked for beside what the database tells: not to have it costs nobody the rest."""

import logging
from collections.abc import Callable
from typing import TypeVar

from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

# What the warnings are made of.
SYSTEMS = "what was seen of the systems and their disks"
FLIGHTS = "how the last flight check ended"
UPLOADERS = "who uploads"
MEMORY = "how full it is"
AUDITS = "what the last audits left"

T = TypeVar("T")


class RedisAnswers:
    """What Redis answers, or something else once it was found to be away: it is waited for only once."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        """What is not known for that."""

    def ask(self, ask: Callable[[], T], otherwise: T, what: str) -> T:
        """The answer, or something else.

        Args:
            what: is asked, for people.
        """
        if not self.missing:
            try:
                return ask()
            except RedisError as error:
                logger.warning("Redis can't be asked %s: %s", what, error)
        self.missing.append(what)
        return otherwise
