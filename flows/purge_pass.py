"""One pass over the timesteps of one system, to delete files that nobody needs any more."""

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal
from uuid import UUID

from blocks.deletion import NotDeleted
from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.lease import LeaseLost, LeaseTaken
from blocks.mounts import mount_of
from blocks.object_errors import ObjectStoreError
from blocks.object_store import ObjectStore
from blocks.purgeable import NotProven, Outcome, PurgeableTimesteps

STAGE = "purge-timesteps"


@dataclass(frozen=True)
class PurgePass(ABC):
    """What a pass works with, and tells of a timestep."""

    system: ImagingSystem
    timesteps: PurgeableTimesteps
    store: ObjectStore
    log: EventLog
    _: KW_ONLY
    do_it: bool
    """Delete; otherwise only tell what would be deleted."""
    run_id: UUID | None = None

    @property
    @abstractmethod
    def place(self) -> str:
        """What people know as the place of the files."""

    @abstractmethod
    def run(self) -> Iterator[Outcome]:
        """Delete what may be deleted, or only tell what that would be.

        Raises:
            SystemAway, OSError: when nothing more can be deleted here.
        """

    def compares(self, place: Path) -> Literal["state", "content"]:
        """How files in a place are compared: as policy says, where their state can't look the same after a change."""
        return self.system.purge_compares if mount_of(place).has_change_times else "content"

    def outcome(self, title: str, delete: Callable[[], tuple[int, int]]) -> Outcome:
        """What came of a timestep: the number of files and bytes that `delete` deleted, or why they stay.

        Raises:
            OSError: when the mount is read-only, which is none of this timestep's.
        """
        try:
            files, size = delete()
        except (NotProven, NotDeleted, LeaseTaken, LeaseLost, ObjectStoreError) as error:
            return Outcome(title, kept=str(error))
        except OSError as error:
            if error.errno == errno.EROFS:
                raise
            return Outcome(title, kept=f"{error.filename or title}: {error.strerror}")
        return Outcome(title, files, size)
