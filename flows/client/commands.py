"""The commands for a laptop: `archiver ls`, `archiver status`, `archiver fetch`."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from blocks.settings import get_settings

Position = Annotated[int | None, typer.Option(min=0, help="Only this position.")]
Start = Annotated[datetime | None, typer.Option(help="Only what was taken then or later, in UTC.")]
End = Annotated[datetime | None, typer.Option(help="Only what was taken before, in UTC.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


def ls(
    experiment: Annotated[str | None, typer.Argument(help="Only this experiment.")] = None,
    system: Annotated[str | None, typer.Option(help="Only this imaging system.")] = None,
    state: Annotated[str | None, typer.Option(help="ingested, uploaded, archived or failed.")] = None,
    position: Position = None,
    start: Start = None,
    end: End = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    as_json: Json = False,
) -> None:
    """List timesteps, newest first."""
    from rich.console import Console

    from flows.client.show import list_timesteps

    query = {
        "experiment": experiment,
        "system": system,
        "state": state,
        "position": position,
        **_between(start, end),
    }
    list_timesteps(get_settings(), query, limit, as_json, Console())


def status(as_json: Json = False) -> None:
    """How the whole system does: what waits, what failed, what is away; exits with 1 if something is away."""
    from rich.console import Console

    from flows.client.show import show_status

    sys.exit(show_status(get_settings(), as_json, Console()))


def fetch(
    experiment: Annotated[str, typer.Argument(help="The experiment to fetch.")],
    position: Position = None,
    start: Start = None,
    end: End = None,
    dest: Annotated[Path, typer.Option(help="Directory to fetch into; each object goes under its key.")] = Path(),
    parallel: Annotated[int, typer.Option(min=1, max=64, help="How many at a time.")] = 4,
) -> None:
    """Fetch an experiment's tars, proven by their SHA-256; again goes on. Exits with 1 if one fails."""
    from rich.console import Console

    from flows.client.fetch import fetch as fetch_experiment

    query = {"experiment": experiment, "position": position, **_between(start, end)}
    sys.exit(fetch_experiment(get_settings(), query, dest, parallel, Console()))


def _between(start: datetime | None, end: datetime | None) -> dict[str, str | None]:
    return {name: at.isoformat() if at else None for name, at in (("start", start), ("end", end))}
