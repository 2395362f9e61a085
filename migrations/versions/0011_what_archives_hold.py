"""What the timesteps in an archive are of, kept by PostgreSQL; and kinds of an experiment's timesteps by time."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0011"
down_revision: str | None = "0010"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

# Once per statement, from either side: an object may be reported to be on tape before its upload is known.
# Nothing is taken back: an archive that held such a timestep once is looked into, no more.
_HOLD = """
create function hold_{side}s() returns trigger language plpgsql as $$
begin
    insert into archive_holding as held (archive_id, experiment_id, system, type, first, last)
    select archive_id, experiment_id, system, type, min(timestamp), max(timestamp)
    from {come} group by archive_id, experiment_id, system, type
    on conflict (archive_id, experiment_id, system, type) do update set
        first = least(held.first, excluded.first), last = greatest(held.last, excluded.last)
    where (held.first, held.last) is distinct from
        (least(held.first, excluded.first), greatest(held.last, excluded.last));
    return null;
end $$
"""

_SIDES = {
    "member": "come join timestep on timestep.key = come.key",
    "timestep": "come join archive_member on archive_member.key = come.key",
}

_TRIGGERS = """
create trigger held_inserted after insert on archive_member referencing new table as come
    for each statement execute function hold_members();
create trigger held_inserted after insert on timestep referencing new table as come
    for each statement execute function hold_timesteps();
create trigger held_updated after update on timestep referencing old table as gone new table as come
    for each statement execute function hold_timesteps();
insert into archive_holding
    select archive_id, experiment_id, system, type, min(timestamp), max(timestamp)
    from archive_member join timestep on timestep.key = archive_member.key
    group by archive_id, experiment_id, system, type
"""

_BY_TIME = "timestep_by_experiment_and_time"
_INCLUDED = ["system", "type", "state"]


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "archive_holding",
        sa.Column("archive_id", sa.Uuid(), sa.ForeignKey("archive.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("experiment_id", sa.String(), primary_key=True),
        sa.Column("system", sa.String(), primary_key=True),
        sa.Column("type", sa.String(16), primary_key=True),
        sa.Column("first", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("archive_holding_by_experiment", "archive_holding", ["experiment_id"])
    for side, come in _SIDES.items():
        op.execute(_HOLD.format(side=side, come=come))
    for statement in _TRIGGERS.split(";"):
        op.execute(statement)
    op.drop_index(_BY_TIME, "timestep")
    op.create_index(_BY_TIME, "timestep", ["experiment_id", "timestamp", "id"], postgresql_include=_INCLUDED)


def downgrade() -> None:
    """Undo."""
    op.drop_index(_BY_TIME, "timestep")
    op.create_index(_BY_TIME, "timestep", ["experiment_id", "timestamp", "id"])
    for side in _SIDES:
        op.execute(f"drop function hold_{side}s() cascade")
    op.drop_table("archive_holding")
