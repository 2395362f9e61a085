"""The work queues of a pool: one for each imaging system, polled where that is reached, beside the pool's own."""

from blocks.reach import queue_of
from blocks.settings import Settings

# The pool's own, of what concerns no system. Every worker polls it.
DEFAULT = "default"


def polled_queues(settings: Settings) -> list[str]:
    """The queues that a worker of this host polls; none named means all there are."""
    return [DEFAULT, *map(queue_of, settings.systems)] if settings.systems else []
