"""`archiver verify`: read objects back from the storage and prove every image against what was recorded of it."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from sqlalchemy import Engine, Select
from sqlmodel import Session, col, select

from blocks.database import create_engine
from blocks.errors import ArchiverError
from blocks.event_file import title_of
from blocks.object_errors import ObjectStoreError
from blocks.object_store import ObjectStore
from blocks.proven_object import Image
from blocks.settings import Settings
from blocks.tables import Timestep, TimestepImage, TimestepState, of_microscopes


class NothingToVerify(ArchiverError):
    """The database does not know what was asked for; the message says what."""


@dataclass(frozen=True)
class Selection:
    """Which timesteps: those with the ids, or else all uploaded ones of an experiment, of a system, or of both."""

    ids: Collection[UUID] = ()
    experiment: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Recorded:
    """A timestep as the database knows it. What says something about its object is None until it is uploaded."""

    id: UUID
    system: str
    experiment_id: str
    timestamp: datetime
    state: TimestepState
    bucket: str | None
    key: str | None
    size: int | None
    sha256: str | None

    @property
    def title(self) -> str:
        """What tells an operator which one it is."""
        return f"{title_of(self.system, self.experiment_id, self.timestamp)} ({self.id})"


def verify(settings: Settings, selection: Selection, console: Console) -> int:
    """Verify what is selected, show how far it is, and list what differs.

    Returns:
        0 when every byte is as recorded, else 1.

    Raises:
        MissingSetting, NothingToVerify: with what to do.
        ObjectStoreError: when the bucket can't be used at all.
    """
    store = ObjectStore.from_settings(settings)
    # Only the state-manager writes; PostgreSQL makes sure that we don't.
    engine = create_engine(settings).execution_options(postgresql_readonly=True)
    try:
        chosen = choose(engine, selection)
        store.check()
        differing = 0
        with _progress() as progress:
            bar = progress.add_task("", total=sum(timestep.size or 0 for timestep in chosen))
            for timestep in chosen:
                progress.update(bar, description=timestep.key or timestep.title)
                if differences := find_differences(engine, store, timestep, lambda size: progress.advance(bar, size)):
                    differing += 1
                    console.print(timestep.title, timestep.key or "", style="bold red", markup=False, highlight=False)
                    for difference in differences:
                        console.print(f"  {difference}", markup=False, highlight=False)
    finally:
        engine.dispose()
    size = decimal(sum(timestep.size or 0 for timestep in chosen))
    verified = f"{len(chosen)} timestep{'s' if len(chosen) > 1 else ''}, {size}"
    console.print(f"{verified}: {f'{differing} differ' if differing else 'all as recorded'}.", highlight=False)
    return 1 if differing else 0


def choose(engine: Engine, selection: Selection) -> list[Recorded]:
    """The selected timesteps, oldest first.

    Raises:
        NothingToVerify: if an id is not known, or nothing is uploaded of what was selected.
    """
    with Session(engine) as session:
        chosen = [Recorded(**row._mapping) for row in session.execute(_query(selection))]
    if unknown := set(selection.ids) - {timestep.id for timestep in chosen}:
        raise NothingToVerify(f"no timestep has the id {', '.join(sorted(map(str, unknown)))}")
    if not chosen:
        of = [f"experiment {selection.experiment}"] if selection.experiment else []
        of += [f"system {selection.system}"] if selection.system else []
        raise NothingToVerify(f"no timestep is uploaded{' of ' + ' and '.join(of) if of else ''}")
    return chosen


def _query(selection: Selection) -> Select[Any]:
    columns = [getattr(Timestep, name) for name in Recorded.__dataclass_fields__]
    query: Select[Any] = select(*columns).order_by(col(Timestep.timestamp), col(Timestep.id))
    if selection.ids:
        return query.where(col(Timestep.id).in_(selection.ids))
    # What a flight check sent may be gone before its turn comes.
    query = query.where(col(Timestep.uploaded_at).is_not(None), of_microscopes(Timestep))
    if selection.experiment:
        query = query.where(col(Timestep.experiment_id) == selection.experiment)
    if selection.system:
        query = query.where(col(Timestep.system) == selection.system)
    return query


def find_differences(
    engine: Engine, store: ObjectStore, timestep: Recorded, progress: Callable[[int], None]
) -> list[str]:
    """Read a timestep's object back and compare every image, and the whole, with what was recorded.

    Returns:
        A sentence for everything that differs, is missing or can't be read; nothing if all is as recorded.
    """
    if timestep.key is None or timestep.bucket is None:
        return [f"it is not uploaded: its state is {timestep.state.value}"]
    with Session(engine) as session:
        images = list(_recorded_images(session, timestep.id))
    try:
        return store.of_bucket(timestep.bucket).verify(timestep.key, images, timestep.sha256, progress)
    except ObjectStoreError as error:
        return [str(error)]


def _recorded_images(session: Session, timestep_id: UUID) -> Iterator[Image]:
    query = select(TimestepImage).where(TimestepImage.timestep_id == timestep_id)
    for image in session.exec(query):
        yield Image(name=image.name, offset=image.offset, size=image.size, sha256=image.sha256)


def _progress() -> Progress:
    # On the other stream than what is found, so that the list can be kept by itself.
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
