"""Deletes timesteps' files on the microscopes' shares, once it is proven that nobody needs them."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, cast
from uuid import UUID

from prefect import State, flow, get_run_logger
from prefect.runtime import flow_run as current_run
from prefect.states import Completed

from blocks.database import create_engine
from blocks.deletion import delete_empty_directories, delete_files
from blocks.discovery import discover_systems
from blocks.event_log import EventLog
from blocks.expiry import ExpiryRules
from blocks.image_directory import SystemAway
from blocks.imaging_system import ImagingSystem
from blocks.lease import hold
from blocks.messages import LogEvent, SourcePurged
from blocks.mounts import mount_of, mounts_within
from blocks.object_store import ObjectStore
from blocks.purge_proof import prove_event_file, prove_files, prove_object, prove_stored
from blocks.purgeable import NotProven, Outcome, PurgeableTimesteps
from blocks.settings import Settings, get_settings
from blocks.staging import Staging
from blocks.synthetic_timestep import SYSTEM as FLIGHT_CHECK
from blocks.tables import Timestep
from flows.claims import Claims
from flows.elsewhere import ask_elsewhere
from flows.purge_pass import STAGE, PurgePass
from flows.purge_staging import StagingPurge
from flows.upload import lease_name

logger = logging.getLogger(__name__)

# How long it is remembered what was begun to be deleted: longer than a timestep takes to be recorded.
_REMEMBER_SECONDS = 30 * 24 * 3600


class SourcePurge(PurgePass):
    """A pass over the files on the share."""

    @property
    def place(self) -> str:
        return self.system.name

    def run(self) -> Iterator[Outcome]:
        """Delete what may be deleted, or only tell what that would be.

        Raises:
            SystemAway: when the system's directory is not there.
            OSError: when its mount fails.
        """
        name, days = self.system.name, self.system.source_retention_days
        if days is None:
            return
        if not (self.system.directory / "events").is_dir():
            raise SystemAway(f"{self.system.directory} is not there; is the share mounted?")
        if self.do_it and mount_of(self.system.directory).is_read_only:
            logger.warning("Nothing of %s is deleted: %s is mounted read-only", name, self.system.directory)
            return
        claims, rules = Claims(self.system, self.log, self.timesteps), ExpiryRules(self.store)
        for row in self.timesteps.uploaded_before(name, datetime.now(UTC) - timedelta(days=days)):
            yield self.outcome(row.title, partial(self._purge, row, claims, rules))

    def _purge(self, row: Timestep, claims: Claims, rules: ExpiryRules) -> tuple[int, int]:
        """Images first, the event file last: until then, everybody can see what is being deleted."""
        timestep = self.timesteps.load(row)
        home, ingested = self.system.directory, timestep.ingested
        images = home / row.image_dir
        # Whoever uploads the timestep, again or still, reads these files.
        with hold(self.log.redis, lease_name(self.log, row.key or "")) as lease:
            claims.check(timestep)
            policy = self.system
            checks = prove_object(
                timestep,
                self.store,
                needs_tape=policy.purge_needs_tape,
                trusts_tags=policy.purge_trusts_tags,
                rules=rules,
            )
            event_file = prove_event_file(timestep, self.system)
            if Path(os.path.realpath(images)) != Path(os.path.realpath(home), row.image_dir):
                raise NotProven(f"{row.image_dir} leads through a symbolic link")
            if mounted := mounts_within(images):
                raise NotProven(f"something is mounted at {mounted[0]}; its files may belong elsewhere")
            proven = prove_files(timestep, images, timestep.source_state, self.compares(images))
            key = f"{self.log.stream}:purging:source:{row.id}"
            begun = cast(str | None, self.log.redis.get(key))
            if not proven.files and event_file is None and begun is None:
                raise NotProven("its files are gone, but not by a purge of ours")
            purged = SourcePurged(
                timestep_id=row.id,
                system=row.system,
                files=len(proven.files) + bool(event_file),
                bytes=proven.bytes + (event_file.size if event_file else 0),
                proof=proven.proof(*checks),
                flow_run_id=self.run_id,
            )
            if not self.do_it:
                return purged.files, purged.bytes
            # To compare the files may have taken minutes.
            prove_stored(timestep, self.store)
            # What will be said of all attempts together, should this one die. It decides about nothing.
            purged = _together(SourcePurged.model_validate_json(begun), purged) if begun else purged
            self.log.redis.set(key, purged.model_dump_json(), ex=_REMEMBER_SECONDS)
            delete_files(home, row.image_dir, proven.files, lease.check)
            delete_empty_directories(home, row.image_dir, timestep.images)
            if event_file:
                path = PurePosixPath(ingested.event_file)
                delete_files(home, str(path.parent), {path.name: event_file}, lease.check)
            self.log.append(LogEvent.of(purged, STAGE))
            self.log.register.forget(row.system, ingested.event_file)
            return purged.files, purged.bytes


def _together(begun: SourcePurged, now: SourcePurged) -> SourcePurged:
    """What is said of a purge that died and went on: what the first attempt found, and by which proofs all went."""
    checks = list(dict.fromkeys([*now.proof.checks, *begun.proof.checks]))
    return begun.model_copy(update={"proof": now.proof.model_copy(update={"checks": checks})})


def purge(
    settings: Settings,
    systems: Iterable[ImagingSystem],
    staged: Iterable[ImagingSystem],
    say: Callable[[Outcome], None],
    *,
    do_it: bool,
    run_id: UUID | None = None,
) -> str:
    """Purge these systems; returns one sentence about the whole pass.

    Args:
        systems: whose shares are purged.
        staged: whose copies in staging are. First: they make room for others, and need no share.
        say: told of every timestep that is old enough, at once.
        do_it: delete; otherwise only tell what would be deleted.
    """
    outcomes = []
    engine = create_engine(settings)
    store = ObjectStore.from_settings(settings)
    try:
        with closing(EventLog.from_settings(settings)) as log:
            timesteps = PurgeableTimesteps(engine)
            how: dict[str, Any] = {"do_it": do_it, "run_id": run_id}
            copies = [
                StagingPurge(system, timesteps, store, log, Staging.from_settings(settings), **how) for system in staged
            ]
            sources = [SourcePurge(system, timesteps, store, log, **how) for system in systems]
            for one in [*copies, *sources]:
                try:
                    for outcome in one.run():
                        say(outcome)
                        outcomes.append(outcome)
                except (SystemAway, OSError) as error:
                    logger.warning("Nothing more of %s is deleted: %s", one.place, error)
    finally:
        engine.dispose()
    purged = [outcome for outcome in outcomes if not outcome.kept]
    files, size = sum(outcome.files for outcome in purged), sum(outcome.bytes for outcome in purged)
    verb = "deleted" if do_it else "would delete"
    return (
        f"{verb} {files} files ({size} bytes) of {len(purged)} timesteps, kept those of {len(outcomes) - len(purged)}"
    )


async def configured_systems(settings: Settings, only: str | None = None) -> list[ImagingSystem]:
    """The microscopes that are there and reached, each as its block says, or only the one of this name."""
    settings.require("data_dir", "database_url", "prefect_api_url")
    return await _configured(await asyncio.to_thread(discover_systems, cast(Path, settings.data_dir)), settings, only)


async def staged_systems(settings: Settings, only: str | None = None) -> list[ImagingSystem]:
    """The same for those that have copies in staging, whether or not their shares are there."""
    if not settings.staging_dir:
        return []
    try:
        names = await asyncio.to_thread(Staging.from_settings(settings).systems)
    except OSError as error:
        logger.warning("No copy in staging is deleted: %s", error)
        return []
    return await _configured(names, settings, only)


async def _configured(names: list[str], settings: Settings, only: str | None) -> list[ImagingSystem]:
    wanted = [name for name in names if name != FLIGHT_CHECK and only in (None, name) and settings.reaches(name)]
    return [await ImagingSystem.configured(name, cast(Path, settings.data_dir)) for name in wanted]


@flow(name="purge-timesteps", flow_run_name="purge timesteps", persist_result=False)
async def purge_timesteps(*, do_it: bool = True, system: str | None = None) -> State[None]:
    """Delete the files of timesteps whose time has come, where it is proven that nobody needs them.

    Args:
        do_it: whether to delete; otherwise it is only told what would be deleted.
        system: only this one; otherwise all, those of other hosts by runs there.
    """
    log = get_run_logger()
    settings = get_settings()
    systems = await configured_systems(settings, system)
    if system is None:
        await ask_elsewhere(settings, systems, {"do_it": do_it})
    run_id = UUID(current_run.id)
    staged = await staged_systems(settings, system)
    told = await asyncio.to_thread(
        purge, settings, systems, staged, lambda outcome: log.info("%s", outcome), do_it=do_it, run_id=run_id
    )
    return Completed(message=told)
