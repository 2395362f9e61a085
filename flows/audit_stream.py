"""What the stream and the database's history tell differently, as far back as the stream goes."""

import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from functools import partial
from itertools import groupby
from typing import cast

from sqlalchemy import BigInteger, Engine, func, tuple_
from sqlalchemy import cast as as_type
from sqlmodel import Session, select

from blocks.bulk import among
from blocks.entry import Place, place_of
from blocks.event_log import EventLog
from blocks.findings import Finding
from blocks.log_index import Said, said_in
from blocks.tables import TimestepEvent
from flows.side_by_side import side_by_side

# So many events are looked up in the history at once.
_AT_ONCE = 500


def audit_stream(log: EventLog, engine: Engine, grace: timedelta) -> Iterator[Finding]:
    """Events that the history lacks, though the state-manager is done with them, and what the stream has lost.

    Args:
        grace: what is younger may still be on its way.
    """
    before = _done_before(log, grace)
    set_aside = {letter.entry_id for letter in log.dead_letters("state-manager")}
    in_stream = (said for said in said_in(log, before) if said.entry_id not in set_aside)
    in_history = _recorded(engine, _beginning(log), before)
    pairs = side_by_side(in_stream, in_history, _order)
    unrecorded: list[Said] = []
    for is_lost, run in groupby(pairs, key=lambda pair: pair[0] is None):
        if is_lost:
            yield _lost(cast(Said, recorded) for _, recorded in run)
            continue
        for said, recorded in run:
            if said and recorded is None:
                unrecorded.append(said)
            if len(unrecorded) == _AT_ONCE:
                yield from _not_recorded(unrecorded, log, engine)
                unrecorded = []
    yield from _not_recorded(unrecorded, log, engine)


def _lost(run: Iterator[Said]) -> Finding:
    """One finding for all that is recorded between two entries that are there."""
    first = last = next(run)
    count = 1
    for last in run:  # noqa: B007 -- the last one is wanted
        count += 1
    subject = str(first) if first == last else f"{count} events, from {first} to {last}"
    action = "Redis forgot them: other readers never got them; see to its append-only file, and to what is not uploaded"
    return Finding("event that the stream lost", subject, action)


def _not_recorded(events: list[Said], log: EventLog, engine: Engine) -> Iterator[Finding]:
    """Those of them that the history lacks: what was said twice stands there under its first entry."""
    ids = [said.event_id for said in events]
    with Session(engine) as session:
        known = set(session.exec(select(TimestepEvent.id).where(among(TimestepEvent.id, ids))))
    for said in events:
        if said.event_id is None:
            yield Finding("entry that can't be read", str(said), "see who else writes to the stream")
        elif said.event_id not in known:
            fix = partial(_repeat, log, said.entry_id)
            yield Finding("event that the database lacks", str(said), "say it again, so that it is recorded", fix)


def _repeat(log: EventLog, entry_id: str) -> None:
    entry = log.entry(entry_id)
    if entry is not None:
        log.repeat(entry.decode())


def _order(said: Said) -> tuple[Place, str]:
    return said.place, str(said.event_id)


def _beginning(log: EventLog) -> Place:
    """Where the stream begins, or would begin if something was said now."""
    for page in log.pages(1):
        return page[0].place
    milliseconds, number = place_of(log.newest())
    return milliseconds, number + 1


def _done_before(log: EventLog, grace: timedelta) -> Place:
    """Before which place all is recorded, as far as the state-manager says."""
    moments = [time.time() - grace.total_seconds()]
    if oldest := log.backlog("state-manager").oldest_at:
        moments.append(oldest.timestamp())
    return int(min(moments) * 1000), 0


def _recorded(engine: Engine, beginning: Place, before: Place) -> Iterator[Said]:
    """The history between two places of the stream, oldest first."""
    event = TimestepEvent
    milliseconds, number = (as_type(func.split_part(event.entry_id, "-", part), BigInteger) for part in (1, 2))
    query = (
        select(event.entry_id, event.id, event.type, event.timestep_id)
        .where(tuple_(milliseconds, number) >= beginning, tuple_(milliseconds, number) < before)
        .order_by(milliseconds, number)
        .execution_options(yield_per=1000)
    )
    with closing(Session(engine)) as session:
        for entry_id, event_id, type, timestep_id in session.exec(query):
            yield Said(entry_id, event_id, type, str(timestep_id or ""))
