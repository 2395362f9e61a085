"""When a timestep's files were deleted from its source and from staging."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

EVENTS = {"source_purged_at": "timestep.source-purged", "staging_purged_at": "timestep.staging-purged"}


def upgrade() -> None:
    """Apply."""
    events = sa.table("timestep_event", sa.column("timestep_id"), sa.column("type"), sa.column("time"))
    for name, type in EVENTS.items():
        op.add_column("timestep", sa.Column(name, sa.DateTime(timezone=True)))
        # A version that did not know the column may have kept the events.
        timestep = sa.table("timestep", sa.column("id"), sa.column(name))
        at = sa.select(sa.func.max(events.c.time)).where(events.c.timestep_id == timestep.c.id, events.c.type == type)
        op.execute(
            sa.update(timestep)
            .where(timestep.c.id.in_(sa.select(events.c.timestep_id).where(events.c.type == type)))
            .values({name: at.scalar_subquery()})
        )


def downgrade() -> None:
    """Undo."""
    for name in EVENTS:
        op.drop_column("timestep", name)
