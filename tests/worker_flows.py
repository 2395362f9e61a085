"""Flows that do what a flow may do, to be executed by the in-process worker."""

import asyncio
import sys
from pathlib import Path
from typing import Any, Literal

import prefect
from prefect import Flow, get_run_logger, runtime
from prefect.client.schemas.objects import FlowRun, State

Deed = Literal["complete", "fail", "fail at first", "wait", "exit"]


def note(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook: writes down which state the run has come to."""
    with Path(flow_run.parameters["notes"]).open("a") as notes:
        notes.write(f"{state.name}\n")


@prefect.flow(
    persist_result=False,
    on_running=[note],
    on_completion=[note],
    on_failure=[note],
    on_cancellation=[note],
    on_crashed=[note],
)
async def behave(deed: Deed, notes: str) -> None:
    """Do as told, and say so."""
    get_run_logger().info("here I %s", deed)
    if deed == "wait":
        await asyncio.sleep(60)
    if deed == "exit":
        sys.exit(3)
    is_first = runtime.flow_run.run_count == 1
    if deed == "fail" or (deed == "fail at first" and is_first):
        raise ValueError("as told")


impatient = behave.with_options(name="impatient", timeout_seconds=1)
persistent = behave.with_options(name="persistent", retries=1)
