"""What a rejected event file announces, where it could be read: lists can be narrowed down to it."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

_REJECTED = sa.table(
    "rejected_event_file",
    sa.column("id"),
    *(sa.column(name) for name in ("experiment_id", "position", "type", "timestamp")),
)


def upgrade() -> None:
    """Apply."""
    op.add_column("rejected_event_file", sa.Column("experiment_id", sa.String()))
    op.add_column("rejected_event_file", sa.Column("position", sa.Integer()))
    op.add_column("rejected_event_file", sa.Column("type", sa.String(16)))
    op.add_column("rejected_event_file", sa.Column("timestamp", sa.DateTime(timezone=True)))
    _fill(op.get_bind())


def _fill(connection: sa.Connection) -> None:
    """From the history. In Python, because PostgreSQL takes nothing out of JSON with a \\u0000 in it."""
    said = "select id, data from timestep_event where id in (select id from rejected_event_file)"
    for id, data in connection.execute(sa.text(said)).all():
        if event := data.get("event"):
            announced = {name: event[name] for name in ("experiment_id", "position", "timestamp")}
            row = sa.update(_REJECTED).where(_REJECTED.c.id == id)
            connection.execute(row.values(type=event["event_type"], **announced))


def downgrade() -> None:
    """Undo."""
    for name in ("timestamp", "type", "position", "experiment_id"):
        op.drop_column("rejected_event_file", name)
