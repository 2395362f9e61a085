"""Compares disk, stream, database and bucket, both ways, and lists every difference."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

from prefect import State, flow, get_run_logger, states
from prefect.states import Completed
from sqlalchemy import Engine
from sqlmodel import Session

from blocks.database import create_engine
from blocks.disk_outlook import disk_outlooks
from blocks.event_log import EventLog
from blocks.findings import Finding, NotFixed
from blocks.imaging_system import ImagingSystem
from blocks.object_store import ObjectStore
from blocks.settings import Settings, get_settings
from blocks.staging import Staging
from blocks.synthetic_timestep import SYSTEM as FLIGHT_CHECK
from blocks.system_seen import SystemSeen
from flows.audit_bucket import audit_bucket, audit_leftovers, audit_timesteps
from flows.audit_disk import audit_disk
from flows.audit_staging import audit_staging
from flows.audit_stream import audit_stream
from flows.elsewhere import ask_elsewhere
from flows.purge import configured_systems

logger = logging.getLogger(__name__)

# What happened so lately may still be on its way, and an upload that was begun so long ago is not.
GRACE = timedelta(hours=1)
LEFT_OVER = timedelta(hours=24)


def find(
    systems: list[ImagingSystem],
    settings: Settings,
    grace: timedelta = GRACE,
    left_over: timedelta = LEFT_OVER,
    *,
    only_disks: bool = False,
) -> Iterator[Finding]:
    """Every difference between what is known and what is there.

    Args:
        systems: those whose disks are looked at.
        only_disks: leave out what no disk is needed for.

    Raises:
        MissingSetting: without database, Redis or object storage.
        ObjectStoreError: when the bucket can't be asked.
    """
    store = ObjectStore.from_settings(settings)
    engine = create_engine(settings)
    # Only the state-manager writes.
    reader = engine.execution_options(postgresql_readonly=True)
    try:
        with closing(EventLog.from_settings(settings)) as log:
            for system in systems:
                try:
                    yield from audit_disk(system, log, reader, grace.total_seconds())
                except OSError as error:
                    yield Finding("disk that can't be read", f"{system.directory}: {error}", "mount it, or mend it")
            yield from _staging(systems, settings, reader, grace, only_disks=only_disks)
            if not only_disks:
                yield from audit_timesteps(log, reader, grace)
                yield from audit_stream(log, reader, grace)
                # As their own hosts say, and as the blocks of those say that this one reaches.
                trusting = {seen.name for seen in log.systems.all() if seen.trusts_tags}
                trusting |= {system.name for system in systems if system.purge_trusts_tags}
                yield from audit_bucket(store, log, reader, grace, trusting)
                yield from audit_leftovers(store, log, left_over)
            yield from audit_disks(systems, settings, reader)
    finally:
        engine.dispose()


def _staging(
    systems: list[ImagingSystem], settings: Settings, engine: Engine, grace: timedelta, *, only_disks: bool
) -> Iterator[Finding]:
    if not settings.staging_dir:
        return
    staging = Staging.from_settings(settings)
    names = [system.name for system in systems]
    try:
        if not only_disks:
            # Those of shares that are away, too.
            names = [name for name in staging.systems() if name != FLIGHT_CHECK and settings.reaches(name)]
        yield from audit_staging(names, staging, engine, time.time() - grace.total_seconds())
    except OSError as error:
        yield Finding("disk that can't be read", f"{settings.staging_dir}: {error}", "mount it, or mend it")


def audit_disks(systems: list[ImagingSystem], settings: Settings, engine: Engine) -> Iterator[Finding]:
    """Disks that will be full soon, or before the uploads catch up."""
    seen = [SystemSeen.of(system, settings) for system in _there(systems)]
    with Session(engine) as session:
        outlooks = disk_outlooks(session, seen, datetime.now(UTC))
    for disk in outlooks:
        if disk.is_filling:
            yield Finding(
                "disk that will be full",
                disk.sentence(),
                "see what keeps files from being deleted, or make room",
            )


def _there(systems: list[ImagingSystem]) -> Iterator[ImagingSystem]:
    return (system for system in systems if system.directory.is_dir())


def report(findings: Iterable[Finding], say: Callable[[str], object], *, fix: bool) -> tuple[Counter[str], int]:
    """Say each difference, and take the safe actions where wanted.

    Returns:
        How many are left of each kind, and how many were fixed.
    """
    left: Counter[str] = Counter()
    fixed = 0
    for finding in findings:
        say(str(finding))
        if fix and finding.fix:
            try:
                finding.fix()
            except NotFixed as error:
                say(f"  left: {error}")
            else:
                fixed += 1
                say(f"  done: {finding.action}")
                continue
        left[finding.kind] += 1
    return left, fixed


def audit_and_tell(
    systems: list[ImagingSystem],
    settings: Settings,
    say: Callable[[str], object],
    *,
    fix: bool,
    only: str | None = None,
) -> tuple[int, int]:
    """Say each difference, take the safe actions where wanted, and have everybody know what is left.

    Args:
        only: the system that `systems` are, where nothing but its disks is looked at.

    Returns:
        How many are left, and how many were fixed.
    """
    left, fixed = report(find(systems, settings, only_disks=only is not None), say, fix=fix)
    with closing(EventLog.from_settings(settings)) as log:
        log.audits.tell(left, only, [] if only else [system.name for system in systems])
    return left.total(), fixed


@flow(name="audit", flow_run_name="audit", persist_result=False)
async def audit(*, fix: bool = False, system: str | None = None) -> State[None]:
    """List every difference between disk, stream, database and bucket.

    Args:
        fix: take the safe actions, which drive the normal path again.
        system: only the disks of this one; otherwise all, those of other hosts by runs there.

    Returns:
        Completed, or Failed where differences are left.
    """
    settings = get_settings()
    log = get_run_logger()
    systems = await configured_systems(settings, system)
    if system is None:
        await ask_elsewhere(settings, systems, {"fix": fix})
    left, fixed = await asyncio.to_thread(
        audit_and_tell, systems, settings, lambda sentence: log.warning("%s", sentence), fix=fix, only=system
    )
    if left:
        return states.Failed(message=f"differences left: {left}, fixed: {fixed}; `archiver audit` lists them")
    return Completed(message=f"{fixed} differences, all fixed" if fixed else "no differences")
