"""The events of the stream.

Events follow CloudEvents 1.0 (github.com/cloudevents/spec). An event's id is derived from
what it says, so that saying the same thing twice gives the same event, and every reader can
ignore the second.
"""

import hashlib
import json
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Any, ClassVar, Literal, Self
from uuid import UUID, uuid5

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)

from blocks.event_file import ImagingEvent, title_of
from blocks.proven_object import Proof, ProvenObject
from blocks.synthetic_timestep import SYSTEM as FLIGHT_CHECK

# Namespace of the events' ids; any fixed UUID would do.
_EVENT_IDS = UUID("6f0d4a1e-7c54-4d0a-9d0b-3f4c1f6f7a11")


class EventData(BaseModel):
    """What one type of event says. `said` is what makes two events the same."""

    model_config = ConfigDict(frozen=True)
    type: ClassVar[str]
    timestep_id: UUID | None

    def said(self) -> tuple[object, ...]:
        """The values that identify the event among those of its type and timestep."""
        raise NotImplementedError


class Ingested(EventData):
    """A timestep is complete on disk and its event file was taken in."""

    type: ClassVar[str] = "timestep.ingested"
    timestep_id: UUID
    system: str
    event_file: str = Field(description="Path of the event file below the system's directory.")
    event: ImagingEvent
    warnings: list[str] = Field(
        default_factory=list, description="What is not as announced, and was accepted by the system's policy."
    )
    priority: int = Field(0, description="Of the system when it was taken in; of a backlog, higher ones go first.")
    flow_run_id: UUID | None = None

    @property
    def metadata(self) -> bytes:
        """The content of `metadata.json` in the tar: all that was announced, and what was not as announced."""
        document = {"system": self.system, **self.event.document()}
        if self.warnings:
            document["archiver:warnings"] = self.warnings
        return json.dumps(document, indent=2, sort_keys=True).encode()

    @property
    def title(self) -> str:
        """What an operator searches for."""
        return title_of(self.system, self.event.experiment_id, self.event.timestamp)

    @property
    def digest(self) -> str:
        """Identifies what was announced: the system and the event, but not the file's name."""
        content = json.dumps([self.system, self.event.document()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def said(self) -> tuple[object, ...]:
        return (self.digest,)


class Uploaded(ProvenObject, EventData):
    """A timestep is in object storage, and that was proven."""

    type: ClassVar[str] = "timestep.uploaded"
    timestep_id: UUID
    system: str
    event: ImagingEvent
    bucket: str
    started_at: datetime
    source_state: str | None = Field(
        None, description="Of the image directory as it was when it was read, or copied; null where that is not known."
    )
    copy_state: str | None = Field(None, description="Of the copy in staging, where that was read.")
    flow_run_id: UUID | None = None

    def said(self) -> tuple[object, ...]:
        return (self.bucket, self.key, self.sha256, self.etag)


class Failed(EventData):
    """A stage gave a timestep up; pressing Retry on the flow run takes it up again."""

    type: ClassVar[str] = "timestep.failed"
    timestep_id: UUID
    system: str
    stage: Literal["ingest", "upload"]
    reason: str
    event: ImagingEvent
    flow_run_id: UUID | None = None
    attempt: int = Field(1, description="The flow run's run count, 1 for its first run.")

    def said(self) -> tuple[object, ...]:
        return (self.stage, self.flow_run_id, self.attempt)


class Archived(EventData):
    """surf-archiver put an object into a tape archive. The id is empty while the key is unknown."""

    type: ClassVar[str] = "timestep.archived"
    timestep_id: UUID | None
    job_id: UUID
    date: date
    archive: str = Field(description="Path of the archive on tape.")
    key: str
    etag: str | None = Field(None, description="Of the object, where its tags said so: another one may come later.")

    def said(self) -> tuple[object, ...]:
        return (self.job_id, self.archive, self.key, *([self.etag] if self.etag else []))


class _Purged(EventData):
    """Files of a timestep were deleted, because that was proven to be safe."""

    timestep_id: UUID
    system: str
    files: int = Field(ge=0)
    bytes: int = Field(ge=0)
    proof: Proof
    flow_run_id: UUID | None = None

    def said(self) -> tuple[object, ...]:
        return (self.flow_run_id,)


class SourcePurged(_Purged):
    """A timestep's files on the microscope's share were deleted."""

    type: ClassVar[str] = "timestep.source-purged"


class StagingPurged(_Purged):
    """A timestep's copy in the staging directory was deleted."""

    type: ClassVar[str] = "timestep.staging-purged"


class Rejected(EventData):
    """An event file can't be taken in as it is. It stays where it is."""

    type: ClassVar[str] = "event-file.rejected"
    timestep_id: UUID | None
    system: str
    event_file: str
    reason: str
    fingerprint: str = Field(description="Of the file as it was, so that a change of it is noticed.")
    event: ImagingEvent | None = Field(None, description="What it announces, where that could be read.")
    episode: UUID | None = Field(None, description="From the file's first rejection until it is cleared.")

    def said(self) -> tuple[object, ...]:
        return (self.system, self.event_file, self.reason, self.fingerprint, self.episode)


class Cleared(EventData):
    """An event file is not rejected any more: it was taken in as this timestep, or removed."""

    type: ClassVar[str] = "event-file.cleared"
    timestep_id: UUID | None = Field(description="What it was taken in as, also where it was known already.")
    system: str
    event_file: str
    why: Literal["taken in", "removed"]
    episode: UUID = Field(description="All rejections of this episode are over.")

    def said(self) -> tuple[object, ...]:
        return (self.system, self.event_file, self.why, self.episode)


class Withdrawn(EventData):
    """A flight check took its synthetic timestep back. No event of any other system can say this."""

    type: ClassVar[str] = "timestep.withdrawn"
    timestep_id: UUID
    system: Literal["flight-check"] = FLIGHT_CHECK
    reason: str
    flow_run_id: UUID | None = None

    def said(self) -> tuple[object, ...]:
        return ()


DATA_TYPES: dict[str, type[EventData]] = {
    data.type: data
    for data in (Ingested, Uploaded, Failed, Archived, SourcePurged, StagingPurged, Rejected, Cleared, Withdrawn)
}


# Raised when an event is written that an older release would misread. A field more is no such change.
SCHEMA_VERSION = 1


class _Event(BaseModel):
    """A CloudEvent around what happened."""

    model_config = ConfigDict(frozen=True)

    specversion: Literal["1.0"] = "1.0"
    id: UUID
    source: str
    type: str
    subject: str | None = Field(None, description="The timestep's id, where there is one.")
    time: datetime
    datacontenttype: Literal["application/json"] = "application/json"
    schemaversion: int = SCHEMA_VERSION
    data: SerializeAsAny[EventData]

    @field_validator("schemaversion")
    @classmethod
    def _is_known(cls, value: int) -> int:
        if value > SCHEMA_VERSION:
            raise ValueError(
                f"a newer release wrote it, with schema version {value}; {SCHEMA_VERSION} is the last one known here: "
                "upgrade this one, then run `archiver replay`"
            )
        return value


# For each type of event, what reads it from JSON straight into its own model.
_READERS = {name: create_model(data.__name__, __base__=_Event, data=(data, ...)) for name, data in DATA_TYPES.items()}


class LogEvent(_Event):
    """One entry of the stream: a CloudEvent around what happened."""

    @field_validator("data", mode="before")
    @classmethod
    def _by_type(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, EventData):
            return value
        name = info.data.get("type")
        if name not in DATA_TYPES:
            raise ValueError(f"unknown event type {name!r}; known are {', '.join(DATA_TYPES)}")
        return DATA_TYPES[name].model_validate(value)

    @classmethod
    def read(cls, document: str, type: str) -> "LogEvent":
        """The event in a JSON document that is said to be of this type: that takes half as long as finding out.

        Raises:
            pydantic.ValidationError: when it is none of ours.
        """
        with suppress(KeyError, ValidationError):
            event = _READERS[type].model_validate_json(document)
            if event.type == type:
                return cls.model_construct(event.model_fields_set, **dict(event))
        return cls.model_validate_json(document)

    @classmethod
    def of(cls, data: EventData, source: str) -> Self:
        """Wrap what happened, now. `source` names the stage that says so, e.g. `upload-worker`."""
        said = json.dumps([data.type, str(data.timestep_id), *map(str, data.said())])
        return cls(
            id=uuid5(_EVENT_IDS, said),
            source=f"archiver/{source}",
            type=data.type,
            subject=str(data.timestep_id) if data.timestep_id else None,
            time=datetime.now(UTC),
            data=data,
        )
