"""The threads of a process. They mostly wait, for disks and servers; one that waits for a share that hangs stays."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar
from weakref import WeakSet

# There are more than the places of a pool, whose runs may all wait so.
THREADS = 200
# For what must go on whatever the others wait for. These wait for Redis only, which answers, or fails in time.
KEPT_FREE = 16

P = ParamSpec("P")
T = TypeVar("T")

_kept_free = ThreadPoolExecutor(KEPT_FREE, thread_name_prefix="kept free")
_prepared: "WeakSet[asyncio.AbstractEventLoop]" = WeakSet()


def use_many_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Have `asyncio.to_thread` use so many; with its own few, some that hang would keep all others waiting."""
    if loop not in _prepared:
        _prepared.add(loop)
        loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="archiver"))


async def to_free_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `asyncio.to_thread`, in a thread that nothing else can keep."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_kept_free, lambda: context.run(function, *args, **kwargs))
