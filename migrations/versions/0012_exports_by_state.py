"""Indexes that answer by themselves how many timesteps there are in a time, and how many of them are uploaded."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0012"
down_revision: str | None = "0011"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    """Apply."""
    _renew(["type"], "state in ('uploaded', 'archived')")


def downgrade() -> None:
    """Undo."""
    _renew([], "uploaded_at is not null")


def _renew(included: list[str], is_uploaded: str) -> None:
    for name in ("timestep_by_time", "timestep_exported"):
        op.drop_index(name, "timestep")
    columns = ["timestamp", "id"]
    op.create_index(
        "timestep_by_time", "timestep", columns, postgresql_include=[*included, "state", "image_count", "size"]
    )
    op.create_index(
        "timestep_exported",
        "timestep",
        columns,
        postgresql_include=included or None,
        postgresql_where=sa.text(is_uploaded),
    )
