"""An index that answers what happened lately: what was taken in, uploaded and deleted in a day."""

from collections.abc import Sequence

from alembic import op

revision: str = "0007"
down_revision: str | None = "0004"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    """Apply."""
    op.create_index("event_by_type", "timestep_event", ["type", "time"])


def downgrade() -> None:
    """Undo."""
    op.drop_index("event_by_type", table_name="timestep_event")
