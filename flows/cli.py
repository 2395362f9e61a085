"""The `archiver` command."""

# Each command imports what it needs by itself: the four entrypoints start at the same time, and
# Prefect, boto3 and SQLAlchemy take seconds to import on a small machine.

import asyncio
import logging
import os
import signal
import sys
import traceback
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, cast
from uuid import UUID

import typer

from blocks.errors import ArchiverError
from blocks.settings import get_settings
from flows.client import commands

logger = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Moves timesteps to object storage.")

# What a mock microscope drops.
Timesteps = Annotated[int, typer.Option(min=1, help="How many timesteps in all.")]
Images = Annotated[int, typer.Option(min=1, help="Images per timestep.")]
ImageBytes = Annotated[int, typer.Option(min=1, help="Bytes of one image's pixels.")]
Systems = Annotated[str, typer.Option(help="Names of the imaging systems.")]


@app.command()
def init(
    abort_incomplete_days: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Give the bucket a lifecycle rule that aborts every upload, whoever began it, which is not completed "
            "after so many days. Its other rules stay. Without this option no rule is touched.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Change nothing; say what is wrong or missing, and exit with 1 if anything is."),
    ] = False,
) -> None:
    """Migrations, consumer groups, directories, bucket, blocks, work pools, deployments. Repeatable."""
    if check:
        from rich.console import Console

        from flows.check import check_and_report

        sys.exit(check_and_report(get_settings(), Console()))
    from flows.init import initialize

    initialize(get_settings(), abort_incomplete_days)


@app.command()
def event_ingester() -> None:
    """Watch the systems' event files and take their timesteps in."""
    from flows.watch import event_ingester

    _run(event_ingester(get_settings()))


@app.command()
def upload_worker() -> None:
    """Upload the stream's timesteps to object storage."""
    from flows.dispatch import upload_worker

    _run(upload_worker(get_settings()))


@app.command()
def state_manager() -> None:
    """Record the stream's events in the database."""
    from flows.dispatch import state_manager

    _run(state_manager(get_settings()))


@app.command()
def api() -> None:
    """Serve the state over REST and as a web page."""
    import uvicorn

    settings = get_settings()
    # By name, because the flows do not import the API.
    config = uvicorn.Config(
        "api.app:create_app", factory=True, host=settings.api_host, port=settings.api_port, log_config=None
    )
    config.load()
    _log()
    uvicorn.Server(config).run()


@app.command()
def up(
    trial: Annotated[bool, typer.Option(help="Keep objects in memory: they are gone when it stops.")] = False,
) -> None:
    """The whole system on this machine, in the foreground, until Ctrl-C."""
    from flows.stack.up import up as run_until_signal

    asyncio.run(run_until_signal(get_settings(), trial=trial))


@app.command()
def demo(
    timesteps: Timesteps = 4,
    images: Images = 10,
    image_bytes: ImageBytes = 200_000,
    systems: Systems = "prince,aretha",
) -> None:
    """Show on one machine how timesteps travel, end to end; exits with 1 if one does not arrive."""
    from flows.stack.demo import demo as demonstrate
    from flows.stack.mock_microscope import Plan

    sys.exit(asyncio.run(demonstrate(get_settings(), Plan(systems.split(","), timesteps, images, image_bytes))))


@app.command()
def mock_microscope(
    timesteps: Timesteps = 1,
    images: Images = 10,
    image_bytes: ImageBytes = 200_000,
    systems: Systems = "prince,aretha",
    interval: Annotated[float, typer.Option(min=0, help="Seconds between two timesteps.")] = 0.0,
) -> None:
    """Drop timesteps into ARCHIVER_DATA_DIR like a microscope does."""
    from flows.stack.mock_microscope import Plan, drop_timesteps

    settings = get_settings()
    settings.require("data_dir")
    plan = Plan(systems.split(","), timesteps, images, image_bytes)
    for dropped in drop_timesteps(cast(Path, settings.data_dir), plan, interval_seconds=interval):
        typer.echo(f"{dropped.event_file}: {dropped.images} images, {dropped.bytes} bytes")


@app.command()
def verify(
    timesteps: Annotated[list[UUID] | None, typer.Argument(help="Ids of timesteps.", show_default=False)] = None,
    experiment: Annotated[str | None, typer.Option(help="All uploaded timesteps of this experiment.")] = None,
    system: Annotated[str | None, typer.Option(help="All uploaded timesteps of this system.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All uploaded timesteps.")] = False,
) -> None:
    """Read objects back and compare every image with its recorded hash; exits with 1 and a list if one differs."""
    if bool(timesteps) + bool(experiment or system) + everything != 1:
        raise typer.BadParameter("name timesteps by their ids, or by --experiment and --system, or all with --all")
    from rich.console import Console

    from flows.verify import Selection
    from flows.verify import verify as verify_selected

    sys.exit(verify_selected(get_settings(), Selection(timesteps or (), experiment, system), Console(soft_wrap=True)))


