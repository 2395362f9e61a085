"""Gives a group once more what it has set aside."""

from collections.abc import Collection, Iterator
from contextlib import closing

from blocks.dead_letters import DeadLetter
from blocks.entry import GROUPS, Group
from blocks.event_log import EventLog
from blocks.settings import Settings


def replay(settings: Settings, entry_ids: Collection[str] = (), *, discard: bool = False) -> Iterator[str]:
    """Re-drive dead letters, or forget them, and say of each what was done.

    Whoever works for the group takes the entry up at once. What fails again is set aside again, with the new reason.

    Args:
        entry_ids: only the letters of these entries of the stream; all if empty.
        discard: forget them instead.
    """
    with closing(EventLog.from_settings(settings)) as log:
        for group in GROUPS:
            for letter in list(log.dead_letters(group)):
                if not entry_ids or letter.entry.id in entry_ids:
                    yield _replay_one(log, group, letter, discard)


def _replay_one(log: EventLog, group: Group, letter: DeadLetter, discard: bool) -> str:
    what = f"{letter.entry.type or 'entry'} {letter.entry.id}"
    if letter.timestep_id:
        what += f" of timestep {letter.timestep_id}"
    cause = f"set aside by {group} at {letter.set_aside_at:%Y-%m-%d %H:%M:%S} UTC: {letter.reason}"
    if discard:
        log.dead_letters(group).discard(letter)
        return f"discarded {what}, {cause}"
    if log.dead_letters(group).redrive(letter) == "gone":
        return f"kept {what}, because it is not in the stream any more; --discard forgets it. It was {cause}"
    return f"given to {group} again: {what}, {cause}"
