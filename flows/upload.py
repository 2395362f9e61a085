"""Stage two: one tar per timestep, from disk to object storage, proven."""

import asyncio
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect import State, flow, get_run_logger, task
from prefect.runtime import flow_run as current_run
from pydantic import Json

from blocks.bundle import Bundle
from blocks.event_file import InvalidEventFile
from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.lease import LeaseTaken, hold
from blocks.messages import Failed, Ingested, LogEvent, Uploaded
from blocks.object_errors import KeyTaken
from blocks.object_store import ObjectStore
from blocks.settings import Settings, get_settings
from blocks.upload_journal import RedisJournal

STAGE = "upload-worker"
OBJECT_STORE = "archive"  # name of the ObjectStore block
# Only a person can do something about these.
PERMANENT = (InvalidEventFile, KeyTaken)
UPLOAD_DELAYS = [2.0, 10.0, 30.0, 60.0]


def upload(timestep: Ingested, settings: Settings, store: ObjectStore, log: EventLog) -> Uploaded:
    """Stream a timestep's images into one object and prove what is there.

    The same timestep gives the same bytes under the same key, so doing it again is harmless: what is
    there already is recognised, and what an attempt that died has sent is not sent again.

    Raises:
        ImagesMissing, InvalidEventFile: when the images on disk are not those announced any more.
        KeyTaken: when something else is stored under the timestep's key.
        LeaseTaken: while another process uploads the same timestep.
    """
    started_at = datetime.now(UTC)
    system = ImagingSystem(name=timestep.system, root=cast(Path, settings.data_dir))
    directory = system.check_images(timestep.event, accept_surplus=bool(timestep.warnings))
    bundle = Bundle.of(directory, timestep.metadata)
    key = timestep.event.key
    with hold(log.redis, lease_name(log, key)) as lease:
        journal = RedisJournal(log.redis, store.bucket_name)
        stored = store.upload(bundle, key, timestep.timestep_id, journal, lease.check)
    return Uploaded(
        timestep_id=timestep.timestep_id,
        system=timestep.system,
        event=timestep.event,
        bucket=store.bucket_name,
        started_at=started_at,
        **dict(stored),
    )


def lease_name(log: EventLog, key: str) -> str:
    """The lease that whoever works on the object of this key has to hold."""
    return f"{log.stream}:lease:{key}"


async def _may_pass(_task: object, _run: object, state: State[object]) -> bool:
    return not isinstance(await state.aresult(raise_on_failure=False), PERMANENT)


@task(
    task_run_name="upload {timestep.event.key}",
    retries=len(UPLOAD_DELAYS),
    retry_delay_seconds=UPLOAD_DELAYS,
    retry_condition_fn=_may_pass,
)
async def upload_and_prove(timestep: Ingested) -> Uploaded:
    """Retries what may pass by itself: the network, the storage, a share that is away."""
    settings = get_settings()
    # Where the store is and its keys come from the settings, how it is used from the block.
    store = ObjectStore.from_settings(settings).tuned_like(await ObjectStore.aload(OBJECT_STORE))
    with closing(EventLog.from_settings(settings)) as log:
        return await asyncio.to_thread(upload, timestep, settings, store, log)


@flow(name="upload-timestep", flow_run_name="upload {timestep.title}", persist_result=False)
async def upload_timestep(timestep: Json[Ingested], entry_id: str | None = None) -> None:
    """Upload an ingested timestep and say so in the stream; safe to run again at any time.

    Args:
        timestep: what was ingested, as JSON.
        entry_id: its entry in the stream, acknowledged when the outcome is in the stream.
    """
    get_settings().require("data_dir")
    run_id = UUID(current_run.id)
    with closing(EventLog.from_settings(get_settings())) as log:
        try:
            uploaded = await upload_and_prove(timestep)
        except LeaseTaken:
            raise  # another process does it, which is no failure of the timestep
        except Exception as error:
            failed = Failed(
                timestep_id=timestep.timestep_id,
                system=timestep.system,
                stage="upload",
                reason=f"{type(error).__name__}: {error}",
                event=timestep.event,
                flow_run_id=run_id,
                attempt=current_run.run_count,
            )
            # What may pass stays pending in the stream: the dispatcher tries again, however long it takes.
            await asyncio.to_thread(conclude, failed, entry_id if isinstance(error, PERMANENT) else None, log)
            raise
        await asyncio.to_thread(conclude, uploaded.model_copy(update={"flow_run_id": run_id}), entry_id, log)
    seconds = (uploaded.proof.verified_at - uploaded.started_at).total_seconds()
    get_run_logger().info("%s: %d bytes in %.1f s, proven", uploaded.key, uploaded.size, seconds)


def conclude(outcome: Uploaded | Failed, entry_id: str | None, log: EventLog) -> None:
    """Put the outcome into the stream, and only then acknowledge the entry that asked for it."""
    log.append(LogEvent.of(outcome, STAGE))
    if entry_id:
        log.acknowledge("upload-worker", entry_id)
