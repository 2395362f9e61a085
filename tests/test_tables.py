"""The tables and their migrations on PostgreSQL."""

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import SecretStr
from sqlalchemy import Engine, inspect, text
from sqlmodel import Session, SQLModel, select

from blocks.database import alembic_config, create_engine, migrate, pending_migrations
from blocks.settings import MissingSetting, Settings
from blocks.tables import Timestep, TimestepState
from flows.apply import apply_events
from migrations import versions
from tests.events import NOON, announced, archived, delivered, failed, ingested, purged, rejected, said, uploaded


def test_the_migrations_make_what_the_tables_say(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, SQLModel.metadata) == []


def test_migrations_have_numbers_of_their_own_and_stand_in_a_row() -> None:
    # Alembic only warns of two with one number, and forgets one of them.
    files = sorted(path.name for path in Path(versions.__file__).parent.glob("[0-9]*.py"))
    scripts = ScriptDirectory.from_config(alembic_config()).walk_revisions()
    assert [f"{script.revision}_" for script in scripts][::-1] == [file[:5] for file in files]


def test_migrations_go_down_and_up_again_with_data_in_the_tables(settings: Settings, engine: Engine) -> None:
    event = announced()
    entries = delivered(said(ingested(event)), said(uploaded(event), 5))
    config = alembic_config()
    for _ in range(2):
        with Session(engine) as session, session.begin():
            apply_events(session, entries)
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, "base")
        assert inspect(engine).get_table_names() == ["alembic_version"]
        assert pending_migrations(engine)[0] == "0001"
        migrate(settings)
        assert pending_migrations(engine) == []
    with Session(engine) as session:
        assert session.exec(select(Timestep)).all() == []


def test_what_a_migration_adds_is_filled_from_the_history(engine: Engine) -> None:
    """Down to the first migration and up again, with data in the tables all the time."""
    kept, gone = announced(position=1), announced(position=2)
    entries = delivered(
        said(uploaded(kept)),
        said(ingested(gone)),
        said(uploaded(gone), 5),
        said(purged(gone), 7),
        said(purged(gone, run=2), 9),
        said(archived(kept.key), 9),
        said(rejected("events/nul.json", event=announced(metadata={"nul": "\0"})), 10),
        said(rejected("events/unreadable.json"), 11),
    )
    with Session(engine) as session, session.begin():
        apply_events(session, entries)
    before = all_rows(engine)
    assert len(before["timestep"]) == 2
    assert len(before["archive_holding"]) == 1
    config = alembic_config()
    for revision in ("0001", "head"):
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, revision) if revision != "head" else command.upgrade(config, revision)
    assert all_rows(engine) == before


def all_rows(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    with engine.connect() as connection:
        return {
            table.name: sorted(map(dict, connection.execute(table.select()).mappings()), key=str)
            for table in SQLModel.metadata.sorted_tables
        }


def test_several_processes_may_migrate_at_once(empty_database_url: str) -> None:
    settings = Settings(database_url=SecretStr(empty_database_url))
    errors: list[Exception] = []

    def run() -> None:
        try:
            migrate(settings)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert pending_migrations(create_engine(settings)) == []


def test_the_address_is_required_and_its_password_is_not_shown() -> None:
    with pytest.raises(MissingSetting, match="ARCHIVER_DATABASE_URL"):
        create_engine(Settings(database_url=None))
    engine = create_engine(Settings(database_url=SecretStr("postgres://archiver:pa55word@db.example/archiver")))
    assert engine.dialect.driver == "psycopg"
    assert "pa55word" not in repr(engine)


@pytest.mark.parametrize("is_uploaded", [False, True])
@pytest.mark.parametrize("is_archived", [False, True])
@pytest.mark.parametrize("is_failed", [False, True])
def test_the_state_follows_from_the_facts(
    engine: Engine, is_uploaded: bool, is_archived: bool, is_failed: bool
) -> None:
    event = announced(timestamp=NOON + timedelta(hours=1))
    with Session(engine) as session, session.begin():
        apply_events(session, delivered(said(ingested(event))))
    with Session(engine) as session, session.begin():
        timestep = session.exec(select(Timestep)).one()
        assert timestep.state is TimestepState.INGESTED
        timestep.uploaded_at = NOON if is_uploaded else None
        timestep.archived_at = NOON if is_archived else None
        timestep.failed_at = NOON if is_failed else None
    with Session(engine) as session:
        state = session.exec(select(Timestep.state)).one()
    if is_uploaded:
        assert state is (TimestepState.ARCHIVED if is_archived else TimestepState.UPLOADED)
    else:
        assert state is (TimestepState.FAILED if is_failed else TimestepState.INGESTED)


def test_tallies_agree_with_what_they_count(engine: Engine) -> None:
    events = [announced(position=number, experiment_id=f"20261101_00{number % 2}") for number in range(6)]
    rounds = [
        [said(ingested(event), 1) for event in events],
        [said(failed(event), 2) for event in events[:4]] + [said(uploaded(events[4]), 2)],
        [said(uploaded(event, size=1000), 3) for event in events[1:3]] + [said(failed(events[0], attempt=2), 3)],
        # Delivered again, said earlier than it was known, and announced as something else.
        [said(ingested(events[0]), 0), said(uploaded(event := announced(event_type="video", plate=9)), 4)],
        [said(archived(event.key), 5) for event in (events[1], events[2], events[5])],
        [said(uploaded(events[5]), 6), said(ingested(event, system="aretha"), 6)],
    ]
    for events_said in rounds:
        for entry in delivered(*events_said):
            with Session(engine) as session, session.begin():
                apply_events(session, [entry, entry])
        assert_tallies_agree(engine)
    with engine.begin() as connection:
        connection.execute(text("delete from timestep where type = 'video'"))
    assert_tallies_agree(engine)
    with engine.begin() as connection:
        connection.execute(text("truncate timestep, timestep_event cascade"))
    assert_tallies_agree(engine)


def assert_tallies_agree(engine: Engine) -> None:
    counted = """select experiment_id, system, type, state, count(*), sum(image_count), coalesce(sum(size), 0)
        from timestep group by 1, 2, 3, 4"""
    positions = "select experiment_id, position, system, type, count(*) from timestep group by 1, 2, 3, 4"
    events = "select type, count(*) from timestep_event group by 1"
    with engine.connect() as connection:
        for table, rows in (
            ("timestep_tally where timesteps <> 0", counted),
            ("position_tally where timesteps <> 0", positions),
            ("event_tally", events),
        ):
            kept = connection.execute(text(f"select * from {table}"))
            assert sorted(kept) == sorted(connection.execute(text(rows)))
        # Of an archive it may say more than there is.
        held = """select archive_id, experiment_id, system, type, min(timestamp), max(timestamp)
            from archive_member join timestep on timestep.key = archive_member.key group by 1, 2, 3, 4"""
        kept = connection.execute(text("select * from archive_holding"))
        ranges = {tuple(row[:4]): tuple(row[4:]) for row in kept}
        for *of, first, last in connection.execute(text(held)):
            assert ranges[tuple(of)][0] <= first <= last <= ranges[tuple(of)][1]
