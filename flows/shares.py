"""Whether a share answers: one that hangs must not keep the places of a worker, which all systems share.

A thread that waits for such a share can't be ended. So each share is asked by one thread at a time, and whoever
works on it stops waiting when it does not answer.
"""

import asyncio
import os
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from typing import TypeVar

from blocks.image_directory import SystemAway

# How long a share may take for an answer: before work on it begins, and meanwhile, when it may be busy (seconds).
ANSWER_SECONDS = 10.0
BUSY_SECONDS = 60.0
# How often it is asked while work on it goes on (seconds).
ASK_SECONDS = 15.0

T = TypeVar("T")

_unanswered: dict[Path, Future[None]] = {}
_lock = Lock()


async def check_answers(directory: Path, seconds: float | None = None) -> None:
    """Ask the file system of a directory something that no cache answers. Also an error is an answer.

    Raises:
        SystemAway: when it has not answered within so many seconds.
    """
    seconds = ANSWER_SECONDS if seconds is None else seconds
    _, waiting = await asyncio.wait([asyncio.wrap_future(_ask(directory))], timeout=seconds)
    if waiting:
        raise SystemAway(f"{directory} has not answered for {seconds:g} s: does its share hang?")


async def while_it_answers(work: "asyncio.Future[T]", directory: Path) -> T:
    """The result of work on a directory, unless its file system stops to answer.

    Raises:
        SystemAway: when it did. The work is left to itself.
    """
    while not (await asyncio.wait([work], timeout=ASK_SECONDS))[0]:
        await check_answers(directory, BUSY_SECONDS)
    return work.result()


def _ask(directory: Path) -> Future[None]:
    with _lock:
        if directory in _unanswered:
            return _unanswered[directory]
        answer = _unanswered[directory] = Future()
    Thread(target=_wait_for, args=(directory, answer), name=f"asks {directory}", daemon=True).start()
    return answer


def _wait_for(directory: Path, answer: Future[None]) -> None:
    with suppress(OSError):
        os.statvfs(directory)
    with _lock:
        del _unanswered[directory]
    answer.set_result(None)
