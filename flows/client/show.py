"""`archiver ls` and `archiver status`: what the API says, as tables for people or as JSON for programs."""

import json
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from blocks.settings import Settings
from flows.client.gateway import Gateway

_COLOURS = {"ingested": "yellow", "uploaded": "cyan", "archived": "green", "failed": "red"}


def list_timesteps(settings: Settings, query: Mapping[str, Any], limit: int, as_json: bool, console: Console) -> None:
    """Print timesteps, newest first; as JSON one per line.

    Raises:
        MissingSetting: when the API's address is not set.
        GatewayError: when the API can't be asked.
    """
    with closing(Gateway.from_settings(settings)) as gateway:
        rows = gateway.rows("/api/1/timesteps", query, limit=limit)
        if as_json:
            for row in rows:
                console.print(json.dumps(row), soft_wrap=True, markup=False, highlight=False)
            return
        table = Table("taken (UTC)", "system", "experiment", "position", "state", "size", "timestep", box=None)
        for row in rows:
            state = f"[{_COLOURS[row['state']]}]{row['state']}[/]"
            if row["failure"]:
                state += f" at {row['failure']['stage']}: {escape(row['failure']['reason'])}"
            taken = datetime.fromisoformat(row["timestamp"]).astimezone(UTC)
            size = decimal(row["size"]) if row["size"] is not None else ""
            names = (escape(row["system"]), escape(row["experiment_id"]), str(row["position"]))
            table.add_row(f"{taken:%Y-%m-%d %H:%M:%S}", *names, state, size, row["timestep_id"])
    console.print(table if table.row_count else "There are none.")


def show_status(settings: Settings, as_json: bool, console: Console) -> int:
    """Print how the whole system does; returns the exit code: 1 when something is away.

    Raises:
        MissingSetting: when the API's address is not set.
        GatewayError: when the API can't be asked.
    """
    with closing(Gateway.from_settings(settings)) as gateway:
        status = gateway.ask("/api/1/status").json()
        checks = gateway.ask("/ready", accept=HTTPStatus.SERVICE_UNAVAILABLE).json()["checks"]
    status["checks"] = checks
    away = {name: check["reason"] for name, check in checks.items() if not check["ok"]}
    if as_json:
        console.print(json.dumps(status, indent=2), soft_wrap=True, markup=False, highlight=False)
    else:
        for name, reason in away.items():
            console.print(f"[red]{name} can't be used:[/red] {escape(reason)}", highlight=False, soft_wrap=True)
        if status["state"]:
            console.print(_state_table(status["state"], status["event_files_waiting"]))
            for warning in status["state"]["warnings"]:
                console.print(f"[yellow]{escape(warning)}[/yellow]", highlight=False, soft_wrap=True)
        if status["groups"]:
            console.print(_group_table(status["groups"]))
            for group in status["groups"]:
                for letter in group["newest_dead_letters"]:
                    line = (
                        f"{group['group']} set aside {letter['entry_id']} {letter['type']}: {escape(letter['reason'])}"
                    )
                    console.print(f"[red]{line}[/red]", highlight=False, soft_wrap=True)
    return 1 if away or status["problems"] else 0


def _state_table(state: Mapping[str, Any], event_files_waiting: int | None) -> Table:
    table = Table(show_header=False, box=None)
    if event_files_waiting is not None:
        table.add_row("event files waiting", f"{event_files_waiting:,}")
    for name, count in state["timesteps"].items():
        table.add_row(name, f"[{_COLOURS[name]}]{count:,}[/]")
    table.add_row("in object storage", decimal(state["bytes"]))
    table.add_row("rejected event files", f"{state['rejected']:,}")
    table.add_row("not on tape for too long", f"{state['at_risk']:,}")
    table.add_row("longest not on tape", _duration(state["oldest_not_on_tape_seconds"]))
    table.add_row("all uploaded in", _duration(state["done_in_seconds"]))
    return table


def _group_table(groups: list[Mapping[str, Any]]) -> Table:
    table = Table("reader of the stream", "waiting", "in progress", "set aside", "oldest since", box=None)
    for group in groups:
        # An API of the release before does not say.
        more = "more than " if group.get("has_more") else ""
        waiting, *others = (f"{group[name]:,}" for name in ("waiting", "in_progress", "dead_letters"))
        table.add_row(group["group"], more + waiting, *others, _duration(group["oldest_waiting_seconds"]))
    return table


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))
