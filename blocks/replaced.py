"""Objects that took the place of others: what was said of a key before that is not about them."""

from datetime import datetime
from typing import cast
from uuid import UUID

from sqlalchemy import func
from sqlmodel import Session, col, select

from blocks.bulk import among
from blocks.messages import Uploaded
from blocks.tables import Timestep, TimestepEvent


def replaced_objects(session: Session, keys: set[str]) -> dict[UUID, datetime]:
    """Of the timesteps with these keys, those that were uploaded before with other content, and since when it is this.

    By our clock or the store's, whichever is later: a notice of an archive that came before is about other bytes.
    """
    event = TimestepEvent
    uploads = (
        select(event.timestep_id)
        .join(Timestep, col(Timestep.id) == col(event.timestep_id))
        .where(among(Timestep.key, keys), event.type == Uploaded.type)
        .group_by(col(event.timestep_id))
        .having(func.count() > 1)
    )
    again = session.exec(uploads).all()
    if not again:
        return {}
    said: dict[UUID, list[tuple[datetime, Uploaded]]] = {}
    for id, at, data in session.exec(
        select(event.timestep_id, event.time, event.data)
        .where(among(event.timestep_id, again), event.type == Uploaded.type)
        .order_by(col(event.time), col(event.id))
    ):
        said.setdefault(cast(UUID, id), []).append((at, Uploaded.model_validate({"images": [], **data})))
    return {
        id: max(history[-1][0], history[-1][1].modified_at or history[-1][0])
        for id, history in said.items()
        if any(not _same(upload, history[-1][1]) for _, upload in history)
    }


def _same(one: Uploaded, other: Uploaded) -> bool:
    """Whether two uploads are of the same bytes. One that was found in the bucket has no SHA-256."""
    return one.etag == other.etag or (one.sha256 is not None and one.sha256 == other.sha256)
