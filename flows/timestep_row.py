"""What a timestep's events say about it."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar, cast

from blocks.messages import EventData, Failed, Ingested, Uploaded, Withdrawn
from blocks.synthetic_timestep import is_synthetic

# The events that a timestep's row is computed from. Each says all that was announced, or that there is no row.
TELLING = (Ingested, Uploaded, Failed, Withdrawn)

Said = tuple[datetime, EventData]
T = TypeVar("T", bound=EventData)


def timestep_row(history: Sequence[Said]) -> dict[str, Any] | None:
    """What a timestep's history, oldest event first, says about it; None if there is no such timestep any more.

    The first ingestion stands, and the last upload. A failure counts until it is followed by an upload.
    """
    if _is_withdrawn(history):
        return None
    ingested_at, ingestion = _first(Ingested, history)
    uploaded_at, upload = _first(Uploaded, reversed(history))
    failed_at, failure = _first(Failed, reversed(history))
    if failed_at and uploaded_at and uploaded_at >= failed_at:
        failed_at, failure = None, None
    announcement = cast(Ingested | Uploaded | Failed, ingestion or upload or failure)
    event = announcement.event
    return {
        "id": announcement.timestep_id,
        "system": announcement.system,
        "experiment_id": event.experiment_id,
        "plate": event.plate,
        "cross_date": event.cross_date,
        "position": event.position,
        "type": event.event_type,
        "timestamp": event.timestamp,
        "image_count": event.img_count,
        "image_dir": event.img_dir,
        "announced": event.document(),
        "ingested_at": ingested_at,
        "event_file": ingestion and ingestion.event_file,
        "uploaded_at": uploaded_at,
        "bucket": upload and upload.bucket,
        "key": upload and upload.key,
        "size": upload and upload.size,
        "etag": upload and upload.etag,
        "sha256": upload and upload.sha256,
        "layout_digest": upload and upload.layout_digest,
        "upload_started_at": upload and upload.started_at,
        "verified_at": upload and upload.proof.verified_at,
        "checks": upload and upload.proof.checks,
        "failed_at": failed_at,
        "failed_stage": failure and failure.stage,
        "failed_reason": failure and failure.reason,
        "failed_flow_run_id": failure and failure.flow_run_id,
    }


def _is_withdrawn(history: Sequence[Said]) -> bool:
    """Whether it was withdrawn, and never was anything but a flight check's: no microscope's timestep can be."""
    told = [data for _, data in history if isinstance(data, Ingested | Uploaded | Failed)]
    return len(told) < len(history) and all(is_synthetic(data.system, data.event) for data in told)


def _first(kind: type[T], history: Iterable[Said]) -> tuple[datetime, T] | tuple[None, None]:
    return next(((at, data) for at, data in history if isinstance(data, kind)), (None, None))
