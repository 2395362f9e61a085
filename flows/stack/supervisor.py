"""Keeps services running: start in stages, restart what dies, stop in the reverse order."""

import asyncio
import logging
from pathlib import Path
from types import TracebackType
from typing import Self

from flows.stack.service import Service, ServiceProcess, StartError

logger = logging.getLogger(__name__)

FIRST_RESTART = 0.5  # seconds; doubled at every restart of a service that does not stay up
LAST_RESTART = 30.0
STAYS_UP = 60.0  # seconds a service must have run for its next restart to be quick again
LOG_CHECK = 30.0


class Supervisor:
    """Runs services, each with its log in `log_dir`, until it is left as a context manager.

    Services started by one call of `start` are a stage: they start together and stop together,
    after the stages that were started later. Use it from one thread, and not from one that ends
    earlier: its services end with the thread.
    """

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self._stages: list[list[ServiceProcess]] = []
        self._keepers: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._trimming = asyncio.create_task(self._trim_logs())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._trimming.cancel()
        await self.stop()

    @property
    def pids(self) -> dict[str, int | None]:
        """The process id of every service, None while it is not running."""
        return {process.service.name: process.pid for process in self._processes()}

    async def start(self, *services: Service) -> None:
        """Start services together and return when all are ready; from then on they are kept running.

        Raises:
            StartError: one ended or was not ready in time. The rest of the stage may run already: `stop` ends it.
        """
        stage = [self._process(service) for service in services]
        self._stages.append(stage)
        try:
            async with asyncio.TaskGroup() as group:
                for process in stage:
                    group.create_task(process.start())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        for process in stage:
            logger.info("%s runs", process.service.name)
            self._keepers[process.service.name] = asyncio.create_task(self._keep(process))

    async def run(self, service: Service) -> None:
        """Run a service to its end, for at most its `ready_timeout`.

        Raises:
            StartError: it failed, or did not end in time.
        """
        process = self._process(service)
        try:
            await process.run()
            logger.info("%s is done", service.name)
        finally:
            await process.stop()

    async def stop(self, *names: str) -> None:
        """Stop the named services, or all: the latest stage first, the services of a stage together."""
        for stage in reversed(self._stages):
            stopping = [process for process in stage if not names or process.service.name in names]
            await asyncio.gather(*(self._stop(process) for process in stopping))
            stage[:] = [process for process in stage if process not in stopping]
        self._stages = [stage for stage in self._stages if stage]

    async def _stop(self, process: ServiceProcess) -> None:
        if keeper := self._keepers.pop(process.service.name, None):
            keeper.cancel()
            await asyncio.wait([keeper])
        await process.stop()

    async def _keep(self, process: ServiceProcess) -> None:
        """Start the service again whenever it ends."""
        name = process.service.name
        clock = asyncio.get_running_loop().time
        pause, since = FIRST_RESTART, clock()
        while True:
            how = await process.ended()
            if clock() - since > STAYS_UP:
                pause = FIRST_RESTART
            logger.error("%s ended (%s); starting it again in %g s. Its log: %s", name, how, pause, process.log)
            await asyncio.sleep(pause)
            pause, since = min(2 * pause, LAST_RESTART), clock()
            try:
                await process.start()
            except StartError as error:
                logger.warning("%s", error)
            except Exception:
                # Whatever it was: giving up would leave the system without this part, and nobody told.
                logger.exception("%s could not be started", name)
            else:
                logger.info("%s runs again", name)

    async def _trim_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_CHECK)
            for process in self._processes():
                try:
                    process.trim_log()
                except OSError as error:
                    logger.warning("the log of %s could not be shortened: %s", process.service.name, error)

    def _process(self, service: Service) -> ServiceProcess:
        return ServiceProcess(service, self.log_dir / f"{service.name}.log")

    def _processes(self) -> list[ServiceProcess]:
        return [process for stage in self._stages for process in stage]
