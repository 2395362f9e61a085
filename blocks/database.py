"""The PostgreSQL database: engine and migrations."""

from pathlib import Path
from typing import cast

import psycopg
import sqlmodel
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg.types.array import ListBinaryDumper
from pydantic import SecretStr
from sqlalchemy import Engine, event, func, make_url, select

from blocks.settings import Settings

MIGRATIONS = Path(__file__).parent.parent / "migrations"

# The number of PostgreSQL's advisory lock that lets one process migrate at a time; any will do.
_MIGRATION_LOCK = 7_303_014_001


# A server that is cut off without a word is noticed within half a minute, not after hours.
_CONNECTING = {
    "application_name": "timestep-archiver",
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}


def create_engine(settings: Settings) -> Engine:
    """The connections to the database. Nothing connects before the first use.

    Raises:
        MissingSetting: when ARCHIVER_DATABASE_URL is not set.
    """
    settings.require("database_url")
    url = make_url(cast(SecretStr, settings.database_url).get_secret_value())
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    engine = sqlmodel.create_engine(
        url,
        pool_pre_ping=True,  # PostgreSQL may have been restarted since
        hide_parameters=True,  # so that no value ends up in a log
        connect_args=_CONNECTING,
    )
    event.listen(engine, "connect", _send_lists_in_binary)
    return engine


def _send_lists_in_binary(connection: psycopg.Connection[object], _record: object) -> None:
    # As text, each quote in each document would be escaped, by a regular expression.
    connection.adapters.register_dumper(list, ListBinaryDumper)


def alembic_config() -> Config:
    """What alembic needs to find the migrations."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def migrate(settings: Settings) -> None:
    """Bring the database up to date, in one transaction; no-op where it is.

    Several processes may do so at once: one migrates, the others wait and find it done.
    """
    engine = create_engine(settings)
    config = alembic_config()
    try:
        with engine.begin() as connection:
            connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def pending_migrations(engine: Engine) -> list[str]:
    """The revisions the database still lacks, oldest first. Empty when it is up to date."""
    scripts = ScriptDirectory.from_config(alembic_config())
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    return [script.revision for script in scripts.iterate_revisions("head", current or "base")][::-1]
