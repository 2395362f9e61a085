"""Stage two: one tar per timestep, from disk to object storage, proven."""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import anyio
import httpx
from prefect import State, flow, get_run_logger, states
from prefect.runtime import flow_run as current_run
from prefect.states import Completed
from pydantic import Json
from redis.exceptions import RedisError

from blocks.bundle import Bundle
from blocks.event_file import InvalidEventFile
from blocks.event_log import EventLog
from blocks.image_directory import NotAllowed, SystemAway
from blocks.image_survey import Survey
from blocks.imaging_system import ImagingSystem
from blocks.lease import LeaseLost, LeaseTaken, hold
from blocks.logs import log_about
from blocks.messages import Failed, Ingested, LogEvent, Uploaded
from blocks.object_errors import KeyTaken
from blocks.object_store import ObjectStore
from blocks.remembered import Remembered
from blocks.settings import Settings, get_settings
from blocks.staging import Copy, Staging
from blocks.synthetic_timestep import is_synthetic
from blocks.upload_journal import RedisJournal
from flows.again import TRIES, count_tries, elsewhere, reason_of, tell, try_again
from flows.shares import check_answers, while_it_answers
from flows.upload_artifact import publish

logger = logging.getLogger(__name__)

STAGE = "upload-worker"
OBJECT_STORE = "archive"  # name of the ObjectStore block
# Only a person can do something about these.
PERMANENT = (InvalidEventFile, KeyTaken)
# When it is not about the timestep, the pause grows no longer than this (seconds).
SERVICE_PAUSE = 30.0
# A cancelled run waits this long (seconds) for the request that is under way.
STOP_SECONDS = 3.0

_object_stores = Remembered(ObjectStore)


class Stopped(Exception):
    """The upload was told to stop."""


class NotWanted(Exception):
    """A flight check has taken its timestep back: there is nothing to upload any more."""


def upload(
    timestep: Ingested,
    settings: Settings,
    store: ObjectStore,
    log: EventLog,
    wanted: Callable[[], bool] = lambda: True,
) -> Uploaded:
    """Stream a timestep's images into one object and prove what is there.

    The same timestep gives the same bytes under the same key, so doing it again is harmless: what is
    there already is recognised, and what an attempt that died has sent is not sent again.

    Args:
        wanted: whether to go on; asked before every write.

    Raises:
        ImagesMissing, InvalidEventFile: when the images on disk are not those announced any more.
        KeyTaken: when something else is stored under the timestep's key.
        LeaseTaken: while another process uploads the same timestep.
        NotWanted: when it was withdrawn.
        Stopped: when it is not wanted any more.
    """
    started_at = datetime.now(UTC)
    key = timestep.event.key
    with hold(log.redis, lease_name(log, key), wanted=wanted) as lease:
        # Who withdraws a timestep holds the lease too, after saying so.
        if is_synthetic(timestep.system, timestep.event) and log.register.is_withdrawn(str(timestep.timestep_id)):
            raise NotWanted(f"{key} was withdrawn, so there is nothing to upload")
        copy = find_copy(timestep, settings)
        if copy:
            # What has the source's state in the log has to be what the source held, also should a bit flip meanwhile.
            bundle = Bundle.of(copy.directory, timestep.metadata, copy.hashes)
        else:
            bundle = Bundle.of(find_images(timestep, settings), timestep.metadata)
        journal = RedisJournal(log.redis, store.bucket_name)

        def may_write() -> None:
            if not wanted():
                raise Stopped(f"the upload of {key} was stopped: its flow run is over")
            lease.check()

        stored = store.upload(bundle, key, timestep.timestep_id, journal, may_write)
    return Uploaded(
        timestep_id=timestep.timestep_id,
        system=timestep.system,
        event=timestep.event,
        bucket=store.bucket_name,
        started_at=started_at,
        source_state=copy.source_state if copy else bundle.source_state,
        copy_state=bundle.source_state if copy else None,
        **dict(stored),
    )


def find_copy(timestep: Ingested, settings: Settings) -> Copy | None:
    """The copy in staging, if there is a sound one of all images, which is read then instead of the source.

    Raises:
        OSError: when a copy, or a source that is there, can't be read now.
    """
    if not settings.staging_dir:
        return None
    event = timestep.event
    source = source_of(timestep, settings) / event.img_dir
    copy = Staging.from_settings(settings).find(timestep.system, timestep.timestep_id, source, timestep.digest)
    if copy is None:
        return None
    survey = Survey.of(copy.directory, event.img_dir, event.img_count, headers=False)
    if survey.shortage or (survey.surplus and not timestep.warnings):
        logger.warning("%s is passed over: %s", copy.directory, survey.shortage or survey.surplus)
        return None
    return copy


def source_of(timestep: Ingested, settings: Settings) -> Path:
    """The directory of its system."""
    return cast(Path, settings.data_dir) / timestep.system


def read_by(timestep: Ingested, settings: Settings) -> list[Path]:
    """The directories that its upload reads, each of which may be a share that hangs."""
    return [source_of(timestep, settings), *([settings.staging_dir] if settings.staging_dir else [])]


