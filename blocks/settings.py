"""The settings of every entrypoint, read from the environment."""

import re
import socket
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from blocks.addresses import BrokerUrl, DatabaseUrl, HttpUrl, RedisUrl
from blocks.errors import ArchiverError


class MissingSetting(ArchiverError):
    """A setting that this entrypoint needs is not set; the message names it."""


class InvalidSetting(ArchiverError):
    """A setting that makes no sense; the message names it, and not its value, which may be a secret."""


AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


def _names(value: object) -> object:
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


# In the environment: with commas in between.
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]


# Who talks to the object storage.
_OBJECT_STORAGE = "init, event-ingester, upload-worker, state-manager, api, `purge`, `audit`, `verify`, `rebuild`"


def _setting(default: Any, meaning: str, *, used_by: str, without: str | None = None, **rules: Any) -> Any:
    """A setting with what the documentation says of it, in Markdown.

    Args:
        default: the value when it is not set, or what makes it.
        meaning: what it is for.
        used_by: the entrypoints and commands that read it.
        without: what the documentation calls the default, where that is not the value.
        rules: as of pydantic's Field.
    """
    rules["default_factory" if callable(default) else "default"] = default
    return Field(description=meaning, json_schema_extra={"used_by": used_by, "without": without}, **rules)


class Settings(BaseSettings):
    """What the entrypoints need to know of their surroundings.

    `archiver up` and `archiver demo` set whatever is missing for the processes they start.
    An entrypoint that is started by itself asks for what it needs with `require`.
    """

    model_config = SettingsConfigDict(
        env_prefix="ARCHIVER_", extra="ignore", env_ignore_empty=True, hide_input_in_errors=True
    )

    home: AbsolutePath = _setting(
        Path(".archiver"),
        "data, logs and secrets of the embedded services",
        used_by="`up`, `demo`",
        validate_default=True,
    )
    data_dir: AbsolutePath | None = _setting(
        None,
        "holds one directory per imaging system",
        used_by="init, event-ingester, upload-worker, `purge`, `audit`, `mock-microscope`",
        without="embedded: `data` below the home",
    )
    systems: Names = _setting(
        (),
        "the systems that [this host reaches](production.md#which-host-reaches-which-system), `prince,aretha`",
        used_by="init (to check it), event-ingester, upload-worker, `purge`, `audit`",
        without="all",
    )
    staging_dir: AbsolutePath | None = _setting(
        None,
        "holds copies of timesteps, for systems that [stage](#imaging-systems); all that reach such a system must see "
        "the same directory",
        used_by="init, event-ingester, upload-worker, `purge`, `audit`",
        without="embedded: `staging` below the home",
    )
    staging_budget_bytes: int | None = _setting(
        None,
        "all copies together may have so many bytes; a twentieth of their disk stays free in any case",
        used_by="init (to check it), event-ingester",
        ge=0,
    )
    database_url: DatabaseUrl | None = _setting(
        None,
        "PostgreSQL, `postgresql://user:password@host/name`",
        used_by="init, event-ingester (to purge, audit and check the way), state-manager, api, `purge`, `audit`, "
        "`verify`, `backfill`, `rebuild`",
        without="embedded",
    )
    redis_url: RedisUrl | None = _setting(
        None,
        "Redis, `redis://:password@host:port/db`; give Prefect's own messaging another db",
        used_by="all but `ls`, `status`, `fetch`, `verify`, `mock-microscope`",
        without="embedded",
    )
    rabbitmq_url: BrokerUrl | None = _setting(
        None,
        "RabbitMQ that surf-archiver up to 0.1.3 [publishes to](state.md#surf-archiver), `amqp://user:password@host/`; "
        "needs the extra `amqp`",
        used_by="init (to check it), state-manager",
    )
    bucket: str = _setting("timesteps", "the bucket that holds the tars", used_by=_OBJECT_STORAGE)
    webhook_token: SecretStr | None = _setting(
        None,
        "bearer token that surf-archiver must send",
        used_by="init (to check it), api",
        without="embedded: generated",
    )
    api_token: SecretStr | None = _setting(
        None,
        "bearer token that readers of the API must send; without it the API serves its own machine only",
        used_by="init (to check it), api, `ls`, `status`, `fetch`",
    )
    api_host: str = _setting("127.0.0.1", "address the API binds to", used_by="api")
    api_port: int = _setting(
        8000, "port the API binds to", used_by="api", without="`8000`; with `up`, a free one", ge=0, le=65535
    )
    api_url: HttpUrl | None = _setting(
        None,
        "where clients find the API, e.g. `https://archiver.example.org`; "
        "links from the Prefect UI to timesteps begin with it, and where it is `https`, cookies are for TLS only; "
        "without a token, its name is the only one that the API [answers to](api.md#who-may-read), beside `localhost`",
        used_by="`ls`, `status`, `fetch`, upload-worker, api",
        without="`up` sets it for a shell",
    )
    api_root_path: str = _setting(
        "",
        "path below which a reverse proxy has put the API, e.g. `/archiver`, which it takes off; empty for its root",
        used_by="api",
        pattern="^(/[^/]+)*$",
    )
    stream_days: float = _setting(
        90,
        "days after which the stream may forget what [nobody needs any more](state.md#the-stream)",
        used_by="state-manager",
        gt=0,
    )
    log_format: Literal["json", "text"] = _setting(
        "json",
        "of the entrypoints' logs: `json`, one object per line, or `text`",
        used_by="event-ingester, upload-worker, state-manager, api",
    )
    report_block: str | None = _setting(
        None,
        "the Prefect notification block that gets [the daily report](state.md#the-daily-report), and is told when a "
        "[flight check](operating.md#the-flight-check) fails, as `type/name`",
        used_by="init (to check it), event-ingester, state-manager",
        pattern=r"^[a-z0-9-]+/[a-z0-9-]+$",
    )
    consumer: str = _setting(
        socket.gethostname,
        "name under which this process reads the stream, and by which Prefect knows its worker; must be the same after "
        "a restart, and another one on each host",
        used_by="event-ingester, upload-worker, state-manager",
        without="the host's name",
    )
    heartbeat_file: AbsolutePath | None = _setting(
        None,
        "touched every ten seconds by a worker that goes its round; the image's health check looks at its age",
        used_by="event-ingester, upload-worker, state-manager",
    )
    aws_access_key_id: str | None = _setting(
        None,
        "access key of the object storage",
        used_by=_OBJECT_STORAGE,
        without="with `--trial`: embedded",
        validation_alias="AWS_ACCESS_KEY_ID",
    )
    aws_secret_access_key: SecretStr | None = _setting(
        None,
        "its secret",
        used_by=_OBJECT_STORAGE,
        without="with `--trial`: embedded",
        validation_alias="AWS_SECRET_ACCESS_KEY",
    )
    aws_endpoint_url: HttpUrl | None = _setting(
        None,
        "address of the object storage",
        used_by=_OBJECT_STORAGE,
        without="with `--trial`: embedded",
        validation_alias="AWS_ENDPOINT_URL",
    )
    aws_region: str = _setting("us-east-1", "its region", used_by=_OBJECT_STORAGE, validation_alias="AWS_REGION")
    prefect_api_url: HttpUrl | None = _setting(
        None,
        "the Prefect server, `http://host:4200/api`",
        used_by="init, event-ingester, upload-worker, state-manager, api (`/ready`, links), `purge`, `audit`",
        without="embedded",
        validation_alias="PREFECT_API_URL",
    )
    prefect_ui_url: HttpUrl | None = _setting(
        None,
        "where people's browsers find Prefect: for links to flow runs",
        used_by="api",
        without="`PREFECT_API_URL` without `/api`",
        validation_alias="PREFECT_UI_URL",
    )

    @property
    def local_api_url(self) -> str:
        """The address at which this machine reaches the REST gateway."""
        # An address that means "all" is for binding only.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.api_host, self.api_host)  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self.api_port}"

    def reaches(self, system: str) -> bool:
        """Whether the files of an imaging system are to be found below the data directory here."""
        return not self.systems or system in self.systems

    def require(self, *names: str) -> None:
        """Say which of the named settings are not set.

        Raises:
            MissingSetting: with the environment variables to set, all at once.
        """
        missing = [self.variable(name) for name in names if getattr(self, name) is None]
        if missing:
            raise MissingSetting(f"not set: {', '.join(missing)}")

    @classmethod
    def is_read_by(cls, entrypoint: str, name: str) -> bool:
        """Whether an entrypoint reads a setting, as the documentation says."""
        users = cast(dict[str, str], cls.model_fields[name].json_schema_extra)["used_by"]
        named = re.search(rf"(?<![\w-]){entrypoint}(?![\w-])", users) is not None
        return named != users.startswith("all but ")

    @classmethod
    def variable(cls, name: str) -> str:
        """The environment variable of a setting."""
        alias = cls.model_fields[name].validation_alias
        return alias if isinstance(alias, str) else f"ARCHIVER_{name.upper()}"


@cache
def get_settings() -> Settings:
    """The settings of this process, read once.

    Raises:
        InvalidSetting: when one of them makes no sense.
    """
    try:
        return Settings()
    except ValidationError as error:
        names = [str(fault["loc"][0]) for fault in error.errors()]
        variables = [Settings.variable(name) if name in Settings.model_fields else name for name in names]
        faults = (
            f"{name}: {fault['msg'].removeprefix('Value error, ')}"
            for name, fault in zip(variables, error.errors(), strict=True)
        )
        raise InvalidSetting("; ".join(faults)) from None
