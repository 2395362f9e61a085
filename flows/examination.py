"""What there is of one event file, before it gets a run."""

from dataclasses import dataclass

from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.event_log import EventLog
from blocks.fingerprint import Fingerprint
from blocks.imaging_system import ImagingSystem
from flows.outcome import still_taken_in
from flows.verdicts import Verdicts


@dataclass(frozen=True)
class Examined:
    """An event file that is not dealt with."""

    state: Fingerprint
    event: ImagingEvent | None
    """What it says; None where it is not valid, or not yet."""
    conclusion: str
    """How it was dealt with when it looked otherwise; empty if it never was."""
    asked: int
    """How often somebody asked to look at it again."""


def examine(system: ImagingSystem, event_file: str, verdicts: Verdicts, log: EventLog) -> Examined | None:
    """Look at an event file; None if it is dealt with as it is. Asks Redis and the disk, so it blocks.

    Raises:
        FileNotFoundError: when it is not there any more.
        OSError: when it can't be read now.
    """
    status = (system.directory / event_file).lstat()
    conclusion = log.register.conclusion(system.name, event_file) or ""
    if conclusion:
        verdicts.learn(event_file, conclusion)
    if verdicts.stands(event_file, status, system):
        return None
    state = system.fingerprint(event_file)
    event: ImagingEvent | None
    try:
        event = system.read_event(event_file)
    except InvalidEventFile:
        event = None
    if event and conclusion and still_taken_in(system, event_file, event, conclusion, state, log):
        return None
    return Examined(state, event, conclusion, log.register.asked(system.name, event_file))
