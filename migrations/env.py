"""Runs the migrations, for `blocks.database.migrate` and for alembic's own command."""

from alembic import context
from sqlalchemy import Connection
from sqlmodel import SQLModel

import blocks.tallies  # noqa: F401  fills the metadata, with the tables
from blocks.database import create_engine
from blocks.settings import get_settings


def run(connection: Connection) -> None:
    """Run what was asked for, in one transaction."""
    context.configure(connection=connection, target_metadata=SQLModel.metadata)
    with context.begin_transaction():
        context.run_migrations()


if connection := context.config.attributes.get("connection"):
    run(connection)
else:
    with create_engine(get_settings()).begin() as connection:
        run(connection)
