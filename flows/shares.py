"""Whether a share answers: one that hangs must not keep the places of a worker, which all systems share.

A thread that waits for such a share can't be ended. So each share is asked by one thread at a time, and whoever
works on it stops waiting when it does not answer.
"""

import asyncio
import os
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import TypeVar

from blocks.image_directory import SystemAway

# How long a share may take for an answer: before work on it begins, and meanwhile, when it may be busy (seconds).
ANSWER_SECONDS = 10.0
BUSY_SECONDS = 60.0
# How often it is asked while work on it goes on (seconds).
ASK_SECONDS = 15.0
# One that has not answered for long enough is given this long again (seconds): it may do so just now.
AGAIN_SECONDS = 0.05

T = TypeVar("T")


@dataclass(frozen=True)
class _Question:
    """What a share was asked, and when."""

    answer: Future[None] = field(default_factory=Future)
    at: float = field(default_factory=time.monotonic)


_unanswered: dict[Path, _Question] = {}
_lock = Lock()


async def check_answers(directory: Path, seconds: float | None = None) -> None:
    """Ask the file system of a directory something that no cache answers. Also an error is an answer.

    Raises:
        SystemAway: when it has not answered within so many seconds since it was asked, by whomever.
    """
    seconds = ANSWER_SECONDS if seconds is None else seconds
    question = _ask(directory)
    left = max(AGAIN_SECONDS, question.at + seconds - time.monotonic())
    _, waiting = await asyncio.wait([asyncio.wrap_future(question.answer)], timeout=left)
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


def _ask(directory: Path) -> _Question:
    with _lock:
        if directory in _unanswered:
            return _unanswered[directory]
        question = _unanswered[directory] = _Question()
    Thread(target=_wait_for, args=(directory, question), name=f"asks {directory}", daemon=True).start()
    return question


def _wait_for(directory: Path, question: _Question) -> None:
    with suppress(OSError):
        os.statvfs(directory)
    with _lock:
        del _unanswered[directory]
    question.answer.set_result(None)
