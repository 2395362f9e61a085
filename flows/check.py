"""`archiver init --check`: what is wrong with a configuration, said before anything starts. Changes nothing."""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import httpx
import yaml
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from redis.exceptions import RedisError, ResponseError
from rich.console import Console
from rich.markup import escape
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from blocks import incomplete_uploads
from blocks.database import create_engine, pending_migrations
from blocks.errors import ArchiverError
from blocks.event_log import GROUPS, EventLog
from blocks.loopback import is_loopback
from blocks.object_errors import BucketMissing, ObjectStoreError
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.synthetic_timestep import SYSTEM as FLIGHT_CHECK
from flows.init import PREFECT_YAML

# S3 refuses requests that are signed by a clock which is wrong by 15 minutes. That is no time to begin to care.
CLOCK_SECONDS = 120

_INIT = "`archiver init` does that"
_LOCK_PREFECT = (
    "whoever reaches the Prefect server may start and cancel runs: set PREFECT_SERVER_API_AUTH_STRING for it, and "
    "PREFECT_API_AUTH_STRING to the same for all others"
)


class Wrong(ArchiverError):
    """Something would keep the system from working; the message says what, and what to do."""


@dataclass(frozen=True)
class Finding:
    """What came out of one check: a fault, a piece of advice, or neither."""

    about: str
    fault: str = ""
    advice: str = ""


def check_and_report(settings: Settings, console: Console) -> int:
    """Check everything and print it; returns 0 when nothing is wrong, else 1."""
    findings = check(settings)
    for finding in findings:
        verdict = "[red]wrong[/red]" if finding.fault else "[yellow]works[/yellow]" if finding.advice else "good "
        said = escape(finding.fault or finding.advice)
        console.print(f"{finding.about:<18}  {verdict}  {said}".rstrip(), highlight=False, soft_wrap=True)
    return 1 if any(finding.fault for finding in findings) else 0


def check(settings: Settings) -> list[Finding]:
    """Check all that the entrypoints need, at the same time."""
    with ThreadPoolExecutor(len(_CHECKS)) as pool:
        return list(pool.map(lambda about: _find(about, settings), _CHECKS))


def _find(about: str, settings: Settings) -> Finding:
    try:
        return Finding(about, advice=_CHECKS[about](settings))
    except ArchiverError as error:
        return Finding(about, fault=str(error))


def _data(settings: Settings) -> str:
    settings.require("data_dir")
    directory = cast(Path, settings.data_dir)
    if not directory.is_dir():
        raise Wrong(f"there is no directory {directory}: mount it, or set ARCHIVER_DATA_DIR")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise Wrong(f"{directory} can't be read by this user")
    systems = [path for path in directory.iterdir() if path.is_dir()]
    if closed := [path.name for path in systems if not os.access(path, os.R_OK | os.X_OK)]:
        raise Wrong(f"this user can't read {', '.join(sorted(closed))} in {directory}")
    microscopes = [path for path in systems if path.name != FLIGHT_CHECK]
    return "" if any((path / "events").is_dir() for path in microscopes) else f"no system in {directory} has events yet"


def _staging(settings: Settings) -> str:
    if settings.staging_dir is None or not settings.staging_dir.exists():
        return "" if settings.staging_dir is None else f"{settings.staging_dir} is not there yet: {_INIT}"
    if not os.access(settings.staging_dir, os.R_OK | os.W_OK | os.X_OK):
        raise Wrong(f"this user can't write to {settings.staging_dir}")
    return ""


def _database(settings: Settings) -> str:
    engine = create_engine(settings)
    try:
        with engine.connect() as connection:
            _same_time("PostgreSQL's", float(connection.execute(text("select extract(epoch from now())")).scalar_one()))
        pending = pending_migrations(engine)
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise Wrong(f"ARCHIVER_DATABASE_URL: {' '.join(str(cause).split())}") from error
    finally:
        engine.dispose()
    if pending:
        raise Wrong(f"the migrations {', '.join(pending)} are still to be applied: {_INIT}")
    return ""


def _stream(settings: Settings) -> str:
    with closing(EventLog.from_settings(settings)) as log:
        try:
            seconds, microseconds = log.redis.time()
            _same_time("Redis'", seconds + microseconds / 1e6)
            durable = log.is_durable()
        except RedisError as error:
            raise Wrong(f"ARCHIVER_REDIS_URL: {error}") from error
        try:
            for group in GROUPS:
                log.backlog(group)
        except ResponseError as error:
            raise Wrong(f"the stream {log.stream} is still to be made: {_INIT}") from error
    return "" if durable else "Redis keeps no append-only file: with it, the last events are lost. Set appendonly yes"


def _storage(settings: Settings) -> str:
    store = ObjectStore.from_settings(settings)
    try:
        store.check()
    except BucketMissing as error:
        raise Wrong(f"{error}: {_INIT}") from error
    try:
        ruled = incomplete_uploads.has_rule(store.wire)
        deleting = incomplete_uploads.deleting_rules(store.wire)
    except ObjectStoreError as error:
        return f"the bucket's lifecycle can't be read: {error}"
    if deleting:
        raise Wrong(
            f"lifecycle rules of the bucket delete timesteps: {', '.join(deleting)}. Remove them, or limit them to "
            "objects with the tag archived=true"
        )
    return "" if ruled else "nothing but our daily flow aborts uploads: `archiver init --abort-incomplete-days 7`"


def _clock(settings: Settings) -> str:
    there = ObjectStore.from_settings(settings).wire.server_time()
    if there is None:
        return "not known: the object storage does not tell its time"
    _same_time("the object storage's, which will refuse it", there.timestamp())
    return ""


def _same_time(whose: str, theirs: float) -> None:
    if abs(seconds := time.time() - theirs) > CLOCK_SECONDS:
        way = "ahead of" if seconds > 0 else "behind"
        raise Wrong(f"this machine's clock is {abs(seconds):.0f} s {way} {whose}")


def _prefect(settings: Settings) -> str:
    settings.require("prefect_api_url")
    # Without an address Prefect would start a server of its own, and the settings of other threads are not ours.
    with temporary_settings({PREFECT_API_URL: settings.prefect_api_url}):
        return asyncio.run(_find_pools(str(settings.prefect_api_url)))


async def _find_pools(url: str) -> str:
    try:
        async with get_client() as client:
            for pool in yaml.safe_load(PREFECT_YAML.read_text())["definitions"]["work_pools"]:
                await client.read_work_pool(pool)
        is_open = not is_loopback(httpx.URL(url).host) and await _lets_in_everybody(url)
    except ObjectNotFound as error:
        raise Wrong(f"the work pool {pool} is still to be made: {_INIT}") from error
    except httpx.HTTPError as error:
        raise Wrong(f"PREFECT_API_URL {url}: {error or type(error).__name__}") from error
    return _LOCK_PREFECT if is_open else ""


async def _lets_in_everybody(url: str) -> bool:
    """Whether somebody without a password may read flow runs, and so cancel or start them."""
    async with httpx.AsyncClient() as nobody:
        return (await nobody.post(f"{url}/flow_runs/count", json={})).is_success


def _webhook(settings: Settings) -> str:
    return "" if settings.webhook_token else "closed for surf-archiver until ARCHIVER_WEBHOOK_TOKEN is set"


# Each raises an ArchiverError if something is wrong, and returns a piece of advice or nothing.
_CHECKS: dict[str, Callable[[Settings], str]] = {
    "data directory": _data,
    "staging directory": _staging,
    "database": _database,
    "stream": _stream,
    "object storage": _storage,
    "clock": _clock,
    "Prefect": _prefect,
    "webhook": _webhook,
}
