"""The tables: what is known of every timestep, its images, its archives, and its history.

A table holds facts, each from an event of the log. A timestep's state is computed from its
facts by PostgreSQL itself, so that the two can never disagree, in whatever order facts arrive.
"""

from datetime import date, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import JSON, BigInteger, Column, ColumnElement, Computed, Enum, Index, String, text
from sqlmodel import Field, SQLModel, col

from blocks.event_file import TimestepType, title_of
from blocks.synthetic_timestep import SYSTEM as FLIGHT_CHECK

if TYPE_CHECKING:
    from blocks.tallies import TimestepTally


class TimestepState(StrEnum):
    """How far a timestep has come."""

    INGESTED = "ingested"
    UPLOADED = "uploaded"
    ARCHIVED = "archived"
    FAILED = "failed"


# The state machine. An object that was proven to be in the bucket outweighs any failure, also one
# that is reported later, by a run that lost its race; a tape archive counts once the upload is known.
_STATE = """
case when uploaded_at is not null and archived_at is not null then 'archived'
     when uploaded_at is not null then 'uploaded'
     when failed_at is not null then 'failed'
     else 'ingested' end
"""


def words(kind: type[StrEnum]) -> Enum:
    """A column of an enumeration's values, as text: a new value needs no migration."""
    return Enum(
        kind, native_enum=False, length=16, values_callable=lambda members: [member.value for member in members]
    )


class Timestep(SQLModel, table=True):
    """One timestep: what its microscope announced, how far it has come, and its object."""

    __table_args__ = (
        # One index per way of paging through timesteps, newest first, and its filter.
        # What they include, answers by itself what there is per day, and per experiment.
        Index("timestep_by_time", "timestamp", "id", postgresql_include=["type", "state", "image_count", "size"]),
        Index("timestep_by_system", "system", "timestamp", "id"),
        Index("timestep_by_type", "type", "timestamp", "id"),
        Index(
            "timestep_by_experiment",
            *("experiment_id", "position", "timestamp", "id"),
            postgresql_include=["system", "type", "state", "image_count", "size"],
        ),
        Index(
            "timestep_by_experiment_and_time",
            "experiment_id",
            "timestamp",
            "id",
            postgresql_include=["system", "type", "state"],
        ),
        Index("timestep_by_state", "state", "timestamp", "id"),
        Index(
            "timestep_exported",
            *("timestamp", "id"),
            postgresql_include=["type"],
            postgresql_where=text("state in ('uploaded', 'archived')"),
        ),
        Index(
            "timestep_at_risk",
            "uploaded_at",
            "id",
            postgresql_where=text("uploaded_at is not null and archived_at is null"),
        ),
        Index("timestep_by_key", "key", postgresql_where=text("key is not null")),
        Index("timestep_by_image_dir", "system", "image_dir"),
        Index(
            "timestep_purgeable",
            *("system", "uploaded_at", "id"),
            postgresql_where=text("uploaded_at is not null and source_purged_at is null"),
        ),
    )

    id: UUID = Field(primary_key=True)
    state: TimestepState = Field(
        default=TimestepState.INGESTED,
        sa_column=Column(words(TimestepState), Computed(_STATE, persisted=True), nullable=False),
    )

    # What was announced.
    system: str
    experiment_id: str
    plate: int
    cross_date: date
    position: int
    type: TimestepType = Field(sa_column=Column(words(TimestepType), nullable=False))
    timestamp: datetime
    image_count: int
    image_dir: str = Field(sa_column=Column(String(collation="C"), nullable=False))
    # JSON, not JSONB: kept to the letter, also what JSONB refuses (\u0000).
    announced: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))

    # When what happened.
    event_file: str | None = None
    ingested_at: datetime | None = None
    uploaded_at: datetime | None = None
    archived_at: datetime | None = None
    failed_at: datetime | None = None
    failed_stage: str | None = None
    failed_reason: str | None = None
    failed_flow_run_id: UUID | None = None
    # Its files are there as long as nobody said that they were deleted.
    source_purged_at: datetime | None = None
    staging_purged_at: datetime | None = None

    # The object, and what was checked after its upload.
    bucket: str | None = None
    key: str | None = None
    size: int | None = Field(default=None, sa_column=Column(BigInteger))
    etag: str | None = None
    sha256: str | None = None
    layout_digest: str | None = None
    upload_started_at: datetime | None = None
    verified_at: datetime | None = None
    checks: list[str] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))

    @property
    def title(self) -> str:
        """What an operator searches for."""
        return title_of(self.system, self.experiment_id, self.timestamp)


