"""What there is of each position of an experiment, kept by PostgreSQL; and an index for a type that is rare."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

# Once per statement. Most updates tell how far a timestep has come, which changes nothing here.
_TALLY_POSITIONS = """
create function tally_positions() returns trigger language plpgsql as $$
begin
    if tg_op = 'TRUNCATE' then
        delete from position_tally;
    elsif tg_op = 'INSERT' then
        insert into position_tally as tally (experiment_id, position, system, type, timesteps)
        select experiment_id, position, system, type, count(*)
        from come group by experiment_id, position, system, type
        on conflict (experiment_id, position, system, type) do update set
            timesteps = tally.timesteps + excluded.timesteps;
    elsif tg_op = 'UPDATE' then
        insert into position_tally as tally (experiment_id, position, system, type, timesteps)
        select experiment_id, position, system, type, sum(change)
        from (
            select experiment_id, position, system, type, 1 as change from come
            union all select experiment_id, position, system, type, -1 from gone
        ) as changes
        group by experiment_id, position, system, type having sum(change) <> 0
        on conflict (experiment_id, position, system, type) do update set
            timesteps = tally.timesteps + excluded.timesteps;
    else
        update position_tally as tally set timesteps = tally.timesteps - lost.timesteps
        from (
            select experiment_id, position, system, type, count(*) as timesteps
            from gone group by experiment_id, position, system, type
        ) as lost
        where (tally.experiment_id, tally.position, tally.system, tally.type)
            = (lost.experiment_id, lost.position, lost.system, lost.type);
    end if;
    return null;
end $$
"""

_TRIGGERS = """
create trigger positions_inserted after insert on timestep referencing new table as come
    for each statement execute function tally_positions();
create trigger positions_updated after update on timestep referencing old table as gone new table as come
    for each statement execute function tally_positions();
create trigger positions_deleted after delete on timestep referencing old table as gone
    for each statement execute function tally_positions();
create trigger positions_truncated after truncate on timestep
    for each statement execute function tally_positions();
insert into position_tally
    select experiment_id, position, system, type, count(*)
    from timestep group by experiment_id, position, system, type
"""


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "position_tally",
        sa.Column("experiment_id", sa.String(), primary_key=True),
        sa.Column("position", sa.Integer(), primary_key=True),
        sa.Column("system", sa.String(), primary_key=True),
        sa.Column("type", sa.String(16), primary_key=True),
        sa.Column("timesteps", sa.BigInteger(), nullable=False),
    )
    for statement in (_TALLY_POSITIONS, *_TRIGGERS.split(";")):
        op.execute(statement)
    op.create_index("timestep_by_type", "timestep", ["type", "timestamp", "id"])


def downgrade() -> None:
    """Undo."""
    op.drop_index("timestep_by_type", "timestep")
    op.execute("drop function tally_positions() cascade")
    op.drop_table("position_tally")
