"""The settings of every entrypoint, read from the environment."""

import socket
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from blocks.errors import ArchiverError


class MissingSetting(ArchiverError):
    """A setting that this entrypoint needs is not set; the message names it."""


Url = Annotated[str, AfterValidator(lambda url: url.rstrip("/"))]
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class Settings(BaseSettings):
    """What the entrypoints need to know of their surroundings.

    `archiver up` and `archiver demo` set whatever is missing for the processes they start.
    An entrypoint that is started by itself asks for what it needs with `require`.
    """

    model_config = SettingsConfigDict(env_prefix="ARCHIVER_", extra="ignore", env_ignore_empty=True)

    home: AbsolutePath = Field(Path(".archiver"), validate_default=True, description="Data of the embedded services.")
    data_dir: AbsolutePath | None = Field(None, description="Holds one directory per imaging system.")
    staging_dir: AbsolutePath | None = Field(None, description="Holds copies of timesteps, for systems that stage.")
    database_url: SecretStr | None = Field(None, description="PostgreSQL, as postgresql://user:password@host/name.")
    redis_url: SecretStr | None = Field(None, description="Redis, as redis://:password@host:port/db.")
    rabbitmq_url: SecretStr | None = Field(None, description="RabbitMQ that surf-archiver up to 0.1.3 publishes to.")
    bucket: str = Field("timesteps", description="The bucket that holds the tars.")
    webhook_token: SecretStr | None = Field(None, description="Bearer token surf-archiver must send.")
    api_token: SecretStr | None = Field(None, description="Bearer token readers of the API must send, when set.")
    api_host: str = Field("127.0.0.1", description="Address the API binds to.")
    api_port: int = Field(8000, ge=0, le=65535, description="Port the API binds to.")
    api_url: Url | None = Field(None, description="Where clients find the API, e.g. https://archiver.example.org.")
    api_root_path: str = Field(
        "", pattern="^(/[^/]+)*$", description="Path below which a reverse proxy has put the API, if not at its root."
    )
    stream_days: float = Field(90, gt=0, description="Days after which the stream may forget what nobody needs.")
    consumer: str = Field(
        default_factory=socket.gethostname,
        description="Name under which this process reads the stream; must be the same after a restart.",
    )
    heartbeat_file: AbsolutePath | None = Field(
        None, description="A worker touches it every ten seconds, for a health check; none when not set."
    )
    aws_access_key_id: str | None = Field(None, validation_alias="AWS_ACCESS_KEY_ID")
    aws_secret_access_key: SecretStr | None = Field(None, validation_alias="AWS_SECRET_ACCESS_KEY")
    aws_endpoint_url: Url | None = Field(None, validation_alias="AWS_ENDPOINT_URL")
    aws_region: str = Field("us-east-1", validation_alias="AWS_REGION")
    prefect_api_url: Url | None = Field(None, validation_alias="PREFECT_API_URL")
    prefect_ui_url: Url | None = Field(None, validation_alias="PREFECT_UI_URL")

    def require(self, *names: str) -> None:
        """Say which of the named settings are not set.

        Raises:
            MissingSetting: with the environment variables to set, all at once.
        """
        missing = [self.variable(name) for name in names if getattr(self, name) is None]
        if missing:
            raise MissingSetting(f"not set: {', '.join(missing)}")

    @classmethod
    def variable(cls, name: str) -> str:
        """The environment variable of a setting."""
        alias = cls.model_fields[name].validation_alias
        return alias if isinstance(alias, str) else f"ARCHIVER_{name.upper()}"


@cache
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
