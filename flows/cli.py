"""The `archiver` command."""

# Each command imports what it needs by itself, because that takes seconds on a small machine.

import asyncio
import logging
import sys
from typing import Annotated, Literal
from uuid import UUID

import typer

from blocks.errors import ArchiverError
from blocks.settings import get_settings
from flows import process
from flows.client import commands as client
from flows.stack import commands as stack

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Moves timesteps to object storage.")

_ENTRYPOINTS = (process.event_ingester, process.upload_worker, process.state_manager, process.api)
_STACK = (stack.up, stack.demo, stack.mock_microscope)
_CLIENT = (client.ls, client.status, client.fetch)
for command in (*_ENTRYPOINTS, *_STACK, *_CLIENT):
    app.command()(command)


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
    entrypoint: Annotated[
        Literal["event-ingester", "upload-worker", "state-manager", "api"] | None,
        typer.Option(
            "--for",
            show_default=False,
            help="With --check: only what this entrypoint needs, as on a host that runs nothing else.",
        ),
    ] = None,
) -> None:
    """Migrations, consumer groups, directories, bucket, blocks, work pools, deployments. Repeatable."""
    if check:
        from rich.console import Console

        from flows.check import check_and_report

        sys.exit(check_and_report(get_settings(), Console(), entrypoint or "init"))
    if entrypoint:
        raise typer.BadParameter("--for is for --check only")
    from flows.init import initialize

    initialize(get_settings(), abort_incomplete_days)


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
    from flows.elsewhere import say_elsewhere
    from flows.purge import configured_systems, staged_systems
    from flows.purge import purge as purge_systems

    settings = get_settings()
    systems = asyncio.run(configured_systems(settings, system))
    staged = asyncio.run(staged_systems(settings, system))
    if system is None:
        say_elsewhere(settings, systems, typer.echo)
    typer.echo(purge_systems(settings, systems, staged, lambda outcome: typer.echo(str(outcome)), do_it=do_it))


@app.command()
def audit(
    fix: Annotated[bool, typer.Option("--fix", help="Have what is missing go its way again.")] = False,
) -> None:
    """Compare disk, stream, database and bucket; lists every difference, and exits with 1 if one is left."""
    from flows.audit import find, report
    from flows.elsewhere import say_elsewhere
    from flows.purge import configured_systems

    settings = get_settings()
    systems = asyncio.run(configured_systems(settings))
    say_elsewhere(settings, systems, typer.echo)
    left, fixed = report(find(systems, settings), typer.echo, fix=fix)
    typer.echo(f"{left.total() + fixed} differences, {fixed} fixed")
    sys.exit(bool(left))


@app.command()
def rebuild(
    read_whole: Annotated[
        bool, typer.Option("--read-whole", help="Read every byte of the objects, which proves their images.")
    ] = False,
) -> None:
    """Fill an empty database from the stream, and from the bucket what the stream has forgotten."""
    from flows.rebuild import rebuild as rebuild_database

    for sentence in rebuild_database(get_settings(), read_whole=read_whole):
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
    failed: Annotated[bool, typer.Option("--failed", help="Timesteps that were given up: uploaded again.")] = False,
    rejected: Annotated[bool, typer.Option("--rejected", help="Event files that were rejected: read again.")] = False,
    system: Annotated[str | None, typer.Option(help="Only those of this imaging system.")] = None,
) -> None:
    """Take up again what was given up or rejected, when the cause was mended."""
    from flows.backfill import backfill_failed, backfill_rejected

    if not (failed or rejected):
        raise typer.BadParameter("say what to take up again: --failed, --rejected, or both")
    if failed:
        timesteps = 0
        for timestep in backfill_failed(get_settings(), system):
            typer.echo(f"{timestep.timestep_id} {timestep.title} is taken up again")
            timesteps += 1
        typer.echo(f"{timesteps} timesteps")
    if rejected:
        files = 0
        for event_file in backfill_rejected(get_settings(), system):
            typer.echo(f"{event_file} is read again")
            files += 1
        typer.echo(f"{files} event files")


def main() -> None:
    """Run the command; what the operator has to do something about is printed as a sentence."""
    # Prefect has set the root logger up when it was imported; ours say more.
    for package in ("flows", "blocks", "api"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        app()
    except ArchiverError as error:
        sys.exit(process.report(error))


if __name__ == "__main__":
    main()
