"""What `archiver init --check` asks the services: whether each answers, lets us in, and is as we need it."""

import asyncio
import time
from contextlib import closing
from urllib.parse import urlsplit

import httpx
import yaml
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from blocks import incomplete_uploads
from blocks.database import create_engine, pending_migrations
from blocks.errors import ArchiverError
from blocks.event_log import GROUPS, EventLog
from blocks.expiry import ExpiryRules, RulesUnknown
from blocks.loopback import is_loopback
from blocks.object_errors import BucketMissing, ObjectStoreError
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from flows.bridge import why_closed
from flows.init import PREFECT_YAML
from flows.notification import notification_block

# S3 refuses requests that are signed by a clock which is wrong by 15 minutes. That is no time to begin to care.
CLOCK_SECONDS = 120

INIT = "`archiver init` does that"
_LOCK_PREFECT = (
    "whoever reaches the Prefect server may start and cancel runs: set PREFECT_SERVER_API_AUTH_STRING for it, and "
    "PREFECT_API_AUTH_STRING to the same for all others"
)
_LOCK_REDIS = "whoever reaches Redis may rewrite the stream: have it ask for a password"


class Wrong(ArchiverError):
    """Something would keep the system from working; the message says what, and what to do."""


def database(settings: Settings) -> str:
    """PostgreSQL has its tables and our time."""
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
        raise Wrong(f"the migrations {', '.join(pending)} are still to be applied: {INIT}")
    return ""


def stream(settings: Settings) -> str:
    """Redis has the stream and its groups, and keeps what it was told."""
    with closing(EventLog.from_settings(settings)) as log:
        try:
            seconds, microseconds = log.redis.time()
            _same_time("Redis'", seconds + microseconds / 1e6)
            memory = log.memory
            durable = log.is_durable()
        except RedisError as error:
            raise Wrong(f"ARCHIVER_REDIS_URL: {error}") from error
        if memory.policy != "noeviction":
            raise Wrong(
                f"Redis drops what it likes when it is full: its maxmemory-policy is {memory.policy}, not noeviction"
            )
        try:
            for group in GROUPS:
                log.backlog(group)
        except ResponseError as error:
            raise Wrong(f"the stream {log.stream} is still to be made: {INIT}") from error
    advice = (
        [] if durable else ["Redis keeps no append-only file: with it, the last events are lost. Set appendonly yes"]
    )
    if filling := memory.warning():
        advice.append(filling)
    server = urlsplit(log.url.get_secret_value())
    if not (server.password or is_loopback(server.hostname or "localhost")):
        advice.append(_LOCK_REDIS)
    return "; ".join(advice)


def storage(settings: Settings) -> str:
    """The bucket is there, and does not delete by itself what is not on tape."""
    store = ObjectStore.from_settings(settings)
    try:
        store.check()
    except BucketMissing as error:
        raise Wrong(f"{error}: {INIT}") from error
    try:
        ruled = incomplete_uploads.has_rule(store.wire)
        rules = ExpiryRules(store).ask(store.bucket_name)
    except (ObjectStoreError, RulesUnknown) as error:
        return f"the bucket's lifecycle can't be read: {error}"
    # Those for tagged objects are left to who made them: surf-archiver tags what it has archived.
    deleting = [rule.name for rule in rules if rule.is_for_timesteps and not rule.is_for_tagged]
    if deleting:
        raise Wrong(
            f"lifecycle rules of the bucket delete timesteps: {', '.join(deleting)}. Remove them, or limit them to "
            "objects with the tag archived=true"
        )
    return "" if ruled else "nothing but our daily flow aborts uploads: `archiver init --abort-incomplete-days 7`"


def clock(settings: Settings) -> str:
    """The object storage has our time."""
    there = ObjectStore.from_settings(settings).wire.server_time()
    if there is None:
        return "not known: the object storage does not tell its time"
    _same_time("the object storage's, which will refuse it", there.timestamp())
    return ""


def _same_time(whose: str, theirs: float) -> None:
    if abs(seconds := time.time() - theirs) > CLOCK_SECONDS:
        way = "ahead of" if seconds > 0 else "behind"
        raise Wrong(f"this machine's clock is {abs(seconds):.0f} s {way} {whose}")


def prefect(settings: Settings) -> str:
    """Prefect has the work pools, and what is to notify people."""
    settings.require("prefect_api_url")
    # Without an address Prefect would start a server of its own, and the settings of other threads are not ours.
    with temporary_settings({PREFECT_API_URL: settings.prefect_api_url}):
        return asyncio.run(_find_pools(settings, str(settings.prefect_api_url)))


async def _find_pools(settings: Settings, url: str) -> str:
    try:
        async with get_client() as client:
            for pool in yaml.safe_load(PREFECT_YAML.read_text())["definitions"]["work_pools"]:
                await client.read_work_pool(pool)
        if settings.report_block:
            await notification_block(settings.report_block)
        is_open = not is_loopback(httpx.URL(url).host) and await _lets_in_everybody(url)
    except ObjectNotFound as error:
        raise Wrong(f"the work pool {pool} is still to be made: {INIT}") from error
    except httpx.HTTPError as error:
        raise Wrong(f"PREFECT_API_URL {url}: {error or type(error).__name__}") from error
    return _LOCK_PREFECT if is_open else ""


async def _lets_in_everybody(url: str) -> bool:
    """Whether somebody without a password may read flow runs, and so cancel or start them."""
    async with httpx.AsyncClient() as nobody:
        return (await nobody.post(f"{url}/flow_runs/count", json={})).is_success


def rabbitmq(settings: Settings) -> str:
    """The broker lets us in, where surf-archiver has one."""
    if settings.rabbitmq_url is not None and (why := asyncio.run(why_closed(settings))):
        raise Wrong(f"ARCHIVER_RABBITMQ_URL: {why}")
    return ""
