"""Whether a share answers: one that hangs must not keep the places of a worker, which all systems share.

A thread that waits for such a share can't be ended. So each share is asked by one thread at a time, and whoever
works on it stops waiting when it does not answer.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import TypeVar

import anyio

from blocks.image_directory import SystemAway
from blocks.mounts import mount_id

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


# By the mount as well: of one that was replaced, no answer may ever come.
_unanswered: dict[tuple[Path, int | None], _Question] = {}
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


async def while_it_answers(work: "asyncio.Future[T]", *directories: Path) -> T:
    """The result of work on directories, unless the file system of one stops to answer.

    Raises:
        SystemAway: when it did. The work is left to itself.
    """
    while not (await asyncio.wait([work], timeout=ASK_SECONDS))[0]:
        for directory in directories:
            await check_answers(directory, BUSY_SECONDS)
    return work.result()


@asynccontextmanager
async def answering(directory: Path) -> AsyncIterator[None]:
    """Do what follows as long as the file system of a directory answers. A thread of it is left to itself otherwise.

    Raises:
        SystemAway: when it does not, also before it begins.
    """
    await check_answers(directory)
    away: list[SystemAway] = []

    async def watch(scope: anyio.CancelScope) -> None:
        while not away:
            await asyncio.sleep(ASK_SECONDS)
            try:
                await check_answers(directory, BUSY_SECONDS)
            except SystemAway as error:
                away.append(error)
                scope.cancel()

    with anyio.CancelScope() as scope:
        watching = asyncio.create_task(watch(scope))
        try:
            yield
        finally:
            watching.cancel()
    if scope.cancelled_caught:
        raise away[0]


def _ask(directory: Path) -> _Question:
    asked = directory, mount_id(directory)
    with _lock:
        if asked in _unanswered:
            return _unanswered[asked]
        question = _unanswered[asked] = _Question()
    Thread(target=_wait_for, args=(asked, question), name=f"asks {directory}", daemon=True).start()
    return question


def _wait_for(asked: tuple[Path, int | None], question: _Question) -> None:
    with suppress(OSError):
        os.statvfs(asked[0])
    with _lock:
        del _unanswered[asked]
    question.answer.set_result(None)
