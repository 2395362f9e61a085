"""Waiting and working for a bounded time, after which a sentence says what to look at."""

import asyncio
import errno
import time
from collections.abc import Callable
from typing import TypeVar

from redis.exceptions import RedisError
from sqlalchemy.exc import OperationalError

from blocks.lease import LeaseTaken
from blocks.object_errors import ObjectStoreError
from blocks.synthetic_timestep import SYSTEM

# Between two looks (seconds).
LOOK_SECONDS = 0.3
# What one piece of work may take (seconds): longer than the lease of an upload whose process was killed.
WORK_SECONDS = 120.0

_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)

T = TypeVar("T")


class Broken(Exception):
    """The way is not open; the message says up to where it is, and what to look at."""


class NotPossible(Exception):
    """Nothing can be sent from here; the message says what to do."""


async def until(look: Callable[[], T | None], seconds: float, sentence: str) -> T:
    """Look again and again, until there is something; also while what is asked is away.

    Raises:
        Broken: with this sentence, when there was nothing in so many seconds.
    """
    away = ""
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    if found := await asyncio.to_thread(look):
                        return found
                    away = ""
                except (RedisError, OperationalError) as error:
                    away = f". In the end, it could not be asked: {type(error).__name__}: {error}"
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        raise Broken(sentence + away) from None


async def work(task: Callable[..., object], *arguments: object) -> None:
    """Do something on disk or in the bucket, as soon as no upload holds the lease for it.

    Raises:
        NotPossible: when this user may not write there.
        Broken: when it can't be done, or takes too long. A thread that hangs is left to itself.
    """
    end = time.monotonic() + WORK_SECONDS
    while True:
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                await asyncio.to_thread(task, *arguments)
                return
        except LeaseTaken as error:
            if time.monotonic() > end - 1:
                raise Broken(f"what was sent can't be removed: {error}") from error
        except TimeoutError as error:
            name = task.__name__.replace("_", " ")
            raise Broken(f"{name} took more than {WORK_SECONDS:g} s: does the share hang?") from error
        except OSError as error:
            if error.errno in _NOT_ALLOWED:
                raise NotPossible(
                    f"{error.filename} can't be written ({error.strerror}): let the event-ingester write to the "
                    f"directory {SYSTEM} below ARCHIVER_DATA_DIR, or pause the schedule of this deployment"
                ) from error
            raise Broken(f"{error.filename}: {error.strerror}; is the disk there, and not full?") from error
        except ObjectStoreError as error:
            raise Broken(f"the object storage: {error}") from error
        await asyncio.sleep(LOOK_SECONDS)
