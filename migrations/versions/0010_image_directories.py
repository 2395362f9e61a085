"""Whose images a directory holds, and which timesteps may be purged, found without reading them all."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    """Apply."""
    # In the order of their bytes, so that all that is below a directory stands together.
    op.alter_column("timestep", "image_dir", type_=sa.String(collation="C"))
    op.create_index("timestep_by_image_dir", "timestep", ["system", "image_dir"])
    op.create_index(
        "timestep_purgeable",
        "timestep",
        ["system", "uploaded_at", "id"],
        postgresql_where=sa.text("uploaded_at is not null and source_purged_at is null"),
    )


def downgrade() -> None:
    """Undo."""
    op.drop_index("timestep_purgeable", "timestep")
    op.drop_index("timestep_by_image_dir", "timestep")
    op.alter_column("timestep", "image_dir", type_=sa.String())
