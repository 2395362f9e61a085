"""How many events per second the state-manager records, from a real Redis into a real PostgreSQL.

Both servers are started for the purpose, with the durability an installation has: Redis syncs its
append-only file after every write, PostgreSQL every commit. What is measured is `record_waiting`, which a
record-events run executes, from the first read of the stream to the last acknowledgement; not Prefect, which
adds its fraction of a second per run of up to half a minute. Prints a table and, as its last line, one JSON
object.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID, uuid4

import psutil
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from bench.surroundings import postgres_server, redis_server
from blocks.database import create_engine
from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.messages import Archived, EventData, Failed, Ingested, LogEvent, SourcePurged, StagingPurged, Uploaded
from blocks.proven_object import Image, Proof
from blocks.settings import Settings
from flows.record import GROUP, record_waiting

BEGIN = datetime(2026, 11, 23, tzinfo=UTC)
POSITIONS = 40
FAILED_OF = 50  # one of so many timesteps fails once before it is uploaded
MINIMUM = 2000  # events per second


@dataclass(frozen=True)
class Result:
    """One measurement. `own` are the state-manager's processor seconds, `servers` those of PostgreSQL and Redis."""

    events: int
    bytes: int
    seconds: float
    own: float
    servers: float

    @property
    def rate(self) -> float:
        return self.events / self.seconds


def announce(number: int, images: int) -> ImagingEvent:
    """The timestep of that number: one plate of 40 positions after the other."""
    plate, position = divmod(number, POSITIONS)
    return ImagingEvent.model_validate(
        {
            "timestep_id": uuid4(),
            "plate": plate % 50,
            "cross_date": BEGIN.date(),
            "position": position,
            "timestamp": BEGIN + timedelta(seconds=20 * number),
            "img_count": images,
            "img_dir": f"20261123_{number:06d}_Plate{plate:03d}",
            "metadata": {"objective": "10x", "application": "imaging", "humidity": 61.5},
        }
    )


def upload_of(event: ImagingEvent, images: int) -> Uploaded:
    """Its upload, with every image."""
    number = event.timestep_id.int
    return Uploaded(
        timestep_id=event.timestep_id,
        system="prince",
        event=event,
        bucket="timesteps",
        key=event.key,
        size=images * 4_000_512,
        etag=f"{number:032x}-38",
        sha256=f"{number:064x}",
        layout_digest=f"{number + 1:064x}",
        images=[
            Image(
                name=f"Img/Img_r{column // 15:02}_c{column % 15:02}.tif",
                offset=2048 + column * 4_000_512,
                size=4_000_000,
                sha256=f"{number + column:064x}"[-64:],
            )
            for column in range(images)
        ],
        proof=Proof(
            verified_at=BEGIN,
            checks=["Every request's body was signed with its SHA-256.", "Looked up again, the object has its bytes."],
        ),
        started_at=BEGIN,
        flow_run_id=uuid4(),
    )


