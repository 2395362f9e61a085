"""The commands that run one entrypoint each, as a process that ends when it is told to."""

# Each imports what it needs by itself: all four start at the same time, and Prefect, boto3 and SQLAlchemy take
# seconds to import on a small machine.

import asyncio
import logging
import os
import signal
import sys
import traceback
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor

import typer

from blocks.errors import ArchiverError
from blocks.settings import get_settings
from flows.threads import use_many_threads

logger = logging.getLogger(__name__)


def event_ingester() -> None:
    """Watch the systems' event files and take their timesteps in."""
    from flows.watch import event_ingester

    run(event_ingester(get_settings()))


def upload_worker() -> None:
    """Upload the stream's timesteps to object storage."""
    from flows.dispatch import upload_worker

    run(upload_worker(get_settings()))


def state_manager() -> None:
    """Record the stream's events in the database."""
    from flows.recording import state_manager

    run(state_manager(get_settings()))


def api() -> None:
    """Serve the state over REST and as a web page."""
    import uvicorn

    settings = get_settings()
    # By name, because the flows do not import the API.
    config = uvicorn.Config(
        "api.app:create_app", factory=True, host=settings.api_host, port=settings.api_port, log_config=None
    )
    config.load()
    log()
    uvicorn.Server(config).run()


def log() -> None:
    """Log as the settings say, now that all that sets logging up is imported."""
    from blocks.logs import log_as_json

    if get_settings().log_format == "json":
        log_as_json()


def run(entrypoint: Coroutine[None, None, None]) -> None:
    """Run an entrypoint until SIGTERM or SIGINT and end the process, even while a thread is still at work.

    A thread can't be cancelled, and waiting for an upload of gigabytes would outlast any grace
    time. What it does is not acknowledged, so it is done again, by whoever gets its lease.
    """
    from blocks.lease import give_back_all

    log()
    loop = asyncio.new_event_loop()
    use_many_threads(loop)
    task = loop.create_task(entrypoint)

    def stop(number: int, _frame: object) -> None:
        logger.info("%s: stopping", signal.Signals(number).name)
        loop.call_soon_threadsafe(task.cancel)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # Not in the main thread: there, Prefect's flow engine takes SIGTERM for itself while a flow runs.
    with ThreadPoolExecutor(1) as beside:
        error = beside.submit(loop.run_until_complete, task).exception()
    status = 0 if error is None or isinstance(error, asyncio.CancelledError) else report(error)
    give_back_all()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def report(error: BaseException) -> int:
    """Say what happened, for an operator if it is for one to mend; returns the exit code."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, ArchiverError):
        typer.secho(f"archiver: {error}", err=True, fg="red")
        return 2
    traceback.print_exception(error)
    return 1
