"""What surf-archiver says when it has put objects into archives on tape."""

import json
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError

from blocks.event_file import TimestepType
from blocks.messages import Archived

SOURCE = "surf-archiver"  # of the events that come from its notices

_PREFIXES = tuple(f"{kind.prefix}/" for kind in TimestepType)
_MAX_BYTES = 1024  # of a key, in S3


class InvalidNotice(Exception):
    """A notice of which nothing can be used; the message says why."""


def _storable(value: str) -> str:
    if "\0" in value or len(value.encode(errors="replace")) > _MAX_BYTES:
        raise ValueError(f"must have at most {_MAX_BYTES} bytes and no NUL")
    return value


Name = Annotated[str, Field(min_length=1), AfterValidator(_storable)]
_NAME: TypeAdapter[str] = TypeAdapter(Name)


class ArchivedFiles(BaseModel):
    """One archive, and the objects that are in it."""

    path: Name = Field(description="Path of the archive on tape.")
    src_keys: list[Name] = Field(description="Keys of the objects, with or without the bucket in front.")


class Notice(BaseModel):
    """The document surf-archiver sends after a job."""

    job_id: UUID
    date: date
    archives: list[ArchivedFiles]


@dataclass(frozen=True)
class Reading:
    """What could be read of a notice: entries that make no sense don't cost the others."""

    archived: list[Archived] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def read_notice(content: bytes, bucket: str) -> Reading:
    """Read a notice.

    Args:
        content: the JSON document.
        bucket: ours, which may stand in front of the keys.

    Raises:
        InvalidNotice: when it is not such a document at all.
    """
    try:
        document: dict[str, Any] = json.loads(content)
        archives = document["archives"]
        head = Notice.model_validate({**document, "archives": []})
        if not isinstance(archives, list):
            raise InvalidNotice("archives: must be a list")
    except ValidationError as error:
        raise InvalidNotice(_faults(error)) from error
    except (KeyError, TypeError):
        raise InvalidNotice("it has no list of archives") from None
    except (ValueError, RecursionError) as error:
        raise InvalidNotice(f"it is not valid JSON: {error}") from error

    reading = Reading()
    seen: set[tuple[str, str]] = set()
    for number, entry in enumerate(archives):
        keys = entry.get("src_keys") if isinstance(entry, dict) else None
        try:
            archive = ArchivedFiles.model_validate({**entry, "src_keys": []} if isinstance(keys, list) else entry)
        except ValidationError as error:
            reading.refused.append(f"archives.{number}.{_faults(error)}")
            continue
        for place, sent in enumerate(keys or []):
            try:
                key = _without_bucket(_NAME.validate_python(sent), bucket)
            except ValidationError as error:
                reading.refused.append(f"archives.{number}.src_keys.{place}: {error.errors()[0]['msg']}")
                continue
            if (archive.path, key) not in seen:
                seen.add((archive.path, key))
                reading.archived.append(
                    Archived(timestep_id=None, job_id=head.job_id, date=head.date, archive=archive.path, key=key)
                )
    return reading


def archive_of(key: str) -> str:
    """The archive that surf-archiver puts an object into, which it keeps to itself from 0.1.4 on."""
    prefix, experiment_id, date, _ = key.split("/")
    return f"{prefix}/{experiment_id}/{date}.tar"


def _without_bucket(key: str, bucket: str) -> str:
    rest = key.removeprefix(f"{bucket}/")
    # A bucket may have the name of a prefix.
    return rest if rest.startswith(_PREFIXES) else key


def _faults(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'document'}: {fault['msg']}" for fault in error.errors())
