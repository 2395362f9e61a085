"""What the API answers, and what lists can be narrowed down to."""

from datetime import date, datetime
from typing import Annotated, Any, Self
from uuid import UUID

from pydantic import BaseModel, Field
from sqlalchemy import Select
from sqlmodel import col

from api.paging import Instant, Paging
from blocks.event_file import TimestepType
from blocks.tables import Archive, RejectedEventFile, Timestep, TimestepEvent, TimestepState

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]


class TimestepFilter(BaseModel):
    """Which timesteps."""

    system: Name | None = Field(None, description="Imaging system.", examples=["prince"])
    experiment: Name | None = Field(None, description="Experiment.", examples=["20261101_004"])
    state: TimestepState | None = Field(None, description="How far it has come.")
    type: TimestepType | None = Field(None, description="What its images are.")
    position: int | None = Field(None, ge=0, le=2**31 - 1, description="Position on the plate.")
    start: Instant | None = Field(None, description="Taken at this time or later.", examples=["2026-11-23T00:00:00Z"])
    end: Instant | None = Field(None, description="Taken before this time.", examples=["2026-11-24T00:00:00Z"])

    @property
    def is_narrow(self) -> bool:
        """Whether anything is asked for at all."""
        return any(getattr(self, name) is not None for name in TimestepFilter.model_fields)

    def narrow(self, rows: Select[Any]) -> Select[Any]:
        """The rows of a query over timesteps that pass."""
        equal = {
            Timestep.system: self.system,
            Timestep.experiment_id: self.experiment,
            Timestep.state: self.state,
            Timestep.type: self.type,
            Timestep.position: self.position,
        }
        rows = rows.where(*(col(column) == value for column, value in equal.items() if value is not None))
        if self.start:
            rows = rows.where(col(Timestep.timestamp) >= self.start)
        if self.end:
            rows = rows.where(col(Timestep.timestamp) < self.end)
        return rows


class TimestepQuery(Paging, TimestepFilter):
    """Which timesteps, and which part of the list."""


class Export(BaseModel):
    """An uploaded timestep, ready to be fetched."""

    timestep_id: UUID
    system: str = Field(examples=["prince"])
    experiment_id: str = Field(examples=["20261101_004"])
    position: int
    type: TimestepType
    timestamp: datetime
    key: str = Field(examples=["images/20261101_004/20261123/104207_6a0ecf0c.tar"])
    size: int = Field(description="Bytes of the tar.")
    sha256: str = Field(description="Of the tar.")
    uploaded_at: datetime
    url: str = Field(description="Fetches the tar without credentials, for an hour.")


class Failure(BaseModel):
    """The last time a stage gave the timestep up, if nothing has come of it since."""

    stage: str
    reason: str
    at: datetime
    flow_run_id: UUID | None


class TimestepSummary(BaseModel):
    """A timestep in a list."""

    timestep_id: UUID
    state: TimestepState
    system: str = Field(examples=["prince"])
    experiment_id: str = Field(examples=["20261101_004"])
    plate: int
    cross_date: date
    position: int
    type: TimestepType
    timestamp: datetime
    image_count: int
    ingested_at: datetime | None
    uploaded_at: datetime | None
    archived_at: datetime | None
    key: str | None = Field(description="Key of the object, once there is one.")
    size: int | None = Field(description="Bytes of the object.")
    failure: Failure | None

    @classmethod
    def of(cls, timestep: Timestep) -> Self:
        """What is shown of a timestep."""
        return cls.model_validate(
            {**timestep.model_dump(), "timestep_id": timestep.id, "failure": failure_of(timestep)}
        )


def failure_of(timestep: Timestep) -> Failure | None:
    """What is wrong with a timestep, if something is."""
    if not (timestep.failed_at and timestep.failed_stage and timestep.failed_reason is not None):
        return None
    return Failure(
        stage=timestep.failed_stage,
        reason=timestep.failed_reason,
        at=timestep.failed_at,
        flow_run_id=timestep.failed_flow_run_id,
    )


class TimestepObject(BaseModel):
    """The object that holds a timestep, and what proves it."""

    bucket: str
    key: str
    size: int
    etag: str
    sha256: str
    layout_digest: str = Field(description="Digest of the tar's members: names, sizes and places.")
    upload_started_at: datetime
    verified_at: datetime
    checks: list[str] = Field(description="What was checked after the upload.")


class HistoryEvent(BaseModel):
    """One event of the log."""

    event_id: UUID
    entry_id: str = Field(description="Its entry in the stream.")
    type: str = Field(examples=["timestep.uploaded"])
    time: datetime
    source: str = Field(description="The stage that said so.")
    flow_run_id: UUID | None = Field(description="The flow run that said so.")
    data: dict[str, Any] = Field(description="What it says, but for the list of images.")

    @classmethod
    def of(cls, event: TimestepEvent) -> Self:
        """What is shown of an event."""
        return cls(
            event_id=event.id,
            entry_id=event.entry_id,
            type=event.type,
            time=event.time,
            source=event.source,
            flow_run_id=event.data.get("flow_run_id"),
            data=event.data,
        )


class ArchiveReference(BaseModel):
    """An archive on tape that holds the timestep's object."""

    archive_id: UUID
    path: str
    archived_at: datetime


class TimestepDetail(TimestepSummary):
    """All that is known of a timestep."""

    event_file: str | None = Field(description="Path of its event file below the system's directory.")
    image_dir: str
    announced: dict[str, Any] = Field(description="The event file's content, with fields that mean nothing to us.")
    object: TimestepObject | None
    archives: list[ArchiveReference]
    history: list[HistoryEvent] = Field(description="Oldest first.")


class ImageRow(BaseModel):
    """One file in a timestep's tar."""

    name: str = Field(examples=["Img/Img_r00_c01.tif"])
    offset: int = Field(description="Where its bytes begin in the object.")
    size: int = Field(description="Bytes.")
    sha256: str


class ArchiveSummary(BaseModel):
    """An archive on tape."""

    archive_id: UUID
    path: str
    date: date
    job_id: UUID = Field(description="surf-archiver's job that first reported it.")
    archived_at: datetime = Field(description="When it was first reported.")

    @classmethod
    def of(cls, archive: Archive) -> Self:
        """What is shown of an archive."""
        return cls.model_validate({**archive.model_dump(), "archive_id": archive.id})


class Member(BaseModel):
    """An object in an archive."""

    key: str
    timestep_id: UUID | None = Field(description="Null while nobody knows an upload of this key.")
    archived_at: datetime


class ArchiveDetail(ArchiveSummary):
    """An archive with the objects in it."""

    members: list[Member]


class RejectedRow(BaseModel):
    """An event file that can't be taken in as it is. It stays where it is, and is looked at again once it changes."""

    system: str
    event_file: str = Field(description="Path below the system's directory.", examples=["events/0815.json"])
    reason: str = Field(examples=["prince/events/0815.json: position: Field required"])
    rejected_at: datetime
    timestep_id: UUID | None

    @classmethod
    def of(cls, row: RejectedEventFile) -> Self:
        """What is shown of a rejection."""
        return cls.model_validate(row.model_dump())
