"""What lies in staging and will not go by itself, though it takes the room of others."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Engine
from sqlmodel import Session, select

from blocks.bulk import among
from blocks.findings import Finding
from blocks.staging import Staging
from blocks.tables import Timestep


def audit_staging(systems: Iterable[str], staging: Staging, engine: Engine, latest: float) -> Iterator[Finding]:
    """Copies that no timestep tells of, and those that were set aside as they hold what their successors don't.

    Args:
        latest: what came later (seconds since 1970) may still be on its way.

    Raises:
        OSError: when staging can't be read.
    """
    for system in systems:
        copies = staging.copies(system)
        with Session(engine) as session:
            query = select(Timestep.id).where(Timestep.system == system, among(Timestep.id, copies))
            known = set(session.exec(query))
        home = staging.home(system)
        for copy in (home / id.hex for id in copies if id not in known):
            if _came_at(copy) < latest:
                yield Finding(
                    "copy that no timestep tells of",
                    str(copy),
                    "nothing deletes it: see in the .json beside it where it is from, have that announced and "
                    "uploaded, or remove both",
                )
        for copy in staging.replaced(system):
            if _came_at(copy) < latest:
                yield Finding(
                    "copy that was set aside",
                    str(copy),
                    "it held images that its source has lost or altered since: see whether an object has them, then "
                    "remove it",
                )


def _came_at(path: Path) -> float:
    """When it was last renamed or written to; now, if it is gone by now."""
    with suppress(FileNotFoundError):
        return path.stat().st_ctime
    return float("inf")
