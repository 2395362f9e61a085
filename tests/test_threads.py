"""Threads that hang: what others are told, and the work of others, go on beside them."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

from blocks.event_log import EventLog
from blocks.places import Places
from blocks.settings import Settings
from flows.executions import Executions
from flows.neighbours import Neighbours
from flows.worker import InProcessWorker
from tests.working import until

pytest_plugins = ["tests.prefect_server"]


def test_others_are_told_what_is_executed_while_all_threads_hang(event_log: EventLog) -> None:
    executions = Executions(event_log.flow_runs, Places(event_log.redis, "pool"))
    neighbours = Neighbours(event_log.reach, "pool", "one", ["prince"])
    ends = threading.Event()

    async def test() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        hanging = asyncio.ensure_future(asyncio.to_thread(ends.wait))
        telling = asyncio.ensure_future(neighbours.keep_telling())
        run = uuid4()
        try:
            async with asyncio.timeout(10):
                assert await executions.take_place(run, 1)
                await executions.tell([run])
                await until(lambda: event_log.reach.sharing("pool", "another", {"prince"}), "telling the neighbours")
                await executions.give_back(run)
                assert await executions.take_place(uuid4(), 1)
            assert event_log.flow_runs.is_beating(run)
        finally:
            ends.set()
            telling.cancel()
            await asyncio.wait([hanging, telling])

    asyncio.run(test())


def test_a_worker_has_more_threads_than_asyncio_would_give_it(run_settings: Settings) -> None:
    many = threading.Barrier(60)

    async def test() -> None:
        async with InProcessWorker(work_pool_name="upload-worker"):
            await asyncio.gather(*(asyncio.to_thread(many.wait, 20) for _ in range(many.parties)))

    asyncio.run(test())
