"""A migration while processes of an older release go on: none of them fails, and none waits for its end.

Whatever a migration adds is covered by itself: what an older release knows is read from the database at its revision.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory
from pydantic import SecretStr
from sqlalchemy.dialects import postgresql

from blocks import database
from blocks.database import (
    MigrationBlocked,
    NewerDatabase,
    alembic_config,
    create_engine,
    migrate,
    pending_migrations,
)
from blocks.settings import Settings

REVISIONS = [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()][::-1]
# No process writes them: PostgreSQL does, by triggers.
KEPT_BY_TRIGGERS = {"timestep_tally", "position_tally", "event_tally"}


class OldRelease:
    """What processes of a release do that knows the tables as they are now."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        known = sa.MetaData()
        known.reflect(engine)
        self.tables = [table for table in known.sorted_tables if table.name != "alembic_version"]
        self.written: list[UUID] = []

    def write(self, connection: sa.Connection) -> None:
        """Insert a row into every table, as if it were there already, and change it."""
        id = uuid4()
        for table in self.tables:
            if table.name in KEPT_BY_TRIGGERS:
                continue
            row = {column.name: _value(column, id) for column in table.columns if column.computed is None}
            keys = [column.name for column in table.primary_key]
            rest = {name: value for name, value in row.items() if name not in keys}
            insert = postgresql.insert(table).values(row)
            connection.execute(insert.on_conflict_do_update(index_elements=keys, set_=rest))
            for unique in (one for one in table.constraints if isinstance(one, sa.UniqueConstraint)):
                connection.execute(insert.on_conflict_do_nothing(index_elements=list(unique.columns)))
            connection.execute(sa.update(table).where(*(table.c[key] == row[key] for key in keys)).values(rest))
        self.written.append(id)

    def read(self, connection: sa.Connection) -> dict[str, int]:
        """Read every column of every table; the number of rows in each."""
        return {table.name: len(connection.execute(table.select()).all()) for table in self.tables}

    @contextmanager
    def at_work(self) -> Iterator[Callable[[int], None]]:
        """Write and read all the time; gives what waits for so many more rounds, and raises what went wrong."""
        stop = threading.Event()
        errors: list[Exception] = []

        def work() -> None:
            try:
                while not stop.is_set():
                    with self._engine.begin() as connection:
                        self.write(connection)
                        self.read(connection)
                    time.sleep(0.1)
            except Exception as error:
                errors.append(error)

        def goes_on(rounds: int) -> None:
            wanted = len(self.written) + rounds
            _wait(lambda: bool(errors) or len(self.written) >= wanted, f"{rounds} more rounds")
            assert errors == []

        worker = threading.Thread(target=work)
        worker.start()
        try:
            yield goes_on
            goes_on(1)
        finally:
            stop.set()
            worker.join(60)


def _value(column: sa.Column[Any], id: UUID) -> Any:
    """Something a column takes, and no other round gives it."""
    values: dict[type, Any] = {
        UUID: id,
        str: str(id)[: getattr(column.type, "length", None) or 36],
        int: 1,
        float: 1.0,
        bool: True,
        dict: {},
        datetime: datetime.now(UTC),
    }
    kind = column.type.python_type
    return values[kind] if kind in values else datetime.now(UTC).date()


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within a minute"
        time.sleep(0.02)


@pytest.fixture
def at_revision(empty_database_url: str) -> Callable[[str], Settings]:
    """Brings an empty database to a revision."""
    settings = Settings(database_url=SecretStr(empty_database_url))

    def upgrade(revision: str) -> Settings:
        engine, config = create_engine(settings), alembic_config()
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
        engine.dispose()
        return settings

    return upgrade


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_PAUSE_SECONDS", 0.2)


@pytest.mark.long
@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_an_older_release_goes_on_while_its_database_is_migrated(
    at_revision: Callable[[str], Settings], caplog: pytest.LogCaptureFixture, revision: str
) -> None:
    caplog.set_level(logging.WARNING, database.__name__)
    settings = at_revision(revision)
    engine = create_engine(settings)
    old = OldRelease(engine)
    migration = threading.Thread(target=migrate, args=[settings])
    with old.at_work() as goes_on:
        goes_on(6)  # the sixth time, psycopg would have prepared its statements
        with engine.connect() as slow:
            old.write(slow)
            migration.start()
            _wait(lambda: "The migration gave way" in caplog.text, "a migration that gives way")
            goes_on(3)
            assert pending_migrations(engine) != []
            slow.commit()
        migration.join(60)
        assert pending_migrations(engine) == []
        goes_on(6)
    with engine.connect() as connection:
        counts = old.read(connection)
        assert {counts[table.name] for table in old.tables if table.name not in KEPT_BY_TRIGGERS} == {len(old.written)}
    engine.dispose()


def test_no_transaction_is_ended_because_a_migration_waits_for_it(at_revision: Callable[[str], Settings]) -> None:
    settings = at_revision(REVISIONS[0])
    engine = create_engine(settings)
    migration = threading.Thread(target=migrate, args=[settings])
    with engine.connect() as short, engine.connect() as slow, engine.connect() as looking:
        short.execute(sa.text("lock table archive_member in row exclusive mode"))
        slow.execute(sa.text("lock table timestep_image in row exclusive mode"))
        migration.start()
        waiting = sa.text("select count(*) from pg_locks where relation = 'archive_member'::regclass and not granted")
        _wait(lambda: bool(looking.execute(waiting).scalar_one()), "a migration that waits")
        # Its second wait begins after that of the slow one, which therefore is the first that PostgreSQL looks at.
        threading.Timer(0.6, short.rollback).start()
        slow.execute(sa.text("select * from archive"))
        slow.rollback()
    migration.join(60)
    assert pending_migrations(engine) == []
    engine.dispose()


def test_who_keeps_a_migration_waiting_is_told(
    at_revision: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BLOCKED_SECONDS", 0.0)
    settings = at_revision(REVISIONS[0])
    engine = create_engine(settings)
    with engine.connect() as slow:
        OldRelease(engine).write(slow)
        pid = slow.execute(sa.text("select pg_backend_pid()")).scalar_one()
        with pytest.raises(MigrationBlocked, match=rf"because of timestep-archiver \(process {pid}, for \d+ s\)"):
            migrate(settings)
    migrate(settings)
    assert pending_migrations(engine) == []
    engine.dispose()


def test_a_database_of_a_newer_release_is_used_but_not_migrated(at_revision: Callable[[str], Settings]) -> None:
    settings = at_revision("head")
    engine = create_engine(settings)
    with engine.begin() as connection:
        connection.execute(sa.text("update alembic_version set version_num = '9999'"))
    assert pending_migrations(engine) == []
    with pytest.raises(NewerDatabase, match="restore the backup from before"):
        migrate(settings)
    engine.dispose()


def test_revisions_are_one_line() -> None:
    scripts = ScriptDirectory.from_config(alembic_config())
    assert [
        (older, newer)
        for older, newer in itertools.pairwise(REVISIONS)
        if scripts.get_revision(newer).down_revision != older
    ] == []
