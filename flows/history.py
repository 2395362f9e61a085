"""The history: every event of the log, as it was first said."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlmodel import Session, select

from blocks.bulk import among, upsert
from blocks.messages import Archived, LogEvent
from blocks.tables import TimestepEvent


def keep_history(
    session: Session, events: Iterable[tuple[str, LogEvent]]
) -> tuple[list[LogEvent], set[tuple[str, str]]]:
    """Add to the history what it lacks. Of an event that was said twice, the first stands.

    Returns:
        What was added, and the event files (system, path) of which the history now says something else.
    """
    first: dict[UUID, tuple[str, LogEvent]] = {}
    for entry_id, event in sorted(events, key=lambda said: _precedence(said[1].time, said[0])):
        first.setdefault(event.id, (entry_id, event))
    row = TimestepEvent
    files: set[tuple[str | None, str | None]] = set()
    for id, at, known_entry_id, system, file in session.exec(
        select(row.id, row.time, row.entry_id, row.system, row.event_file).where(  # type: ignore[call-overload]
            among(row.id, first)
        )
    ):
        entry_id, event = first[id]
        if _precedence(at, known_entry_id) <= _precedence(event.time, entry_id):
            del first[id]
        else:
            # What is replaced may have named another event file: several may announce the same timestep.
            files.add((system, file))
    rows = [_history_row(entry_id, event) for entry_id, event in first.values()]
    upsert(session, TimestepEvent, rows)
    files |= {(row["system"], row["event_file"]) for row in rows}
    return [event for _, event in first.values()], {(system, file) for system, file in files if system and file}


def _precedence(at: datetime, entry_id: str) -> tuple[datetime, list[int]]:
    return at, [int(part) for part in entry_id.split("-")]


def _history_row(entry_id: str, event: LogEvent) -> dict[str, Any]:
    data = event.data
    return {
        "id": event.id,
        "entry_id": entry_id,
        "type": event.type,
        "source": event.source,
        "time": event.time,
        "timestep_id": data.timestep_id,
        "system": getattr(data, "system", None),
        "event_file": getattr(data, "event_file", None),
        "key": data.key if isinstance(data, Archived) else None,
        "data": data.model_dump(mode="json", exclude={"images"}),
    }