def of_microscopes(table: "type[Timestep] | type[TimestepTally]") -> ColumnElement[bool]:
    """The condition that a microscope took a timestep: none of those that flight checks send."""
    return col(table.system) != FLIGHT_CHECK


class TimestepImage(SQLModel, table=True):
    """One file in a timestep's tar: where it lies and what it must hash to.

    By far the most rows, written together with their timestep. No foreign key, because looking the timestep
    up for each of its images takes as long as storing them; and names sort by their bytes, as in the tar.
    """

    __tablename__ = "timestep_image"

    timestep_id: UUID = Field(primary_key=True)
    name: str = Field(sa_column=Column(String(collation="C"), primary_key=True))
    offset: int = Field(sa_column=Column(BigInteger, nullable=False))
    size: int = Field(sa_column=Column(BigInteger, nullable=False))
    sha256: str


class TimestepEvent(SQLModel, table=True):
    """One event of the log, as it was first said: the history everything else is derived from."""

    __tablename__ = "timestep_event"
    __table_args__ = (
        Index("event_of_timestep", "timestep_id", "time", "id", postgresql_where=text("timestep_id is not null")),
        Index("event_of_file", "system", "event_file", postgresql_where=text("event_file is not null")),
        Index("event_of_key", "key", postgresql_where=text("key is not null")),
        Index("event_by_type", "type", "time"),
    )

    id: UUID = Field(primary_key=True, description="The CloudEvent's id.")
    entry_id: str = Field(description="Its entry in the stream.")
    type: str
    source: str
    time: datetime
    # What it is about: a timestep, an event file, or an object that may be unknown as yet.
    timestep_id: UUID | None = None
    system: str | None = None
    event_file: str | None = None
    key: str | None = None
    data: dict[str, Any] = Field(
        sa_column=Column(JSON, nullable=False), description="What it says, without the images, which have their table."
    )


class Archive(SQLModel, table=True):
    """One archive on tape."""

    __table_args__ = (Index("archive_by_time", "archived_at", "id"),)

    id: UUID = Field(primary_key=True)
    path: str = Field(unique=True)
    date: date
    job_id: UUID = Field(description="surf-archiver's job that first reported it.")
    archived_at: datetime = Field(description="When it was first reported.")


class ArchiveMember(SQLModel, table=True):
    """One object in an archive. Its timestep is found by the key, whenever that gets known."""

    __tablename__ = "archive_member"

    archive_id: UUID = Field(primary_key=True, foreign_key="archive.id", ondelete="CASCADE")
    key: str = Field(primary_key=True, index=True)
    job_id: UUID
    archived_at: datetime


class RejectedEventFile(SQLModel, table=True):
    """An event file that can't be taken in as it is now; gone once it was taken in."""

    __tablename__ = "rejected_event_file"
    __table_args__ = (Index("rejected_by_time", "rejected_at", "id"),)

    system: str = Field(primary_key=True)
    event_file: str = Field(primary_key=True)
    id: UUID = Field(description="The id of the event that said so.")
    reason: str
    fingerprint: str
    rejected_at: datetime
    # What it announces, where that could be read.
    timestep_id: UUID | None = None
    experiment_id: str | None = None
    position: int | None = None
    type: TimestepType | None = Field(default=None, sa_column=Column(words(TimestepType)))
    timestamp: datetime | None = None
