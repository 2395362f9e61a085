"""Deletes copies of timesteps in staging, once their upload is proven."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from blocks.deletion import delete_empty_directories, delete_files
from blocks.expiry import ExpiryRules
from blocks.lease import hold
from blocks.messages import LogEvent, StagingPurged
from blocks.purge_proof import prove_files, prove_object, prove_stored
from blocks.purgeable import NotProven, Outcome, Purgeable
from blocks.staging import Staging
from blocks.tables import Timestep
from flows.purge_pass import STAGE, PurgePass
from flows.upload import lease_name

# What is left of a copy that was never finished goes after a day.
_LEFT_OVER_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class StagingPurge(PurgePass):
    """A pass over the copies. The tape does not matter here."""

    staging: Staging

    @property
    def place(self) -> str:
        return f"{self.system.name}'s copies"

    def run(self) -> Iterator[Outcome]:
        """Delete the copies whose time is over, or only tell what that would be.

        Raises:
            OSError: when staging can't be read or written.
        """
        before = datetime.now(UTC) - timedelta(hours=self.system.staging_retention_hours)
        rules = ExpiryRules(self.store)
        for timestep_id in self.staging.copies(self.system.name):
            row = self.timesteps.find(timestep_id)
            # What lies under a system's name and is a timestep of another one, is not its copy.
            if row is None or row.system != self.system.name or row.uploaded_at is None or row.uploaded_at > before:
                continue
            yield self.outcome(f"the copy of {row.title}", partial(self._purge, row, rules))
        if self.do_it:
            self.staging.clean(self.system.name, _LEFT_OVER_SECONDS)

    def _purge(self, row: Timestep, rules: ExpiryRules) -> tuple[int, int]:
        timestep = self.timesteps.load(row)
        home, copy = self.staging.home(row.system), row.id.hex
        with hold(self.log.redis, lease_name(self.log, row.key or "")) as lease:
            checks = self._prove_object(timestep, rules)
            proven = prove_files(timestep, home / copy, timestep.copy_state, self.compares(home / copy))
            purged = StagingPurged(
                timestep_id=row.id,
                system=row.system,
                files=len(proven.files),
                bytes=proven.bytes,
                proof=proven.proof(*checks),
                flow_run_id=self.run_id,
            )
            if self.do_it:
                prove_stored(timestep, self.store)
                delete_files(home, copy, proven.files, lease.check)
                # Before the directory goes: as long as it is there, the next pass looks at it.
                self.log.append(LogEvent.of(purged, STAGE))
                delete_empty_directories(home, copy, timestep.images)
                self.staging.forget(row.system, row.id)
                self.staging.drop_replaced(row.system, row.id, {image.sha256 for image in timestep.images.values()})
            return purged.files, purged.bytes

    def _prove_object(self, timestep: Purgeable, rules: ExpiryRules) -> list[str]:
        """As for the source, but an object that expires soon is good enough while the source has all images, too."""
        try:
            return prove_object(timestep, self.store, needs_tape=False, rules=rules)
        except NotProven:
            # Only now: a share that is away, or hangs, is nothing that copies should wait for.
            if not self._is_at_source(timestep):
                raise
        return prove_object(timestep, self.store, needs_tape=False)

    def _is_at_source(self, timestep: Purgeable) -> bool:
        directory = self.system.directory / timestep.row.image_dir
        try:
            return all((directory / name).lstat().st_size == image.size for name, image in timestep.images.items())
        except OSError:
            return False
