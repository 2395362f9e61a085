"""Timesteps with their images and history, archives, rejected event files."""

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def _time(name: str, *, nullable: bool = False) -> sa.Column[datetime]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "timestep",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column(
            "state",
            sa.String(16),
            sa.Computed(
                """
                case when uploaded_at is not null and archived_at is not null then 'archived'
                     when uploaded_at is not null then 'uploaded'
                     when failed_at is not null then 'failed'
                     else 'ingested' end
                """,
                persisted=True,
            ),
            nullable=False,
        ),
        sa.Column("system", sa.String(), nullable=False),
        sa.Column("experiment_id", sa.String(), nullable=False),
        sa.Column("plate", sa.Integer(), nullable=False),
        sa.Column("cross_date", sa.Date(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("type", sa.String(16), nullable=False),
        _time("timestamp"),
        sa.Column("image_count", sa.Integer(), nullable=False),
        sa.Column("image_dir", sa.String(), nullable=False),
        sa.Column("announced", sa.JSON(), nullable=False),
        sa.Column("event_file", sa.String()),
        _time("ingested_at", nullable=True),
        _time("uploaded_at", nullable=True),
        _time("archived_at", nullable=True),
        _time("failed_at", nullable=True),
        sa.Column("failed_stage", sa.String()),
        sa.Column("failed_reason", sa.String()),
        sa.Column("failed_flow_run_id", sa.Uuid()),
        sa.Column("bucket", sa.String()),
        sa.Column("key", sa.String()),
        sa.Column("size", sa.BigInteger()),
        sa.Column("etag", sa.String()),
        sa.Column("sha256", sa.String()),
        sa.Column("layout_digest", sa.String()),
        _time("upload_started_at", nullable=True),
        _time("verified_at", nullable=True),
        sa.Column("checks", sa.JSON()),
    )
    op.create_index("timestep_by_time", "timestep", ["timestamp", "id"])
    op.create_index("timestep_by_system", "timestep", ["system", "timestamp", "id"])
    op.create_index("timestep_by_experiment", "timestep", ["experiment_id", "position", "timestamp", "id"])
    op.create_index("timestep_by_experiment_and_time", "timestep", ["experiment_id", "timestamp", "id"])
    op.create_index("timestep_by_state", "timestep", ["state", "timestamp", "id"])
    op.create_index(
        "timestep_exported", "timestep", ["timestamp", "id"], postgresql_where=sa.text("uploaded_at is not null")
    )
    op.create_index(
        "timestep_at_risk",
        "timestep",
        ["uploaded_at", "id"],
        postgresql_where=sa.text("uploaded_at is not null and archived_at is null"),
    )
    op.create_index("timestep_by_key", "timestep", ["key"], postgresql_where=sa.text("key is not null"))

    op.create_table(
        "timestep_image",
        sa.Column("timestep_id", sa.Uuid(), sa.ForeignKey("timestep.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
    )

    op.create_table(
        "timestep_event",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column("entry_id", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        _time("time"),
        sa.Column("timestep_id", sa.Uuid()),
        sa.Column("system", sa.String()),
        sa.Column("event_file", sa.String()),
        sa.Column("key", sa.String()),
        sa.Column("data", sa.JSON(), nullable=False),
    )
    op.create_index(
        "event_of_timestep",
        "timestep_event",
        ["timestep_id", "time", "id"],
        postgresql_where=sa.text("timestep_id is not null"),
    )
    op.create_index(
        "event_of_file",
        "timestep_event",
        ["system", "event_file"],
        postgresql_where=sa.text("event_file is not null"),
    )
    op.create_index("event_of_key", "timestep_event", ["key"], postgresql_where=sa.text("key is not null"))

    op.create_table(
        "archive",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column("path", sa.String(), nullable=False, unique=True),
        sa.Column("date", sa.Date(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        _time("archived_at"),
    )
    op.create_index("archive_by_time", "archive", ["archived_at", "id"])

    op.create_table(
        "archive_member",
        sa.Column("archive_id", sa.Uuid(), sa.ForeignKey("archive.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.String(), primary_key=True, index=True),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        _time("archived_at"),
    )

    op.create_table(
        "rejected_event_file",
        sa.Column("system", sa.String(), primary_key=True),
        sa.Column("event_file", sa.String(), primary_key=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("timestep_id", sa.Uuid()),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        _time("rejected_at"),
    )
    op.create_index("rejected_by_time", "rejected_event_file", ["rejected_at", "id"])


def downgrade() -> None:
    """Undo."""
    for table in (
        "rejected_event_file",
        "archive_member",
        "archive",
        "timestep_event",
        "timestep_image",
        "timestep",
    ):
        op.drop_table(table)
