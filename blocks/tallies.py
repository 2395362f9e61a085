"""The tables that PostgreSQL keeps by itself, by triggers: what would take too long to count or to look for."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, Column, Index
from sqlmodel import Field, SQLModel

from blocks.event_file import TimestepType
from blocks.tables import TimestepState, words


class TimestepTally(SQLModel, table=True):
    """How many timesteps there are of a kind. PostgreSQL keeps it: counting a million rows takes too long."""

    __tablename__ = "timestep_tally"

    experiment_id: str = Field(primary_key=True)
    system: str = Field(primary_key=True)
    type: TimestepType = Field(sa_column=Column(words(TimestepType), primary_key=True))
    state: TimestepState = Field(sa_column=Column(words(TimestepState), primary_key=True))
    timesteps: int = Field(sa_column=Column(BigInteger, nullable=False), description="None of them left, if 0.")
    images: int = Field(sa_column=Column(BigInteger, nullable=False), description="As announced.")
    bytes: int = Field(sa_column=Column(BigInteger, nullable=False), description="In object storage.")


class PositionTally(SQLModel, table=True):
    """How many timesteps there are of each position. PostgreSQL keeps it."""

    __tablename__ = "position_tally"

    experiment_id: str = Field(primary_key=True)
    position: int = Field(primary_key=True)
    system: str = Field(primary_key=True)
    type: TimestepType = Field(sa_column=Column(words(TimestepType), primary_key=True))
    timesteps: int = Field(sa_column=Column(BigInteger, nullable=False), description="None of them left, if 0.")


class EventTally(SQLModel, table=True):
    """How many events of a type the history has ever had. PostgreSQL keeps it."""

    __tablename__ = "event_tally"

    type: str = Field(primary_key=True)
    events: int = Field(sa_column=Column(BigInteger, nullable=False))


class ArchiveHolding(SQLModel, table=True):
    """What timesteps in an archive are of, and when they were taken. PostgreSQL keeps it.

    It may say more than there is, where a timestep was replaced; never less.
    """

    __tablename__ = "archive_holding"
    __table_args__ = (Index("archive_holding_by_experiment", "experiment_id"),)

    archive_id: UUID = Field(primary_key=True, foreign_key="archive.id", ondelete="CASCADE")
    experiment_id: str = Field(primary_key=True)
    system: str = Field(primary_key=True)
    type: TimestepType = Field(sa_column=Column(words(TimestepType), primary_key=True))
    first: datetime
    last: datetime
