"""What the API answers about timesteps."""

from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import Path
from pydantic import BaseModel, Field
from sqlmodel import col

from blocks.event_file import TimestepType
from blocks.tables import Timestep, TimestepEvent, TimestepState

TimestepId = Annotated[
    UUID, Field(description="As its microscope announced it.", examples=["6a0ecf0c-4a5b-4a49-9cb3-0c7a86a4e2a1"])
]
# The same, in a path.
TimestepPath = Annotated[UUID, Path(description="Of the timestep.", examples=["6a0ecf0c-4a5b-4a49-9cb3-0c7a86a4e2a1"])]
_KEY = "images/20261101_004/20261123/104207_6a0ecf0c.tar"
Key = Annotated[str, Field(description="Key of its object.", examples=[_KEY])]
Size = Annotated[int, Field(description="Bytes of its object.", examples=[600_123_392])]
ETag = Annotated[str, Field(description="As the store gave it.", examples=["0b26e313ed4a7ca6904b0e9369e5b957-36"])]
Sha256 = Annotated[
    str, Field(description="In hex.", examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"])
]
TarSha256 = Annotated[
    str | None,
    Field(
        description="Of the whole object, in hex; null where it was found in the bucket by `archiver rebuild` and not "
        "read whole since. Its images have theirs.",
        examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"],
    ),
]
_RUN = "0190f3a1-7c54-7d0a-9d0b-3f4c1f6f7a11"
FlowRunId = Annotated[UUID, Field(description="Of a flow run in Prefect.", examples=[_RUN])]
SaidBy = Annotated[UUID | None, Field(description="The flow run that said so.", examples=[_RUN])]
_TAKEN, _LATER, _ON_TAPE = "2026-11-23T10:42:07Z", "2026-11-23T10:43:11Z", "2026-11-24T03:00:00Z"


class TimestepName(BaseModel):
    """What a timestep is of, and when it was taken."""

    timestep_id: TimestepId
    system: str = Field(description="Imaging system.", examples=["prince"])
    experiment_id: str = Field(description="Experiment.", examples=["20261101_004"])
    position: int = Field(description="Position on the plate.", examples=[12])
    type: TimestepType = Field(description="What its images are.", examples=["stitch"])
    timestamp: datetime = Field(description="When the images were taken.", examples=[_TAKEN])

    @classmethod
    def columns(cls) -> list[Any]:
        """Those to select of timesteps to show this."""
        shown = [name for name in cls.model_fields if name in Timestep.model_fields]
        return [col(Timestep.id).label("timestep_id"), *(getattr(Timestep, name) for name in shown)]


class UploadedTimestep(TimestepName):
    """A timestep that is in object storage."""

    key: Key
    size: Size
    uploaded_at: datetime = Field(description="When that was known.", examples=[_LATER])


class Export(UploadedTimestep):
    """An uploaded timestep, ready to be fetched."""

    etag: ETag
    sha256: TarSha256
    url: str = Field(
        description="Fetches the tar without credentials, for an hour.",
        examples=["https://s3.example.org/timesteps/images/…tar?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=…"],
    )

    @classmethod
    def columns(cls) -> list[Any]:
        """Those to select of timesteps to show this."""
        return [*super().columns(), Timestep.bucket]


class Failure(BaseModel):
    """The last time a stage gave the timestep up, if nothing has come of it since."""

    stage: str = Field(description="That gave it up.", examples=["upload"])
    reason: str = Field(description="Why.", examples=["the share is away"])
    at: datetime = Field(description="When.", examples=[_LATER])
    flow_run_id: SaidBy


class TimestepSummary(TimestepName):
    """A timestep in a list."""

    state: TimestepState = Field(description="How far it has come.", examples=["uploaded"])
    plate: int = Field(description="Number of its plate.", examples=[4])
    cross_date: date = Field(description="When the plate was prepared.", examples=["2026-11-01"])
    image_count: int = Field(description="As announced.", examples=[150])
    ingested_at: datetime | None = Field(description="When it was taken in.", examples=[_LATER])
    uploaded_at: datetime | None = Field(description="When it was known to be in object storage.", examples=[_LATER])
    archived_at: datetime | None = Field(description="When it was known to be on tape.", examples=[_ON_TAPE])
    key: str | None = Field(description="Key of its object, once there is one.", examples=[_KEY])
    size: int | None = Field(description="Bytes of its object.", examples=[600_123_392])
    failure: Failure | None = Field(description="What is wrong, if something is.", examples=[None])

    @classmethod
    def columns(cls) -> list[Any]:
        """Those to select of timesteps to show this."""
        failed = (Timestep.failed_at, Timestep.failed_stage, Timestep.failed_reason, Timestep.failed_flow_run_id)
        return [*super().columns(), *failed]

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Self:
        """Of the columns of a timestep."""
        return cls.model_validate({**columns, "failure": _failure(columns)})


def _failure(columns: Mapping[str, Any]) -> Failure | None:
    if columns["failed_at"] is None:
        return None
    return Failure.model_validate(
        {"at": columns["failed_at"], **{name: columns[f"failed_{name}"] for name in ("stage", "reason", "flow_run_id")}}
    )


class TimestepObject(BaseModel):
    """The object that holds a timestep, and what proves it."""

    bucket: str = Field(description="The bucket it is in.", examples=["timesteps"])
    key: Key
    size: Size
    etag: ETag
    sha256: TarSha256
    layout_digest: Sha256 = Field(description="Digest of the tar's members: names, sizes and places.")
    upload_started_at: datetime = Field(description="When its upload began.", examples=[_TAKEN])
    verified_at: datetime = Field(description="When it was checked.", examples=[_LATER])
    checks: list[str] = Field(
        description="What was checked after the upload.", examples=[["The store has 600123392 bytes, as sent."]]
    )


class HistoryEvent(BaseModel):
    """One event of the log."""

    event_id: UUID = Field(description="Of the CloudEvent.", examples=["5d2f9a34-9a0e-5b0a-8a57-0c5d1c1b0f0e"])
    entry_id: str = Field(description="Its entry in the stream.", examples=["1795430527000-0"])
    type: str = Field(description="What happened.", examples=["timestep.uploaded"])
    time: datetime = Field(description="When that was said.", examples=[_LATER])
    source: str = Field(description="The stage that said so.", examples=["archiver/upload-worker"])
    flow_run_id: SaidBy
    data: dict[str, Any] = Field(
        description="What it says, but for the list of images.", examples=[{"bucket": "timesteps", "size": 600_123_392}]
    )

    @classmethod
    def of(cls, event: TimestepEvent) -> Self:
        """What is shown of an event."""
        flow_run_id = event.data.get("flow_run_id")
        return cls.model_validate({**event.model_dump(), "event_id": event.id, "flow_run_id": flow_run_id})


class FlowRun(BaseModel):
    """A flow run that worked on the timestep."""

    flow_run_id: FlowRunId
    said: list[str] = Field(
        description="Types of the events it left behind; none, as long as it tries again.",
        examples=[["timestep.uploaded"]],
    )
    url: str | None = Field(
        description="Its page in Prefect; null where the API does not know Prefect's address.",
        examples=["http://127.0.0.1:4200/runs/flow-run/0190f3a1-7c54-7d0a-9d0b-3f4c1f6f7a11"],
    )


class ArchiveReference(BaseModel):
    """An archive on tape that holds the timestep's object."""

    archive_id: UUID = Field(description="Of the archive.", examples=["a7933df7-2cb2-5ff3-9f9d-44cca3a3be33"])
    path: str = Field(description="Of the archive on tape.", examples=["images/20261101_004/20261123.tar"])
    archived_at: datetime = Field(description="When it was reported to be in it.", examples=[_ON_TAPE])


class TimestepDetail(TimestepSummary):
    """All that is known of a timestep."""

    event_file: str | None = Field(
        description="Path of its event file below the system's directory.", examples=["events/20261123_104207.json"]
    )
    image_dir: str = Field(description="Below the system's directory.", examples=["20261123_104207_Plate004"])
    announced: dict[str, Any] = Field(
        description="The event file's content, with fields that mean nothing to us.", examples=[{"plate": 4}]
    )
    source_purged_at: datetime | None = Field(
        description="When its images were deleted from the source.", examples=[_ON_TAPE]
    )
    staging_purged_at: datetime | None = Field(description="When its copy was deleted from staging.", examples=[_LATER])
    object: TimestepObject | None = Field(description="What holds it, once it is uploaded.")
    archives: list[ArchiveReference] = Field(description="Those it is in, oldest first.")
    problems: list[str] = Field(
        description="What is wrong now beside `failure`, or waited for: a try that failed and is made again, an object "
        "that is gone or changed, another event file with this id that was rejected.",
        examples=[["upload tries again at 2026-11-23 10:43:00 UTC: SystemAway: the share is away (try 3)"]],
    )
    flow_runs: list[FlowRun] = Field(description="Those that said something about it, oldest first.")
    history: list[HistoryEvent] = Field(description="Every event about it, oldest first.")
