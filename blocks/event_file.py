"""The event file: how a microscope announces a timestep, and what is refused."""

import json
import math
import re
from datetime import UTC, date, datetime, timedelta, timezone
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Self
from uuid import UUID
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

# An event travels as a parameter of a flow run as well, of which Prefect's server takes 512 KiB.
MAX_EVENT_FILE_BYTES = 1 << 17
# What PostgreSQL can keep in an index has less than 2,700 bytes.
MAX_PATH_BYTES = 1000
# Readers of JSON stop at different depths, the strictest of ours near 200.
MAX_LEVELS = 64


class InvalidEventFile(Exception):
    """An event file that can't be taken in; the message is a sentence for its operator."""


class TimestepType(StrEnum):
    """What a timestep's images are; decides the first part of the object key."""

    STITCH = "stitch"
    VIDEO = "video"
    OVERVIEW = "overview"
    FLIGHT_CHECK = "flight-check"  # no microscope's: see blocks/synthetic_timestep.py

    @property
    def prefix(self) -> str:
        """First part of the object key. surf-archiver globs for that of each but the flight check's."""
        return {"stitch": "images", "video": "videos"}.get(self.value, self.value)


def _relative_path(value: str) -> str:
    path = PurePosixPath(value)
    if "\0" in value or path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("must be a relative path inside the system's directory, without '..'")
    # Whatever comes there would be a reason to look at the images again.
    if path.parts[0] == "events":
        raise ValueError("must not be inside the directory of the event files")
    if len(value.encode()) > MAX_PATH_BYTES:
        raise ValueError(f"must have at most {MAX_PATH_BYTES} bytes")
    return str(path)


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004 -- pydantic reports ValueError
    return value


def _written_as(pattern: str, example: str) -> BeforeValidator:
    """Numbers would be taken for seconds or milliseconds since 1970, and a date alone for midnight."""

    def check(value: Any) -> Any:
        if not isinstance(value, date) and not (isinstance(value, str) and re.match(pattern, value, re.ASCII)):
            raise ValueError(f"must be written like {example}")
        return value

    return BeforeValidator(check)


def _common_year(value: date) -> date:
    if not 1970 <= value.year <= 2999:
        raise ValueError("year must be from 1970 to 2999")
    return value


_Number = Annotated[int, BeforeValidator(_no_boolean), Field(le=2**31 - 1)]  # as PostgreSQL's integer


class ImagingEvent(BaseModel):
    """One timestep, as its microscope announces it in an event file. Unknown fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    timestep_id: UUID
    plate: _Number = Field(ge=0)
    cross_date: Annotated[date, _written_as(r"\d{4}-\d\d-\d\d", "2026-11-01"), AfterValidator(_common_year)]
    position: _Number = Field(ge=0)
    timestamp: Annotated[
        datetime,
        _written_as(r"\d{4}-\d\d-\d\d[Tt _]\d\d:\d\d", "2026-11-23T10:42:07+01:00"),
        AfterValidator(_common_year),
    ]
    img_count: _Number = Field(ge=1, validation_alias=AliasChoices("img_count", "image_count"))
    img_dir: Annotated[str, AfterValidator(_relative_path)] = Field(validation_alias=AliasChoices("img_dir", "path"))
    experiment_id: str = Field("", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", validate_default=False)
    event_type: TimestepType = TimestepType.STITCH
    metadata: dict[str, Any] = Field(default_factory=dict)

    @field_validator("timestamp")
    @classmethod
    def _aware(cls, value: datetime, info: ValidationInfo) -> datetime:
        # Kept with its offset: it tells what the clock on the microscope's wall showed. Only with the
        # offset, as in JSON: times of a zone equal no other in the hour its clocks are set back.
        if value.tzinfo is None:
            value = value.replace(tzinfo=(info.context or {}).get("time_zone", UTC))
        return value.replace(tzinfo=timezone(value.utcoffset() or timedelta()))

    @model_validator(mode="before")
    @classmethod
    def _default_experiment(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("experiment_id") is None:
            values = {key: value for key, value in values.items() if key != "experiment_id"}
        return values

    @model_validator(mode="after")
    def _name_experiment(self) -> Self:
        if not self.experiment_id:
            # The model is frozen for its users, not for its own validator.
            object.__setattr__(self, "experiment_id", f"{self.cross_date:%Y%m%d}_{self.plate:03d}")
        return self

    @property
    def key(self) -> str:
        """The object's key. It carries the timestep's id, so that no two timesteps share one."""
        time = self.timestamp.astimezone(UTC)
        name = f"{time:%H%M%S}_{self.timestep_id.hex[:8]}.tar"
        return f"{self.event_type.prefix}/{self.experiment_id}/{time:%Y%m%d}/{name}"

    def document(self) -> dict[str, Any]:
        """The event as a JSON object, the same for the same event however it was written down."""
        return self.model_dump(mode="json", by_alias=False)


def title_of(system: str, experiment_id: str, timestamp: datetime) -> str:
    """What an operator searches for: `prince 20261101_004 2026-11-23 10:42:07`, in UTC."""
    return f"{system} {experiment_id} {timestamp.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidEventFile(f"field {', '.join(map(ascii, twice))} stands there twice")
    return document


def _no_constant(name: str) -> Any:
    raise InvalidEventFile(f"{name} is not JSON")


def _check_values(value: Any, levels: int = MAX_LEVELS) -> None:
    """Refuse what a reader of the stream could not read, or would read differently."""
    if levels == 0:
        raise InvalidEventFile(f"it is nested more than {MAX_LEVELS} levels deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidEventFile("it holds a number too large for a computer")
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair is no text
    elif isinstance(value, dict | list):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_values(part, levels - 1)


def parse_event_file(content: bytes, time_zone: ZoneInfo) -> ImagingEvent:
    """Read an event file's content.

    Args:
        content: the bytes of the file.
        time_zone: where the system stands, for a timestamp without an offset.

    Raises:
        InvalidEventFile: when it is not JSON, or a field is missing or wrong.
    """
    if len(content) > MAX_EVENT_FILE_BYTES:
        raise InvalidEventFile(f"it has more than {MAX_EVENT_FILE_BYTES} bytes")
    try:
        document = json.loads(content, object_pairs_hook=_unique, parse_constant=_no_constant)
        if not isinstance(document, dict):
            raise InvalidEventFile("it is not a JSON object")
        _check_values(document)
        return ImagingEvent.model_validate(document, context={"time_zone": time_zone})
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc'])) or 'document'}: {fault['msg']}" for fault in error.errors())
        raise InvalidEventFile("; ".join(faults)) from error
    except RecursionError as error:
        raise InvalidEventFile("it is nested too deeply") from error
    except ValueError as error:
        raise InvalidEventFile(f"it is not valid JSON: {error}") from error
