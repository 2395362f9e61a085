"""Images are written in bulk: no look-up of the timestep for each, and names that sort by their bytes."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

FOREIGN_KEY = "timestep_image_timestep_id_fkey"


def upgrade() -> None:
    """Apply."""
    op.drop_constraint(FOREIGN_KEY, "timestep_image")
    op.alter_column("timestep_image", "name", type_=sa.String(collation="C"))


def downgrade() -> None:
    """Undo."""
    op.alter_column("timestep_image", "name", type_=sa.String(collation="default"))
    op.create_foreign_key(FOREIGN_KEY, "timestep_image", "timestep", ["timestep_id"], ["id"], ondelete="CASCADE")
