"""The PostgreSQL database: engine and migrations."""

import logging
import time
from pathlib import Path
from typing import cast

import psycopg
import sqlmodel
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg.errors import DeadlockDetected, QueryCanceled
from psycopg.types.array import ListBinaryDumper
from pydantic import SecretStr
from pydantic_core import to_json
from sqlalchemy import Connection, Engine, event, func, inspect, make_url, select, text
from sqlalchemy.exc import OperationalError

from blocks.errors import ArchiverError
from blocks.settings import Settings

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent.parent / "migrations"

# A migration waits so long for all its locks, lets the others go on, and tries again until it is given up.
# Less than the second (deadlock_timeout) after which PostgreSQL would end one of two that block each other: the other.
_LOCKS_MILLISECONDS = 800
_PAUSE_SECONDS = 1.0
_BLOCKED_SECONDS = 600.0

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
    # A statement that was prepared fails for as long as its connection lives, once a migration has changed a type.
    "prepare_threshold": None,
}


class MigrationBlocked(ArchiverError):
    """Other transactions keep a migration from its locks; the message says whose."""


class NewerDatabase(ArchiverError):
    """A newer release has migrated the database, and this one can't."""


def create_engine(settings: Settings, *, wait_seconds: float = 30.0) -> Engine:
    """The connections to the database. Nothing connects before the first use.

    Args:
        wait_seconds: for a connection while all are taken.

    Raises:
        MissingSetting: when ARCHIVER_DATABASE_URL is not set.
    """
    settings.require("database_url")
    url = make_url(cast(SecretStr, settings.database_url).get_secret_value())
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    engine = sqlmodel.create_engine(
        url,
        pool_timeout=wait_seconds,
        pool_pre_ping=True,  # PostgreSQL may have been restarted since
        hide_parameters=True,  # so that no value ends up in a log
        json_serializer=_to_json,
        connect_args=_CONNECTING,
    )
    event.listen(engine, "connect", _send_lists_in_binary)
    return engine


def _to_json(value: object) -> str:
    return to_json(value).decode()


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

    Several processes may do so at once: one migrates, the others wait and find it done. Processes of the release
    before go on meanwhile: a migration does not queue for long behind a transaction that has a table locked, because
    everybody else would queue behind the migration. It gives way, and tries again.

    Raises:
        MigrationBlocked: when it did not get its locks within ten minutes; the message says who has them.
        NewerDatabase: when a newer release has migrated the database.
    """
    engine = create_engine(settings)
    deadline = time.monotonic() + _BLOCKED_SECONDS
    try:
        while not _migrated(engine):
            if time.monotonic() > deadline:
                raise MigrationBlocked(f"the migration can't get its locks, because of {_holders(engine)}")
            logger.warning("The migration gave way to other transactions, and tries again: %s", _holders(engine))
            time.sleep(_PAUSE_SECONDS)
    finally:
        engine.dispose()


def _migrated(engine: Engine) -> bool:
    """Try once; False when it did not get a lock in time, or it and others blocked each other."""
    config = alembic_config()
    try:
        with engine.begin() as connection:
            connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            if _is_newer(connection):
                raise NewerDatabase(
                    "a newer release has migrated the database: run that one, or restore the backup from before"
                )
            if _pending(connection):
                _lock_tables(connection)
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
    except OperationalError as error:
        if isinstance(error.orig, QueryCanceled | DeadlockDetected):
            return False
        raise
    return True


def _lock_tables(connection: Connection) -> None:
    """Take every table before anything else, within one time limit.

    A migration that waited for each table as it came to it could block, and be blocked by, a transaction that has
    waited for longer: PostgreSQL would end that one.
    """
    tables = sorted(inspect(connection).get_table_names())
    if not tables:
        return
    quoted = ", ".join(map(connection.dialect.identifier_preparer.quote, tables))
    connection.execute(select(func.set_config("statement_timeout", f"{_LOCKS_MILLISECONDS}ms", True)))
    connection.execute(text(f"lock table {quoted} in access exclusive mode"))
    connection.execute(text("set local statement_timeout to default"))


def _holders(engine: Engine) -> str:
    """The transactions that have been open for longest, as an operator finds them."""
    with engine.connect() as connection:
        rows = connection.execute(text(_LONGEST_TRANSACTIONS)).all()
    return ", ".join(f"{name or 'a client'} (process {pid}, for {seconds:.0f} s)" for name, pid, seconds in rows) or "?"


_LONGEST_TRANSACTIONS = """
    select application_name, pid, extract(epoch from now() - xact_start) from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid() and xact_start is not null
    order by xact_start limit 3
"""


def pending_migrations(engine: Engine) -> list[str]:
    """The revisions the database still lacks, oldest first.

    Empty when it is up to date, or when a newer release has migrated it: that one leaves in place what this one uses.
    """
    with engine.connect() as connection:
        return [] if _is_newer(connection) else _pending(connection)


def _pending(connection: Connection) -> list[str]:
    scripts = ScriptDirectory.from_config(alembic_config())
    current = MigrationContext.configure(connection).get_current_revision()
    return [script.revision for script in scripts.iterate_revisions("head", current or "base")][::-1]


def _is_newer(connection: Connection) -> bool:
    """Whether the database is at a revision that this release does not know."""
    current = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}
    return current is not None and current not in known
