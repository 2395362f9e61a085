"""Events for tests, as the stages say them."""

from datetime import UTC, date, datetime, timedelta
from itertools import count
from typing import Any
from uuid import UUID, uuid4, uuid5

from blocks.event_file import ImagingEvent
from blocks.event_log import Entry
from blocks.messages import (
    Archived,
    Cleared,
    EventData,
    Failed,
    Ingested,
    LogEvent,
    Rejected,
    SourcePurged,
    StagingPurged,
    Uploaded,
    Withdrawn,
)
from blocks.proven_object import Image, Proof

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
BUCKET = "timesteps"

_entry_numbers = count(1)


def document(**fields: Any) -> dict[str, Any]:
    """What the event file of a timestep says, as a microscope writes it."""
    return {
        "timestep_id": str(uuid4()),
        "plate": 4,
        "cross_date": "2026-11-01",
        "position": 7,
        "timestamp": "2026-11-23T10:42:07Z",
        "img_count": 2,
        **fields,
    }


def announced(timestep_id: UUID | None = None, **fields: Any) -> ImagingEvent:
    """A timestep as its microscope announces it."""
    return ImagingEvent.model_validate(
        {
            "timestep_id": timestep_id or uuid4(),
            "plate": 4,
            "cross_date": date(2026, 11, 1),
            "position": 7,
            "timestamp": NOON,
            "img_count": 2,
            "img_dir": "20261101_004/t0001",
            **fields,
        }
    )


def ingested(event: ImagingEvent, system: str = "prince", event_file: str = "events/1.json") -> Ingested:
    """It was taken in."""
    return Ingested(timestep_id=event.timestep_id, system=system, event_file=event_file, event=event)


def uploaded(event: ImagingEvent, system: str = "prince", **fields: Any) -> Uploaded:
    """It is in object storage."""
    images = [
        Image(
            name=f"Img/Img_r00_c0{column}.tif", offset=1024 + 4096 * column, size=1000 + column, sha256=f"{column:064x}"
        )
        for column in range(2)
    ]
    return Uploaded.model_validate(
        {
            "timestep_id": event.timestep_id,
            "system": system,
            "event": event,
            "bucket": BUCKET,
            "key": event.key,
            "size": 20480,
            "etag": "0123456789abcdef0123456789abcdef",
            "sha256": event.timestep_id.hex * 2,
            "layout_digest": "ab" * 32,
            "images": images,
            "proof": Proof(verified_at=NOON + timedelta(minutes=1), checks=["It was read back."]),
            "started_at": NOON,
            **fields,
        }
    )


def failed(event: ImagingEvent, reason: str = "the share is away", attempt: int = 1, system: str = "prince") -> Failed:
    """It was given up."""
    flow_run = uuid5(event.timestep_id, "flow run")
    return Failed(
        timestep_id=event.timestep_id,
        system=system,
        stage="upload",
        reason=reason,
        event=event,
        flow_run_id=flow_run,
        attempt=attempt,
    )


def archived(
    key: str, archive: str = "/tape/images/20261101_004/20261123.tar", job: int = 1, etag: str | None = None
) -> Archived:
    """Its object is in a tape archive."""
    return Archived(
        timestep_id=None, job_id=UUID(int=job), date=date(2026, 11, 23), archive=archive, key=key, etag=etag
    )


def purged(
    event: ImagingEvent, kind: type[SourcePurged] | type[StagingPurged] = SourcePurged, run: int = 1
) -> EventData:
    """Its files were deleted."""
    return kind(
        timestep_id=event.timestep_id,
        system="prince",
        files=3,
        bytes=3000,
        proof=Proof(verified_at=NOON, checks=["Its object was read back."]),
        flow_run_id=UUID(int=run),
    )


def withdrawn(event: ImagingEvent) -> Withdrawn:
    """A flight check takes it back; that it is one of its own, is for the reader to see."""
    return Withdrawn(timestep_id=event.timestep_id, reason="as it had arrived", flow_run_id=UUID(int=1))


def rejected(
    event_file: str = "events/1.json",
    reason: str = "it is not JSON",
    system: str = "prince",
    episode: int | None = None,
    event: ImagingEvent | None = None,
) -> Rejected:
    """Its event file can't be taken in; `event` is what it announces, where it could be read."""
    return Rejected(
        timestep_id=event.timestep_id if event else None,
        system=system,
        event_file=event_file,
        reason=reason,
        fingerprint=f"{reason}-1",
        event=event,
        episode=episode and _episode(event_file, episode),
    )


def cleared(event_file: str = "events/1.json", episode: int = 1) -> Cleared:
    """Its event file is not rejected any more."""
    return Cleared(
        timestep_id=None,
        system="prince",
        event_file=event_file,
        why="removed",
        episode=_episode(event_file, episode),
    )


def _episode(event_file: str, number: int) -> UUID:
    return uuid5(UUID(int=number), event_file)


def said(data: EventData, seconds: float = 0, *, source: str = "test") -> LogEvent:
    """An event that was said so many seconds after noon."""
    return LogEvent.of(data, source).model_copy(update={"time": NOON + timedelta(seconds=seconds)})


def delivered(*events: LogEvent) -> list[Entry]:
    """Entries of the stream, in which the events stand one after the other."""
    return [
        Entry(f"{next(_entry_numbers)}-0", {"event": event.model_dump_json(), "type": event.type}) for event in events
    ]
