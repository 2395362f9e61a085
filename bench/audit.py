"""How long an audit takes, and how much memory, with many timesteps.

    .venv/bin/python bench/audit.py [--timesteps 300000] [--files 20000]

Compares disk, stream and database, in a process of its own, with two differences to find. The bucket is left out: it
is listed by pages, as everywhere, and there is none with so many objects here.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import psycopg
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from bench.many_timesteps import fill
from bench.surroundings import postgres_server, redis_server
from blocks.database import create_engine
from blocks.event_log import EventLog
from blocks.fingerprint import Fingerprint
from blocks.imaging_system import ImagingSystem
from blocks.settings import Settings
from flows.audit_disk import audit_disk
from flows.audit_stream import audit_stream

SYSTEM = "microscope-1"
PAGE = 1000
# About what an event says of 150 images.
FILLER = "x" * 15_000

# So that each event has an entry of its own.
_NUMBER = """
update timestep_event as event set entry_id = numbered.number || '-0'
from (select id, row_number() over (order by time, id) as number from timestep_event) as numbered
where numbered.id = event.id
"""


def make_stream(database_url: str, log: EventLog) -> int:
    """The stream that the history was recorded from, but for one event; returns how many there are."""
    log.ensure_groups()
    count = 0
    with psycopg.connect(database_url) as connection:
        connection.execute(_NUMBER)
        connection.execute("delete from timestep_event where entry_id = '7-0'")
        with connection.cursor("events") as events, log.redis.pipeline(transaction=False) as pipeline:
            events.itersize = PAGE
            events.execute(
                "select entry_id, id, type from timestep_event order by split_part(entry_id, '-', 1)::bigint"
            )
            for entry_id, id, type in events:
                # Of most, what they say more does not matter here.
                more = FILLER if count % 100 == 0 else ""
                event = f'{{"specversion":"1.0","id":"{id}","more":"{more}"}}'
                pipeline.xadd(log.stream, {"event": event, "type": type}, entry_id)
                if (count := count + 1) % PAGE == 0:
                    pipeline.execute()
            pipeline.execute()
    log.redis.xadd(log.stream, {"event": '{"specversion":"1.0","id":"6f0d4a1e-7c54-4d0a-9d0b-3f4c1f6f7a11"}'})
    log.redis.xgroup_setid(log.stream, "state-manager", "$")
    return count


def make_files(database_url: str, log: EventLog, root: Path, files: int) -> None:
    """Event files and image directories of the last timesteps of one system, and one that nobody knows."""
    home = root / SYSTEM
    (home / "events").mkdir(parents=True)
    with psycopg.connect(database_url) as connection:
        query = "select event_file, image_dir from timestep where system = %s order by timestamp desc limit %s"
        for event_file, image_dir in connection.execute(query, (SYSTEM, files)):
            (home / event_file).touch()
            (home / image_dir).mkdir(parents=True)
    with log.redis.pipeline(transaction=False) as pipeline:
        for name, status in ImagingSystem(name=SYSTEM, root=root).event_files():
            verdict = Fingerprint(file=Fingerprint.state_of(status)).model_dump_json()
            pipeline.hset(f"{log.stream}:event-files:{SYSTEM}", name, verdict)
        pipeline.execute()
    (home / "events" / "unknown.json").touch()


def audit(root: Path, database_url: str, redis_url: str, answer: Any) -> None:
    """Compare all of it; runs in a process of its own."""
    log = EventLog(url=SecretStr(redis_url))
    engine = create_engine(Settings(database_url=SecretStr(database_url)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    on_disk = [finding.kind for finding in audit_disk(ImagingSystem(name=SYSTEM, root=root), log, engine, -1)]
    between = time.perf_counter()
    in_stream = [finding.kind for finding in audit_stream(log, engine, timedelta(seconds=-1))]
    answer.send(
        {
            "disk_seconds": between - begun,
            "stream_seconds": time.perf_counter() - between,
            "peak_mib": (peak := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024,
            "added_mib": (peak - before) / 1024,
            "differences": len(on_disk) + len(in_stream),
        }
    )


def main() -> None:
    """Measure, print a table, and the figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=300_000, help="timesteps in the database")
    parser.add_argument("--files", type=int, default=20_000, help="of these, whose files are still there")
    options = parser.parse_args()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="archiver-bench-")))
        redis_url = stack.enter_context(redis_server(home))
        database_url = stack.enter_context(postgres_server(home))
        log = EventLog(url=SecretStr(redis_url))
        fill(database_url, options.timesteps)
        events = make_stream(database_url, log)
        make_files(database_url, log, home / "root", options.files)
        here, there = multiprocessing.Pipe(duplex=False)
        arguments = (home / "root", database_url, redis_url, there)
        # Not forked: its memory is to be its own.
        process = multiprocessing.get_context("spawn").Process(target=audit, args=arguments)
        process.start()
        there.close()
        figures: dict[str, float] = {"timesteps": options.timesteps, "events": events, **here.recv()}
        process.join(10)
    table = Table(title="an audit of disk, stream and database")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.1f}")
    Console().print(table)
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
