"""Stage one: take a timestep in, once it is complete, and tell everybody through the stream."""

import asyncio
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect import State, flow, get_run_logger, task
from prefect.context import FlowRunContext
from prefect.runtime import flow_run as current_run
from prefect.states import Completed, Scheduled
from redis.exceptions import RedisError

from blocks.discovery import is_event_file
from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.event_log import EventLog
from blocks.image_directory import NotAllowed, SystemAway
from blocks.imaging_system import ImagesMissing, ImagingSystem
from blocks.logs import log_about
from blocks.remembered import Remembered
from blocks.settings import get_settings
from blocks.source_file import BundleError, SourceChanged
from blocks.staging import CopyOfAnother, NeverFits, Staging, StagingFull
from blocks.synthetic_timestep import SYSTEM, is_reserved, is_synthetic
from flows.again import TRIES, count_tries, elsewhere, reason_of, tell, try_again
from flows.looks import is_being_written, look_at, tick_left
from flows.outcome import identify, reject, take_in, with_images
from flows.shares import answering

# Between two looks for images that are still arriving (seconds); the pause grows with the time waited.
SHORTEST_PAUSE = 2.0
LONGEST_PAUSE = 60.0
# The clock of a file server may be behind ours by so much (seconds), as where it takes local time for UTC.
CLOCKS_DIFFER_SECONDS = 24 * 3600.0
# Between the two looks at images that are all there and as long as they say (seconds).
SECOND_LOOK_SECONDS = 0.2
# So many characters of a rejection stand in the message of its run's state.
MOST_OF_A_MESSAGE = 4000

_systems = Remembered(ImagingSystem)


def check_place(system: str, event_file: str) -> None:
    """Make sure that an event file lies where event files do: a run may be asked for by anybody, by hand too.

    Raises:
        InvalidEventFile: when it does not, or the system's name is more than a name.
    """
    name = event_file.removeprefix("events/")
    if "/" in system or system in ("", ".", "..") or "/" in name or name == event_file or not is_event_file(name):
        raise InvalidEventFile(f"{event_file!r} of {system!r} is no event file; give a system and events/NAME.json")


def check_not_reserved(system: str, event: ImagingEvent) -> None:
    """Make sure that no microscope uses the name or the type of the flight check: it deletes what it sent.

    Raises:
        InvalidEventFile: when one does.
    """
    if is_reserved(system, event) and not is_synthetic(system, event):
        raise InvalidEventFile(
            f"the system and the event_type {SYSTEM} are kept for the flow of that name; give the microscope's "
            "directory, or the timestep, another one"
        )


async def find_images(system: ImagingSystem, event: ImagingEvent, *, in_time: bool) -> list[str]:
    """Make sure that the images are complete; returns what is accepted though it is not as announced.

    Raises:
        ImagesMissing: when there is something to wait for.
        InvalidEventFile: when the timestep can't be taken in.
    """
    earlier = look_at(system, event)
    survey = await asyncio.to_thread(system.survey, event)
    warnings = system.judge(survey, in_time=in_time)
    # Clocks of file servers differ from ours, so only two looks prove that nothing is being written.
    if time.time() - survey.changed_at < max(CLOCKS_DIFFER_SECONDS, system.settle_seconds):
        # Complete images, announced after they were written, are hardly touched again: a short pause will tell.
        pause = system.settle_seconds if warnings else min(SECOND_LOOK_SECONDS, system.settle_seconds)
        if earlier and earlier.found == survey.found:
            pause -= time.monotonic() - earlier.at
        await asyncio.sleep(max(pause, 0.0))
        again = await asyncio.to_thread(system.survey, event, headers=False)
        if again.found != survey.found:
            raise ImagesMissing(f"images in {event.img_dir} are still being written")
    return warnings


@task(task_run_name="copy {event.img_dir}")
async def stage(system: ImagingSystem, event: ImagingEvent, announcement: str) -> None:
    """Copy the images to staging, where the upload finds them.

    Args:
        announcement: what the timestep's id stands for, so that no other timestep takes the copy for its own.

    Raises:
        StagingFull: when there is no room now. A timestep that never fits is uploaded without a copy.
        ImagesMissing: when they change meanwhile.
        InvalidEventFile: when they can't be bundled as they are.
    """
    staging = Staging.from_settings(get_settings())
    try:
        source = system.directory / event.img_dir
        await asyncio.to_thread(staging.stage, system.name, event.timestep_id, source, announcement)
    except (NeverFits, CopyOfAnother) as error:
        get_run_logger().warning("%s is uploaded without a copy: %s", event.img_dir, error)
    except SourceChanged as error:
        raise ImagesMissing(str(error)) from error
    except BundleError as error:
        raise InvalidEventFile(str(error)) from error


