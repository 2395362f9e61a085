"""Deletes copies of timesteps in staging, once their upload is proven."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

from blocks.deletion import NotDeleted, delete_empty_directories, delete_files
from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.lease import LeaseLost, LeaseTaken, hold
from blocks.messages import LogEvent, StagingPurged
from blocks.object_errors import ObjectStoreError
from blocks.object_store import ObjectStore
from blocks.purge_proof import prove_files, prove_object
from blocks.purgeable import NotProven, Outcome, PurgeableTimesteps, title_of
from blocks.staging import Staging
from blocks.tables import Timestep
from flows.upload import lease_name

STAGE = "purge-timesteps"
# What is left of a copy that was never finished goes after a day.
_LEFT_OVER_SECONDS = 24 * 3600.0


class StagingPurge:
    """One pass over the copies of one system."""

    def __init__(
        self,
        system: ImagingSystem,
        staging: Staging,
        timesteps: PurgeableTimesteps,
        store: ObjectStore,
        log: EventLog,
        run_id: UUID | None = None,
    ) -> None:
        self._system = system
        self._staging = staging
        self._timesteps = timesteps
        self._store = store
        self._log = log
        self._run_id = run_id

    def run(self, *, do_it: bool) -> Iterator[Outcome]:
        """Delete the copies whose time is over, or only tell what that would be. The tape does not matter here."""
        before = datetime.now(UTC) - timedelta(hours=self._system.staging_retention_hours)
        for timestep_id in self._staging.copies(self._system.name):
            row = self._timesteps.find(timestep_id)
            if row is None or row.uploaded_at is None or row.uploaded_at > before:
                continue
            title = f"the copy of {title_of(row)}"
            try:
                files, size = self._purge(row, do_it=do_it)
            except (NotProven, NotDeleted, LeaseTaken, LeaseLost, ObjectStoreError) as error:
                yield Outcome(title, kept=str(error))
            else:
                yield Outcome(title, files, size)
        if do_it:
            self._staging.clean(self._system.name, _LEFT_OVER_SECONDS)

    def _purge(self, row: Timestep, *, do_it: bool) -> tuple[int, int]:
        timestep = self._timesteps.load(row)
        home, copy = self._staging.home(row.system), row.id.hex
        with hold(self._log.redis, lease_name(self._log, row.key or "")) as lease:
            checks = prove_object(timestep, self._store, needs_tape=False)
            proven = prove_files(timestep, home / copy, timestep.copy_state, self._system.purge_compares)
            purged = StagingPurged(
                timestep_id=row.id,
                system=row.system,
                files=len(proven.files),
                bytes=proven.bytes,
                proof=proven.proof(*checks),
                flow_run_id=self._run_id,
            )
            if do_it:
                delete_files(home, copy, proven.files, lease.check)
                # Before the directory goes: as long as it is there, the next pass looks at it.
                self._log.append(LogEvent.of(purged, STAGE))
                delete_empty_directories(home, copy, timestep.images)
                self._staging.forget(row.system, row.id)
            return purged.files, purged.bytes