def lifecycle(number: int, images: int) -> Iterator[EventData]:
    """All that is said of one timestep, in order."""
    event = announce(number, images)
    id = event.timestep_id
    yield Ingested(timestep_id=id, system="prince", event_file=f"events/{number:06d}.json", event=event)
    if number % FAILED_OF == 0:
        yield Failed(timestep_id=id, system="prince", stage="upload", reason="the share is away", event=event)
    yield upload_of(event, images)
    proof = Proof(verified_at=BEGIN, checks=["Its object was read back."])
    yield StagingPurged(timestep_id=id, system="prince", files=images, bytes=images * 4_000_000, proof=proof)
    yield Archived(
        timestep_id=None,
        job_id=UUID(int=number // 4000),
        date=BEGIN.date(),
        archive=f"images/{event.experiment_id}/{event.timestamp:%Y%m%d}.tar",
        key=event.key,
    )
    yield SourcePurged(timestep_id=id, system="prince", files=images, bytes=images * 4_000_000, proof=proof)


def mixed(timesteps: int, images: int) -> list[EventData]:
    """The events of many timesteps as they mix in a stream: thousands lie between the first and last of one."""
    stories = [list(lifecycle(number, images)) for number in range(timesteps)]
    # What is said n-th of a timestep comes n * 300 timesteps later than what is said first.
    told = [
        (number + 300 * step, number, data) for number, story in enumerate(stories) for step, data in enumerate(story)
    ]
    return [data for _, _, data in sorted(told, key=lambda item: item[:2])]


def servers_seconds(home: Path) -> float:
    """The processor seconds that the servers below `home` have used up to now."""
    seconds = 0.0
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            if process.pid != os.getpid() and any(str(home) in argument for argument in process.cmdline()):
                for part in (process, *process.children(recursive=True)):
                    seconds += sum(part.cpu_times()[:2])
                # Of connections that have ended meanwhile.
                seconds += sum(process.cpu_times()[2:4])
    return seconds


def measure(home: Path, log: EventLog, engine_url: str, said: Sequence[EventData], batch: int) -> Result:
    """Put events into the stream, then record them all."""
    size = 0
    with log.redis.pipeline(transaction=False) as pipeline:
        for data in said:
            event = LogEvent.of(data, "bench")
            fields = {"event": event.model_dump_json(), "type": event.type, "timestep_id": event.subject or ""}
            size += sum(map(len, fields.values()))
            pipeline.xadd(log.stream, fields)  # type: ignore[arg-type]
        pipeline.execute()
    engine = create_engine(Settings(database_url=SecretStr(engine_url)))
    recorded = 0
    started, own, servers = time.perf_counter(), time.process_time(), servers_seconds(home)
    while recorded < len(said):
        recorded += record_waiting(log, engine, "bench", batch, linger_seconds=0.001)
    seconds = time.perf_counter() - started
    result = Result(len(said), size, seconds, time.process_time() - own, servers_seconds(home) - servers)
    engine.dispose()
    backlog = log.backlog(GROUP)
    assert (backlog.waiting, backlog.in_progress, backlog.set_aside) == (0, 0, 0)
    log.redis.xtrim(log.stream, maxlen=0)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=4000, help="timesteps in the mix (default: %(default)s)")
    parser.add_argument("--images", type=int, default=150, help="images per timestep (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1000, help="entries per transaction (default: %(default)s)")
    parser.add_argument("--home", type=Path, help="where the servers keep their data (default: a temporary directory)")
    options = parser.parse_args()

    with ExitStack() as stack:
        home = options.home or Path(stack.enter_context(TemporaryDirectory(prefix="bench-state-")))
        redis_url = stack.enter_context(redis_server(home, durable=True))
        database = stack.enter_context(postgres_server(home))
        log = stack.enter_context(closing(EventLog(url=SecretStr(redis_url))))
        log.ensure_groups()
        results = {"all, mixed": measure(home, log, database, mixed(options.timesteps, options.images), options.batch)}
        stories = [list(lifecycle(number, options.images)) for number in range(1, options.timesteps // 4)]
        for kind in (Ingested, Uploaded, StagingPurged, Archived, SourcePurged):
            said = [data for story in stories for data in story if isinstance(data, kind)]
            results[kind.type] = measure(home, log, database, said, options.batch)

    table = Table("events", "number", "MB", "seconds", "events/s", "processor seconds: own", "servers")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.events}",
            f"{result.bytes / 1e6:.1f}",
            f"{result.seconds:.2f}",
            f"{result.rate:.0f}",
            f"{result.own:.2f}",
            f"{result.servers:.2f}",
        )
    Console(width=120).print(table)
    print(
        f"A timestep's events: ingested, uploaded with {options.images} images, staging purged, archived, source "
        f"purged; one of {FAILED_OF} fails once before. {os.cpu_count()} cores, shared with both servers."
    )
    whole = results["all, mixed"]
    figures = {
        "events_per_second": round(whole.rate),
        "images_per_event_uploaded": options.images,
        "image_rows_per_second": round(options.timesteps * options.images / whole.seconds),
        "required_events_per_second": MINIMUM,
        "ratio_to_required": round(whole.rate / MINIMUM, 2),
        "events_per_second_by_type": {name: round(result.rate) for name, result in results.items() if "." in name},
        "events_per_own_processor_second": round(whole.events / whole.own),
        "events_per_processor_second": round(whole.events / (whole.own + whole.servers)),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
