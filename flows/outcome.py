"""What becomes of an event file: it is taken in or rejected, or its rejection is over. All of it may be said again."""

import time
from collections.abc import Sequence
from contextlib import suppress
from uuid import UUID

from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.event_log import EventLog
from blocks.fingerprint import Fingerprint
from blocks.imaging_system import ImagingSystem
from blocks.legible import legible
from blocks.messages import Cleared, Ingested, LogEvent, Rejected

STAGE = "event-ingester"

# After so long (seconds) it is tried again to read what we were not allowed to: nothing on disk tells that we are.
NOT_ALLOWED_SECONDS = 600.0


def identify(
    system: ImagingSystem, event_file: str, event: ImagingEvent, log: EventLog, *, warnings: Sequence[str] = ()
) -> Ingested:
    """Have a timestep's id stand for what is announced, for ever; returns what would be said of it.

    Raises:
        InvalidEventFile: when another timestep was announced under the same id.
    """
    ingested = Ingested(
        timestep_id=event.timestep_id,
        system=system.name,
        event_file=event_file,
        event=event,
        warnings=list(warnings),
        priority=system.priority,
    )
    if log.register.identify(str(event.timestep_id), ingested.digest) != ingested.digest:
        raise InvalidEventFile(
            f"timestep {event.timestep_id} was announced before with other content; give it an id of its own"
        )
    return ingested


def announce(
    system: ImagingSystem,
    event_file: str,
    event: ImagingEvent,
    warnings: list[str],
    log: EventLog,
    flow_run_id: UUID | None = None,
) -> Ingested:
    """Append `timestep.ingested` for a complete timestep; saying it again changes nothing.

    Raises:
        InvalidEventFile: when another timestep was announced under the same id.
    """
    ingested = identify(system, event_file, event, log, warnings=warnings)
    ingested = ingested.model_copy(update={"flow_run_id": flow_run_id})
    log.append(LogEvent.of(ingested, STAGE))
    log.waits.end(event.timestep_id)
    return ingested


def take_in(
    system: ImagingSystem,
    event_file: str,
    event: ImagingEvent,
    seen: Fingerprint,
    log: EventLog,
    warnings: list[str] | None = None,
    flow_run_id: UUID | None = None,
) -> Ingested:
    """Announce a complete timestep, and be done with its event file as it was seen.

    Args:
        warnings: what is not as announced, and accepted all the same.
        flow_run_id: which flow run does so.

    Raises:
        InvalidEventFile: when another timestep was announced under the same id.
    """
    ingested = announce(system, event_file, event, warnings or [], log, flow_run_id)
    clear(system.name, event_file, event.timestep_id, log)
    log.register.conclude(system.name, event_file, Fingerprint(file=seen.file).model_dump_json())
    return ingested


def still_taken_in(
    system: ImagingSystem, event_file: str, event: ImagingEvent, conclusion: str, now: Fingerprint, log: EventLog
) -> bool:
    """Whether an event file was taken in as what it says now, and only its inode is another one; remembers that then.

    A share may number its files anew whenever it is mounted, and 100,000 of them must not get 100,000 runs for that.
    """
    before = Fingerprint.model_validate_json(conclusion)
    if before.access is not None or not Fingerprint.differ_in_inode_only(before.file, now.file):
        return False
    said = Ingested(timestep_id=event.timestep_id, system=system.name, event_file=event_file, event=event)
    if log.register.identity(str(event.timestep_id)) != said.digest:
        return False
    log.register.conclude(system.name, event_file, Fingerprint(file=now.file).model_dump_json())
    return True


def reject(
    system: ImagingSystem,
    event_file: str,
    event: ImagingEvent | None,
    reason: str,
    seen: Fingerprint,
    log: EventLog,
    *,
    may_pass: bool = False,
) -> str:
    """Append `event-file.rejected`; the file stays where it is, and is looked at again when it changes.

    Args:
        event: what the file announces, where it could be read.
        may_pass: the cause may pass without any change of the file, so it is looked at again after a while, too.

    Returns:
        The sentence that names the file and the cause.
    """
    sentence = legible(f"{system.directory / event_file} was rejected: {reason}")
    episode = log.register.open_rejection(system.name, event_file)
    rejected = Rejected(
        timestep_id=event.timestep_id if event else None,
        system=system.name,
        event_file=event_file,
        reason=sentence,
        fingerprint=seen.model_dump_json(),
        event=event,
        episode=episode,
    )
    log.append(LogEvent.of(rejected, STAGE))
    if event:
        log.waits.end(event.timestep_id)
    # What changed meanwhile is looked at again, also when it changes back: a share may have been away,
    # or the file itself, so that its rejection is over already.
    with suppress(FileNotFoundError):
        if system.is_as(seen, event_file) and log.register.rejection(system.name, event_file) == episode:
            until = time.time() + NOT_ALLOWED_SECONDS if may_pass else None
            verdict = seen.model_copy(update={"look_again_at": until})
            log.register.conclude(system.name, event_file, verdict.model_dump_json())
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


def with_images(seen: Fingerprint, system: ImagingSystem, event_file: str, event: ImagingEvent) -> Fingerprint:
    """What was seen of an event file before it was read, and what is there of its images now.

    Raises:
        FileNotFoundError: when the event file is not there any more.
    """
    now = system.fingerprint(event_file, event.img_dir, content=True)
    # A file that was put in its place since then has not been read.
    return now.model_copy(update={"file": seen.file, "access": seen.access})
