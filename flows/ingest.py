"""Stage one: take a timestep in, once it is complete, and tell everybody through the stream."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect import State, flow, get_run_logger, task

from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.event_log import EventLog
from blocks.imaging_system import Fingerprint, ImagesMissing, ImagingSystem
from blocks.messages import Cleared, Ingested, LogEvent, Rejected
from blocks.settings import get_settings

STAGE = "event-ingester"

# Images that are still arriving are waited for this long (seconds), then the file is rejected
# until something changes in its directory.
IMAGE_DELAYS = [1.0, 2.0, 5.0, 10.0, 30.0, 60.0]


def announce(system: ImagingSystem, event_file: str, event: ImagingEvent, log: EventLog) -> Ingested:
    """Append `timestep.ingested` for a complete timestep; saying it again changes nothing.

    Raises:
        InvalidEventFile: when another timestep was announced under the same id.
    """
    ingested = Ingested(timestep_id=event.timestep_id, system=system.name, event_file=event_file, event=event)
    if log.register.identify(str(event.timestep_id), ingested.digest) != ingested.digest:
        raise InvalidEventFile(
            f"timestep {event.timestep_id} was announced before with other content; give it an id of its own"
        )
    log.append(LogEvent.of(ingested, STAGE))
    return ingested


def take_in(system: ImagingSystem, event_file: str, event: ImagingEvent, seen: Fingerprint, log: EventLog) -> Ingested:
    """Announce a complete timestep, and be done with its event file as it was seen.

    Raises:
        InvalidEventFile: when another timestep was announced under the same id.
    """
    ingested = announce(system, event_file, event, log)
    clear(system.name, event_file, event.timestep_id, log)
    log.register.conclude(system.name, event_file, Fingerprint(file=seen.file).model_dump_json())
    return ingested


def reject(
    system: ImagingSystem, event_file: str, event: ImagingEvent | None, reason: str, seen: Fingerprint, log: EventLog
) -> str:
    """Append `event-file.rejected`; the file stays where it is, and is looked at again when it changes.

    Returns:
        The sentence that names the file and the cause.
    """
    sentence = f"{system.directory / event_file} was rejected: {reason}"
    episode = log.register.open_rejection(system.name, event_file)
    rejected = Rejected(
        timestep_id=event.timestep_id if event else None,
        system=system.name,
        event_file=event_file,
        reason=sentence,
        fingerprint=seen.model_dump_json(),
        episode=episode,
    )
    log.append(LogEvent.of(rejected, STAGE))
    # What changed meanwhile is looked at again, also when it changes back: a share may have been away,
    # or the file itself, so that its rejection is over already.
    with suppress(FileNotFoundError):
        if (
            system.fingerprint(event_file, seen.img_dir) == seen
            and log.register.rejection(system.name, event_file) == episode
        ):
            log.register.conclude(system.name, event_file, seen.model_dump_json())
    return sentence


def clear(system: str, event_file: str, taken_in_as: UUID | None, log: EventLog) -> None:
    """Append `event-file.cleared` where an event file was rejected and is not any more.

    Args:
        taken_in_as: the timestep; None when the file was removed.
    """
    episode = log.register.rejection(system, event_file)
    if episode is None:
        return
    cleared = Cleared(
        timestep_id=taken_in_as,
        system=system,
        event_file=event_file,
        why="taken in" if taken_in_as else "removed",
        episode=episode,
    )
    log.append(LogEvent.of(cleared, STAGE))
    if taken_in_as is None:
        log.register.forget(system, event_file)
    # The last step: until then, a crash leaves an episode that is cleared again.
    log.register.close_rejection(system, event_file, episode)


async def _images_are_missing(_task: object, _run: object, state: State[object]) -> bool:
    return isinstance(await state.aresult(raise_on_failure=False), ImagesMissing)


@task(
    task_run_name="wait for images of {event_file}",
    retries=len(IMAGE_DELAYS),
    retry_delay_seconds=IMAGE_DELAYS,
    retry_condition_fn=_images_are_missing,
)
async def wait_for_images(system: ImagingSystem, event_file: str, event: ImagingEvent) -> None:
    """Retries while images are missing."""
    await asyncio.to_thread(system.check_images, event)


@flow(name="ingest-timestep", flow_run_name="ingest {system} {event_file}", persist_result=False)
async def ingest_timestep(system: str, event_file: str) -> None:
    """Take in the timestep that an event file announces.

    Args:
        system: name of the imaging system.
        event_file: path of the event file below the system's directory.

    Raises:
        InvalidEventFile: when it was rejected; the message names the file and the cause.
    """
    settings = get_settings()
    settings.require("data_dir")
    log = EventLog.from_settings(settings)
    source = await ImagingSystem.configured(system, cast(Path, settings.data_dir))
    event: ImagingEvent | None = None
    # Taken before reading: a change in between makes the watcher look again.
    seen = source.fingerprint(event_file)
    try:
        event = await asyncio.to_thread(source.read_event, event_file)
        seen = source.fingerprint(event_file, event.img_dir)
        await wait_for_images(source, event_file, event)
        ingested = await asyncio.to_thread(take_in, source, event_file, event, seen, log)
    except (InvalidEventFile, ImagesMissing) as error:
        sentence = await asyncio.to_thread(reject, source, event_file, event, str(error), seen, log)
        raise InvalidEventFile(sentence) from error
    finally:
        log.close()
    get_run_logger().info("%s %s takes its way: %s", system, event_file, ingested.event.key)
