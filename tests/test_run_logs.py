"""What the entrypoints log of a timestep's way names the timestep, also what Prefect says about its runs."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blocks.event_log import EventLog
from blocks.messages import Uploaded
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from tests.working import drop, is_done, said, until

pytest_plugins = ["tests.prefect_server"]


@contextmanager
def logging(entrypoint: str, file: Path) -> Iterator[None]:
    """An entrypoint in a process of its own."""
    env = os.environ | {"ARCHIVER_LOG_FORMAT": "json", "PREFECT_WORKER_QUERY_SECONDS": "1"}
    with file.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "flows.cli", entrypoint], env=env, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]


def test_every_line_about_a_timestep_names_it(
    run_settings: Settings, event_log: EventLog, object_store: ObjectStore, tmp_path: Path
) -> None:
    ingester, worker = tmp_path / "event-ingester.log", tmp_path / "upload-worker.log"
    arrives = drop(run_settings)
    # Its run comes back from the queue, again and again.
    waits = drop(run_settings, img_count=3)
    with logging("event-ingester", ingester), logging("upload-worker", worker):
        asyncio.run(until(lambda: said(event_log, Uploaded) and is_done(event_log), "an upload"))
        asyncio.run(until(lambda: "submitted to infrastructure" in ingester.read_text(), "a second look"))
    for file, begins in ((ingester, "ingest prince events/"), (worker, "upload prince ")):
        of_runs = [line for line in read_lines(file) if line.get("flow_run_name", "").startswith(begins)]
        nameless = [line for line in of_runs if "timestep_id" not in line]
        assert not nameless, nameless
        messages = {word for line in of_runs for word in ("Beginning", "Finished in state") if word in line["message"]}
        assert messages == {"Beginning", "Finished in state"}
        for line in of_runs:
            event = waits if waits.timestep_id.hex in line["flow_run_name"] else arrives
            assert line["timestep_id"] == str(event.timestep_id), line
