"""Tallies that PostgreSQL keeps itself, and days and experiments from an index alone."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

# Once per statement, whatever number of rows it changes. A row that became another counts once for what it is
# and is taken off from what it was.
_TALLY_TIMESTEPS = """
create function tally_timesteps() returns trigger language plpgsql as $$
begin
    if tg_op = 'TRUNCATE' then
        delete from timestep_tally;
        return null;
    end if;
    if tg_op <> 'DELETE' then
        insert into timestep_tally as tally (experiment_id, system, type, state, timesteps, images, bytes)
        select experiment_id, system, type, state, count(*), sum(image_count), coalesce(sum(size), 0)
        from come group by experiment_id, system, type, state
        on conflict (experiment_id, system, type, state) do update set
            timesteps = tally.timesteps + excluded.timesteps,
            images = tally.images + excluded.images,
            bytes = tally.bytes + excluded.bytes;
    end if;
    if tg_op <> 'INSERT' then
        update timestep_tally as tally set
            timesteps = tally.timesteps - lost.timesteps,
            images = tally.images - lost.images,
            bytes = tally.bytes - lost.bytes
        from (
            select experiment_id, system, type, state, count(*) as timesteps, sum(image_count) as images,
                coalesce(sum(size), 0) as bytes
            from gone group by experiment_id, system, type, state
        ) as lost
        where (tally.experiment_id, tally.system, tally.type, tally.state)
            = (lost.experiment_id, lost.system, lost.type, lost.state);
    end if;
    return null;
end $$
"""

# The history is only added to, or a row is replaced by one of the same event.
_TALLY_EVENTS = """
create function tally_events() returns trigger language plpgsql as $$
begin
    if tg_op = 'TRUNCATE' then
        delete from event_tally;
        return null;
    end if;
    insert into event_tally as tally (type, events) select type, count(*) from come group by type
    on conflict (type) do update set events = tally.events + excluded.events;
    return null;
end $$
"""

_TRIGGERS = """
create trigger tally_inserted after insert on timestep referencing new table as come
    for each statement execute function tally_timesteps();
create trigger tally_updated after update on timestep referencing old table as gone new table as come
    for each statement execute function tally_timesteps();
create trigger tally_deleted after delete on timestep referencing old table as gone
    for each statement execute function tally_timesteps();
create trigger tally_truncated after truncate on timestep
    for each statement execute function tally_timesteps();
create trigger tally_inserted after insert on timestep_event referencing new table as come
    for each statement execute function tally_events();
create trigger tally_truncated after truncate on timestep_event
    for each statement execute function tally_events();
"""

_FILL = """
insert into timestep_tally
    select experiment_id, system, type, state, count(*), sum(image_count), coalesce(sum(size), 0)
    from timestep group by experiment_id, system, type, state;
insert into event_tally select type, count(*) from timestep_event group by type;
"""

_INDEXES: Sequence[tuple[str, list[str], list[str]]] = (
    ("timestep_by_time", ["timestamp", "id"], []),
    ("timestep_by_experiment", ["experiment_id", "position", "timestamp", "id"], ["system", "type"]),
)


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "timestep_tally",
        sa.Column("experiment_id", sa.String(), primary_key=True),
        sa.Column("system", sa.String(), primary_key=True),
        sa.Column("type", sa.String(16), primary_key=True),
        sa.Column("state", sa.String(16), primary_key=True),
        sa.Column("timesteps", sa.BigInteger(), nullable=False),
        sa.Column("images", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "event_tally",
        sa.Column("type", sa.String(), primary_key=True),
        sa.Column("events", sa.BigInteger(), nullable=False),
    )
    for statement in (_TALLY_TIMESTEPS, _TALLY_EVENTS, *filter(str.strip, f"{_TRIGGERS}{_FILL}".split(";"))):
        op.execute(statement)
    for name, columns, more in _INDEXES:
        op.drop_index(name, "timestep")
        op.create_index(name, "timestep", columns, postgresql_include=[*more, "state", "image_count", "size"])


def downgrade() -> None:
    """Undo."""
    for name, columns, _ in _INDEXES:
        op.drop_index(name, "timestep")
        op.create_index(name, "timestep", columns)
    op.execute("drop function tally_timesteps() cascade")
    op.execute("drop function tally_events() cascade")
    op.drop_table("event_tally")
    op.drop_table("timestep_tally")
