"""Takes synthetic timesteps back: their files, objects and rows. Killed at any moment, it may be done again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast
from uuid import UUID

from sqlalchemy import Engine
from sqlmodel import Session, select

from blocks import synthetic_files, synthetic_object
from blocks.event_log import EventLog
from blocks.lease import hold
from blocks.messages import LogEvent, Uploaded, Withdrawn
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.staging import Staging
from blocks.synthetic_object import NotAsSent
from blocks.synthetic_timestep import SYSTEM, announcement
from blocks.tables import Timestep
from flows.outcome import clear
from flows.upload import lease_name

STAGE = "flight-check"
_LEFT = "as a former flight check had left it"


@dataclass(frozen=True)
class Places:
    """Everywhere a synthetic timestep leaves something."""

    root: Path
    staging: Staging | None
    store: ObjectStore
    engine: Engine
    log: EventLog

    @classmethod
    def of(cls, settings: Settings, engine: Engine, log: EventLog) -> Self:
        """Those of this installation. The storage is not waited for as long as an upload would.

        Raises:
            MissingSetting: when there are no data directory or access keys.
        """
        settings.require("data_dir")
        store = ObjectStore.from_settings(settings)
        return cls(
            root=cast(Path, settings.data_dir),
            staging=Staging.from_settings(settings) if settings.staging_dir else None,
            store=store.model_copy(update={"timeout_seconds": 10.0, "patience_seconds": 20.0}),
            engine=engine.execution_options(postgresql_readonly=True),
            log=log,
        )

    @property
    def home(self) -> Path:
        """The directory of the reserved system."""
        return self.root / SYSTEM

    def rows(self) -> Iterator[Timestep]:
        """The synthetic timesteps that the database has."""
        with Session(self.engine) as session:
            for row in session.exec(select(Timestep).where(Timestep.system == SYSTEM)):
                if row.announced == announcement(row.id).document():
                    yield row

    def row(self, timestep_id: UUID) -> Timestep | None:
        """One of them."""
        with Session(self.engine) as session:
            return session.get(Timestep, timestep_id)


def withdraw_leftovers(places: Places, say: Callable[[str], None], run_id: UUID | None = None) -> None:
    """Take back whatever former flight checks have left.

    Args:
        say: told of each.

    Raises:
        As `withdraw`, but for objects that are not what was sent: these are left to a person.
    """
    rows = {row.id: row for row in places.rows()}
    for timestep_id in {*synthetic_files.found(places.home), *rows, *synthetic_object.found(places.store)}:
        row = rows.get(timestep_id)
        say(f"a former flight check has left timestep {timestep_id}")
        try:
            withdraw(places, timestep_id, row if row and row.uploaded_at else None, _LEFT, run_id)
        except NotAsSent as error:
            say(f"its object stays for somebody to look at: {error}")
    for event_file in places.log.register.concluded(SYSTEM):
        places.log.register.forget(SYSTEM, event_file)


def withdraw(
    places: Places, timestep_id: UUID, stated: Uploaded | Timestep | None, reason: str, run_id: UUID | None = None
) -> None:
    """Take one synthetic timestep back, so that nothing of it is left but its history.

    The directory of its images goes last: by it, a later flight check finds what this one could not finish.

    Args:
        stated: what its upload said of its object, where that is known.
        reason: why, as a part of a sentence.

    Raises:
        NotAsSent: when its object is not what was sent. That stays; everything else is gone.
        LeaseTaken: while it is being uploaded.
        NotDeleted, OSError, ObjectStoreError, RedisError: when something can't be deleted.
    """
    log, event_file = places.log, synthetic_files.event_file(timestep_id)
    synthetic_files.delete_event_file(places.home, timestep_id)
    log.register.withdraw(str(timestep_id))
    alien: NotAsSent | None = None
    with hold(log.redis, lease_name(log, announcement(timestep_id).key)) as lease:
        try:
            synthetic_object.delete_object(places.store, timestep_id, stated, lease.check)
        except NotAsSent as error:
            alien = error
        if places.staging:
            synthetic_files.delete_images(places.staging.home(SYSTEM), timestep_id)
            places.staging.forget(SYSTEM, timestep_id)
        withdrawn = Withdrawn(timestep_id=timestep_id, reason=reason, flow_run_id=run_id)
        log.append(LogEvent.of(withdrawn, STAGE))
    clear(SYSTEM, event_file, None, log)
    log.register.forget(SYSTEM, event_file)
    synthetic_files.delete_images(places.home, timestep_id)
    if alien:
        raise alien
