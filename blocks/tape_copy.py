"""Whether a tape archive itself told that it has an object, or nothing but the object's tag."""

from sqlalchemy import ColumnElement, and_, exists, func
from sqlalchemy.orm import aliased
from sqlmodel import col

from blocks.messages import Archived, Uploaded
from blocks.tables import Timestep, TimestepEvent


def announced_on_tape() -> ColumnElement[bool]:
    """Of a timestep's row: an archive told so, of the object that is there now. A purge goes by the same.

    A notice that names an ETag tells what a tag says. One that names none may be about the object that was there
    before, where another took its place.
    """
    notice, upload = aliased(TimestepEvent), aliased(TimestepEvent)
    told = exists().where(
        col(notice.type) == Archived.type,
        col(notice.key) == col(Timestep.key),
        col(notice.time) >= col(Timestep.archived_at),
        _field(notice, "etag").is_(None),
    )
    is_replaced = exists().where(
        col(upload.type) == Uploaded.type,
        col(upload.timestep_id) == col(Timestep.id),
        _field(upload, "etag") != col(Timestep.etag),
        # One that was found in the bucket has no SHA-256.
        func.coalesce(_field(upload, "sha256") != col(Timestep.sha256), True),
    )
    return and_(col(Timestep.archived_at).is_not(None), told, ~is_replaced)


def _field(event: type[TimestepEvent], name: str) -> ColumnElement[str]:
    return func.json_extract_path_text(event.data, name)
