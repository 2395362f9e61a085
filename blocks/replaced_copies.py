"""Copies in staging that another one took the place of. Each may hold the only image of its kind, so it stays until
somebody has what it held.

`<root>/<system>/.<timestep_id>.<number>.damaged`, with what was said of it beside it.
"""

import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from uuid import UUID

from blocks.source_file import BundleError, find_sources
from blocks.staged_copy import CopyRecord, hash_file

_SUFFIX = ".damaged"


def set_aside(copy: Path, said: CopyRecord | None) -> None:
    """Make room for another copy. Killed in between, the copy has the one name or the other."""
    names = (copy.with_name(f".{copy.name}.{number}{_SUFFIX}") for number in count())
    aside = next(name for name in names if not name.exists())
    if said:
        said.write(_record_of(aside))
    copy.rename(aside)


def find(home: Path, timestep_id: UUID | None = None) -> Iterator[Path]:
    """The directories of those of one timestep, or of all."""
    # With a number behind its id; without one by an older release.
    pattern = f".{timestep_id.hex if timestep_id else ''}*{_SUFFIX}"
    yield from (path for path in home.glob(pattern) if path.is_dir())


def drop(home: Path, timestep_id: UUID, held: Collection[str]) -> None:
    """Delete those of a timestep that held nothing but what somebody else has.

    Args:
        held: SHA-256 of each file that is known to be elsewhere.
    """
    for path in list(find(home, timestep_id)):
        with suppress(BundleError, OSError, ValueError):
            if _held_by(path) <= set(held):
                shutil.rmtree(path)
                _record_of(path).unlink(missing_ok=True)


def _held_by(path: Path) -> set[str]:
    """What it was said to hold, and not what it holds: a damaged file may be all that is left of its image."""
    with suppress(FileNotFoundError):
        return set(CopyRecord.read(_record_of(path)).files.values())
    return {hash_file(file) for file in find_sources(path).values()}


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
