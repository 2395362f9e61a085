"""Finds the systems, and has each of them watched."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import cast

from blocks.discovery import candidates, is_system
from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.settings import Settings
from flows import system_watch
from flows.entrypoint import entrypoint
from flows.queues import polled_queues
from flows.runs import Runs
from flows.system_watch import Configured, SystemWatch

logger = logging.getLogger(__name__)


class Watcher:
    """Watches every system below a root that this host reaches, also one that comes later."""

    def __init__(
        self,
        root: Path,
        log: EventLog,
        runs: Runs,
        configured: Configured = ImagingSystem.configured,
        reaches: Callable[[str], bool] = lambda _system: True,
    ) -> None:
        self._root = root
        self._reaches = reaches
        self._log = log
        self._runs = runs
        self._configured = configured

        self._attended: set[str] = set()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    found = await asyncio.to_thread(candidates, self._root)
                except OSError as error:
                    logger.warning("No system is looked for: %s can't be read: %s", self._root, error)
                    found = []
                for name in found:
                    if name not in self._attended and self._reaches(name):
                        self._attended.add(name)
                        group.create_task(self._attend(name))
                await asyncio.sleep(system_watch.RESCAN_SECONDS)

    async def _attend(self, name: str) -> None:
        """Watch what has this name, if it is a system; else it is looked at again. One that hangs keeps no other."""
        if await asyncio.to_thread(is_system, self._root / name):
            await SystemWatch(name, self._root, self._log, self._runs, self._configured).run()
        self._attended.discard(name)


async def event_ingester(settings: Settings) -> None:
    """The entrypoint: watch event files, and execute the runs they get, until a signal."""
    settings.require("data_dir")
    async with entrypoint("event-ingester", settings, polled_queues(settings)) as this:
        runs = this.runs("ingest-timestep/event-ingester")
        watcher = Watcher(cast(Path, settings.data_dir), this.log, runs, reaches=settings.reaches)
        await this.serve(watcher.run, runs.keep_known)