@app.command()
def purge(
    system: Annotated[str | None, typer.Option(help="Only this system.")] = None,
    do_it: Annotated[bool, typer.Option("--do-it", help="Delete; otherwise only tell what would go.")] = False,
) -> None:
    """Delete files of timesteps whose retention time is over, where it is proven that nobody needs them."""
    from flows.purge import configured_systems
    from flows.purge import purge as purge_systems

    settings = get_settings()
    systems = asyncio.run(configured_systems(settings, system))
    typer.echo(purge_systems(settings, systems, lambda outcome: typer.echo(str(outcome)), do_it=do_it))


@app.command()
def audit(
    fix: Annotated[bool, typer.Option("--fix", help="Have what is missing go its way again.")] = False,
) -> None:
    """Compare disk, stream, database and bucket; lists every difference, and exits with 1 if one is left."""
    from flows.audit import find, report
    from flows.purge import configured_systems

    settings = get_settings()
    systems = asyncio.run(configured_systems(settings))
    found, fixed = report(find(systems, settings), typer.echo, fix=fix)
    typer.echo(f"{found} differences, {fixed} fixed")
    sys.exit(found > fixed)


@app.command()
def rebuild() -> None:
    """Fill an empty database from the stream, and from the bucket what the stream has forgotten."""
    from flows.rebuild import rebuild as rebuild_database

    for sentence in rebuild_database(get_settings()):
        typer.echo(sentence)


@app.command()
def replay(
    entries: Annotated[
        list[str] | None, typer.Argument(help="Ids of entries of the stream; all that were set aside, if none.")
    ] = None,
    discard: Annotated[bool, typer.Option(help="Forget them for good instead.")] = False,
) -> None:
    """Have what was set aside worked on once more, when what it failed for was mended."""
    from flows.replay import replay as replay_entries

    said = 0
    for sentence in replay_entries(get_settings(), entries or (), discard=discard):
        typer.echo(sentence)
        said += 1
    if not said:
        typer.echo("nothing is set aside")


@app.command()
def backfill(
    failed: Annotated[bool, typer.Option("--failed", help="Timesteps that were given up.")] = False,
    system: Annotated[str | None, typer.Option(help="Only those of this imaging system.")] = None,
) -> None:
    """Upload again what was given up, when what it failed for was mended."""
    from flows.backfill import backfill_failed

    if not failed:
        raise typer.BadParameter("say what to take up again: --failed")
    said = 0
    for timestep in backfill_failed(get_settings(), system):
        typer.echo(f"{timestep.timestep_id} {timestep.title} is taken up again")
        said += 1
    typer.echo(f"{said} timesteps")


for command in (commands.ls, commands.status, commands.fetch):
    app.command()(command)


def _log() -> None:
    """Log as the settings say, now that all that sets logging up is imported."""
    from blocks.logs import log_as_json

    if get_settings().log_format == "json":
        log_as_json()


def _run(entrypoint: Coroutine[None, None, None]) -> None:
    """Run an entrypoint until SIGTERM or SIGINT and end the process, even while a thread is still at work.

    A thread can't be cancelled, and waiting for an upload of gigabytes would outlast any grace
    time. What it does is not acknowledged, so it is done again, by whoever gets its lease.
    """
    from blocks.lease import give_back_all

    _log()
    loop = asyncio.new_event_loop()
    # Threads mostly wait, for disks and servers. A mount that hangs must leave some for the others.
    loop.set_default_executor(ThreadPoolExecutor(64, thread_name_prefix="archiver"))
    task = loop.create_task(entrypoint)

    def stop(number: int, _frame: object) -> None:
        logger.info("%s: stopping", signal.Signals(number).name)
        loop.call_soon_threadsafe(task.cancel)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # Not in the main thread: there, Prefect's flow engine takes SIGTERM for itself while a flow runs.
    with ThreadPoolExecutor(1) as beside:
        error = beside.submit(loop.run_until_complete, task).exception()
    status = 0 if error is None or isinstance(error, asyncio.CancelledError) else _report(error)
    give_back_all()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _report(error: BaseException) -> int:
    """Say what happened, for an operator if it is for one to mend; returns the exit code."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, ArchiverError):
        typer.secho(f"archiver: {error}", err=True, fg="red")
        return 2
    traceback.print_exception(error)
    return 1


def main() -> None:
    """Run the command; what the operator has to do something about is printed as a sentence."""
    # Prefect has set the root logger up when it was imported; ours say more.
    for package in ("flows", "blocks", "api"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        app()
    except ArchiverError as error:
        sys.exit(_report(error))


if __name__ == "__main__":
    main()