def find_images(timestep: Ingested, settings: Settings) -> Path:
    """The directory on the source.

    Raises:
        ImagesMissing, InvalidEventFile: when the images on disk are not those announced any more.
        OSError: when it can't be read now.
    """
    system = ImagingSystem(name=timestep.system, root=cast(Path, settings.data_dir))
    return system.check_images(timestep.event, accept_surplus=bool(timestep.warnings))


def lease_name(log: EventLog, key: str) -> str:
    """The lease that whoever works on the object of this key has to hold."""
    return f"{log.stream}:lease:{key}"


@flow(name="upload-timestep", flow_run_name="upload {timestep.title}", persist_result=False)
async def upload_timestep(timestep: Json[Ingested], entry_id: str | None = None) -> State[None]:
    """Upload an ingested timestep and say so in the stream; safe to run again at any time.

    Args:
        timestep: what was ingested, as JSON.
        entry_id: its entry in the stream, acknowledged when the outcome is in the stream.

    Returns:
        Completed; Failed with the reason, when only a person can do something about it or all tries are
        spent; or a state to come back later.
    """
    settings = get_settings()
    settings.require("data_dir")
    log_about(timestep.timestep_id)
    begun = current_run.run_count
    if not settings.reaches(timestep.system):
        # Normally its queue keeps it from such a host; but a run that was asked for by hand may be in another.
        return try_again(elsewhere(timestep.system), begun, longest=SERVICE_PAUSE, forever=True)
    with closing(EventLog.from_settings(settings)) as log:

        async def later(error: Exception, tries: int = begun, **how: Any) -> State[None]:
            return await tell(try_again(reason_of(error), tries, **how), "upload", timestep.timestep_id, log)

        try:
            # Where the store is and its keys come from the settings, how it is used from the block.
            store = ObjectStore.from_settings(settings).tuned_like(await _object_stores.load(OBJECT_STORE))
            for place in read_by(timestep, settings):
                await check_answers(place)
            uploaded = await until_stopped(upload, timestep, settings, store, log)
            uploaded = uploaded.model_copy(update={"flow_run_id": UUID(current_run.id)})
            await asyncio.to_thread(conclude, uploaded, entry_id, log)
        except NotWanted as error:
            if entry_id:
                await asyncio.to_thread(log.acknowledge, "upload-worker", entry_id)
            return Completed(message=str(error))
        except (LeaseTaken, LeaseLost, RedisError, httpx.HTTPError) as error:
            # Not about this timestep: another process works on it, or a service of ours is away.
            return await later(error, longest=SERVICE_PAUSE, forever=True)
        except SystemAway as error:
            # Nor is this; many timesteps may wait for the same share.
            return await later(error, forever=True)
        except Exception as error:
            # That we may not read the images may pass, like a ticket of their share that has expired.
            may_pass = isinstance(error, NotAllowed) or not isinstance(error, PERMANENT)
            if may_pass and (tries := await count_tries()) < TRIES:
                get_run_logger().warning("%s; trying again", reason_of(error))
                return await later(error, tries)
            failed = Failed(
                timestep_id=timestep.timestep_id,
                system=timestep.system,
                stage="upload",
                reason=reason_of(error),
                event=timestep.event,
                flow_run_id=UUID(current_run.id),
                attempt=begun,
            )
            await asyncio.to_thread(conclude, failed, entry_id, log)
            get_run_logger().exception("given up")
            return states.Failed(message=failed.reason)
    await publish(uploaded, settings)
    return Completed(message=uploaded.key)


async def until_stopped(
    upload: Callable[[Ingested, Settings, ObjectStore, EventLog, Callable[[], bool]], Uploaded],
    timestep: Ingested,
    settings: Settings,
    store: ObjectStore,
    log: EventLog,
) -> Uploaded:
    """Upload in a thread. When this is not waited for any more, the upload ends before the next request that writes.

    Its lease runs out then, also while the thread hangs: whoever works on the timestep next may reach its share.

    Raises:
        SystemAway: when the share does not answer meanwhile.
    """
    stop = threading.Event()
    work = asyncio.to_thread(upload, timestep, settings, store, log, lambda: not stop.is_set())
    thread = asyncio.ensure_future(work)
    # Its error is seen, also where nobody waits for it any more.
    thread.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    try:
        return await while_it_answers(thread, *read_by(timestep, settings))
    except SystemAway:
        stop.set()
        raise
    except asyncio.CancelledError:
        stop.set()
        with anyio.CancelScope(shield=True):
            # Its run ends only after it: nobody shall take the run for stopped while bytes are being sent.
            await asyncio.wait([thread], timeout=STOP_SECONDS)
        raise


def conclude(outcome: Uploaded | Failed, entry_id: str | None, log: EventLog) -> None:
    """Put the outcome into the stream, and only then acknowledge the entry that asked for it."""
    log.append(LogEvent.of(outcome, STAGE))
    log.waits.end(outcome.timestep_id)
    if entry_id:
        log.acknowledge("upload-worker", entry_id)
