"""Which timesteps were uploaded long enough ago to look at their files, as the database knows it. Only reads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import NamedTuple, cast
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import Engine, text, tuple_
from sqlmodel import Session, col, or_, select

from blocks.messages import Archived, Ingested, Uploaded
from blocks.proven_object import Image
from blocks.replaced import replaced_objects
from blocks.tables import Timestep, TimestepEvent, TimestepImage

_PAGE = 200

# The image directories of a system and those above them that a share may take for one, as it looks neither at case
# nor at how an accent is encoded, nor at dots and blanks at an end. More of them than there are do no harm: they are
# looked up on the share.
_ALIKE = text("""
with announced as (
    select image_dir from timestep where system = :system union select unnest(cast(:more as text[]))
), spelling as (
    select array_to_string(parts[1:depth], '/') as path, bool_or(depth = cardinality(parts)) as is_whole
    from announced, string_to_array(image_dir, '/') as parts, generate_series(1, cardinality(parts)) as depth
    group by path
)
select array_agg(path), array_agg(is_whole) from spelling
group by lower(regexp_replace(normalize(path, NFKD), '[. ]+(?=/|$)|[^ -~]', '', 'g')) having count(*) > 1
""")


class NotProven(Exception):
    """A timestep's files have to stay; the message says why."""


@dataclass(frozen=True)
class Purgeable:
    """A timestep that was uploaded, and what was recorded of it."""

    row: Timestep
    ingested: Ingested
    images: Mapping[str, Image]
    """By their names: paths below the image directory."""
    source_state: str | None
    """Of the image directory when the upload, or the copy it was made of, read it; None where nobody said so."""
    copy_state: str | None
    """Of the copy in staging when the upload read it."""
    notices: Sequence[Archived]
    """That say the object is on tape, as it is now. Those with an ETag tell what a tag says, the others an archive."""


class Spelling(NamedTuple):
    """An image directory, or one above it, as somebody announced it."""

    path: str
    is_whole: bool
    """Whether it is an image directory itself."""


@dataclass(frozen=True)
class Outcome:
    """What became of one timestep's files."""

    title: str
    files: int = 0
    bytes: int = 0
    kept: str = ""
    """Why they stay; empty if they don't."""

    def __str__(self) -> str:
        return f"{self.title}: " + (f"kept, {self.kept}" if self.kept else f"{self.files} files, {self.bytes} bytes")


class PurgeableTimesteps:
    """The timesteps of the database, for whoever deletes files."""

    def __init__(self, engine: Engine) -> None:
        # The state-manager is the one that writes.
        self._engine = engine.execution_options(postgresql_readonly=True)

    def find(self, timestep_id: UUID) -> Timestep | None:
        """The row of a timestep, if there is one."""
        with Session(self._engine) as session:
            return session.get(Timestep, timestep_id)

    def uploaded_before(self, system: str, before: datetime) -> Iterator[Timestep]:
        """A system's timesteps, oldest upload first, of which the source is not known to be deleted."""
        uploaded_at, purged_at = col(Timestep.uploaded_at), col(Timestep.source_purged_at)
        query = select(Timestep).where(Timestep.system == system, uploaded_at < before, purged_at.is_(None))
        query = query.order_by(uploaded_at, col(Timestep.id)).limit(_PAGE)
        last: tuple[datetime, UUID] | None = None
        while True:
            with Session(self._engine) as session:
                rows = list(session.exec(query.where(tuple_(uploaded_at, col(Timestep.id)) > last) if last else query))
            if not rows:
                return
            yield from rows
            last = (cast(datetime, rows[-1].uploaded_at), rows[-1].id)

    def load(self, row: Timestep) -> Purgeable:
        """All that has to be known of one of them.

        Raises:
            NotProven: when the history does not tell it, or what it tells can't be read.
        """
        event = TimestepEvent
        first = select(event.data).where(event.timestep_id == row.id, event.type == Ingested.type)
        # The one that the row tells of.
        last = select(event.data).where(event.timestep_id == row.id, event.type == Uploaded.type)
        told = select(event.data).where(event.type == Archived.type, event.key == row.key)
        since = row.archived_at
        with Session(self._engine) as session:
            said = session.exec(told.where(event.time >= since)).all() if since else []
            data = session.exec(first.order_by(col(event.time), col(event.id))).first()
            upload = session.exec(last.order_by(col(event.time).desc(), col(event.id).desc())).first() or {}
            images = session.exec(select(TimestepImage).where(TimestepImage.timestep_id == row.id)).all()
            if data is None:
                raise NotProven("its history does not tell its event file")
            if not images:
                raise NotProven("it is not known what is in its object")
            is_replaced = row.id in replaced_objects(session, {cast(str, row.key)})
        try:
            known = {image.name: Image(**image.model_dump(exclude={"timestep_id"})) for image in images}
            ingested = Ingested.model_validate(data)
            notices = [Archived.model_validate(notice) for notice in said]
        except ValidationError as error:
            raise NotProven(f"its history can't be read: {error}") from error
        if is_replaced:
            # One that does not name its ETag may be late, and about the object that was there before.
            notices = [notice for notice in notices if notice.etag == row.etag]
        return Purgeable(row, ingested, known, upload.get("source_state"), upload.get("copy_state"), notices)

    def check_unshared(self, row: Timestep) -> None:
        """Make sure that no other timestep has its images in the same directory, or in one above or below.

        Raises:
            NotProven: when one has.
        """
        own = PurePosixPath(row.image_dir)
        query = select(Timestep.id, Timestep.image_dir).where(
            Timestep.system == row.system,
            Timestep.id != row.id,
            or_(
                col(Timestep.image_dir).in_([str(own), *map(str, own.parents)]),
                col(Timestep.image_dir).startswith(f"{own}/", autoescape=True),
            ),
        )
        with Session(self._engine) as session:
            for id, img_dir in session.exec(query.limit(1)):
                raise NotProven(f"timestep {id} has its images in {img_dir} too")

    def spelled_alike(self, system: str, more: Iterable[str]) -> dict[str, list[Spelling]]:
        """By image directories and those above them, what else is announced that its share may take for the same one.

        Args:
            more: image directories that no timestep has, or not yet.
        """
        alike: dict[str, list[Spelling]] = {}
        with Session(self._engine) as session:
            for paths, wholes in session.connection().execute(_ALIKE, {"system": system, "more": list(more)}):
                group = [Spelling(*one) for one in zip(paths, wholes, strict=True)]
                alike |= {one.path: [other for other in group if other != one] for one in group}
        return alike