def wait_for_images(why: str, since: datetime, system: ImagingSystem) -> State[None]:
    """The state of a run that waits: seen in the UI with what is missing, and without a place in the pool."""
    now = datetime.now(UTC)
    waited = (now - since).total_seconds()
    pause = min(max(SHORTEST_PAUSE, waited / 4), LONGEST_PAUSE, max(1.0, system.image_deadline_seconds - waited))
    return Scheduled(scheduled_time=now + timedelta(seconds=pause), name="AwaitingImages", message=f"waiting, as {why}")


def _began() -> datetime:
    """When this flow run looked for images first: its deadline counts from then, and not while it waits for a place."""
    context = FlowRunContext.get()
    # What is known of a run was read before it began, so a run that looks for the first time has no start yet.
    started = context.flow_run.start_time if context and context.flow_run else None
    return started or datetime.now(UTC)


@flow(name="ingest-timestep", flow_run_name="ingest {system} {event_file}", persist_result=False)
async def ingest_timestep(system: str, event_file: str) -> State[None]:
    """Take in the timestep that an event file announces.

    Args:
        system: name of the imaging system.
        event_file: path of the event file below the system's directory.

    Returns:
        A state to come back later, while images are waited for, or Redis or the share is away.

    Raises:
        InvalidEventFile: when it was rejected; the message names the file and the cause.
    """
    check_place(system, event_file)
    settings = get_settings()
    settings.require("data_dir")
    if not settings.reaches(system):
        return try_again(elsewhere(system), current_run.run_count, longest=LONGEST_PAUSE, forever=True)
    source = await ImagingSystem.configured(system, cast(Path, settings.data_dir), _systems.load)
    began = _began()
    in_time = (datetime.now(UTC) - began).total_seconds() < source.image_deadline_seconds
    event: ImagingEvent | None = None
    with closing(EventLog.from_settings(settings)) as log:

        async def waiting(state: State[None]) -> State[None]:
            return await tell(state, "ingest", event.timestep_id if event else None, log)

        try:
            async with answering(source.directory):
                await asyncio.sleep(await asyncio.to_thread(tick_left, source, event_file))
                # Taken before reading: a change in between makes the watcher look again.
                seen = await asyncio.to_thread(source.fingerprint, event_file)

                async def rejected(reason: str, *, may_pass: bool = False) -> InvalidEventFile:
                    about = (source, event_file, event, reason, seen, log)
                    sentence = await asyncio.to_thread(reject, *about, may_pass=may_pass)
                    # The whole list of what is missing is in the rejection; here it would hide the run's other lines.
                    return InvalidEventFile(sentence[:MOST_OF_A_MESSAGE] + " …" * (len(sentence) > MOST_OF_A_MESSAGE))

                try:
                    event = await asyncio.to_thread(source.read_event, event_file)
                    log_about(event.timestep_id)
                    check_not_reserved(system, event)
                    seen = await asyncio.to_thread(with_images, seen, source, event_file, event)
                    warnings = await find_images(source, event, in_time=in_time)
                    if await asyncio.to_thread(lambda: source.is_staged):
                        # First of all: what another event announced under the same id must not get into its copy.
                        settings.require("staging_dir")
                        ingested = await asyncio.to_thread(identify, source, event_file, event, log)
                        async with answering(cast(Path, settings.staging_dir)):
                            await stage(source, event, ingested.digest)
                    this_run = UUID(current_run.id)
                    ingested = await asyncio.to_thread(
                        take_in, source, event_file, event, seen, log, warnings, this_run
                    )
                except StagingFull as error:
                    # Longer than until this run says it again.
                    seconds = 3 * LONGEST_PAUSE
                    await asyncio.to_thread(log.systems.tell_of_no_room, system, str(error), seconds)
                    later, why = datetime.now(UTC) + timedelta(seconds=LONGEST_PAUSE), f"waiting, as {error}"
                    return await waiting(Scheduled(scheduled_time=later, name="AwaitingSpace", message=why))
                except ImagesMissing as error:
                    if in_time:
                        return await waiting(wait_for_images(str(error), began, source))
                    raise await rejected(str(error)) from error
                except OSError as error:
                    # A disk that has a bad sector, or no room for a copy. It may pass, but somebody has to hear of it.
                    if (tries := await count_tries()) < TRIES:
                        return await waiting(try_again(reason_of(error), tries))
                    raise await rejected(reason_of(error), may_pass=True) from error
                except InvalidEventFile as error:
                    if event is None and await asyncio.to_thread(is_being_written, source, event_file):
                        later = datetime.now(UTC) + timedelta(seconds=source.settle_seconds)
                        return Scheduled(scheduled_time=later, name="AwaitingEventFile", message=f"waiting, as {error}")
                    raise await rejected(str(error), may_pass=isinstance(error, NotAllowed)) from error
        except (RedisError, SystemAway) as error:
            # Not about this event file.
            return await waiting(
                try_again(reason_of(error), current_run.run_count, longest=LONGEST_PAUSE, forever=True)
            )
    get_run_logger().info("%s %s takes its way: %s", system, event_file, ingested.event.key)
    return Completed(message="; ".join(["taken in", *warnings]))
