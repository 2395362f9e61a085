"""What the event-ingester sees of each system, for those that have not its disks: the API, and the daily report."""

import os
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self, cast

import redis
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from blocks.imaging_system import ImagingSystem
from blocks.settings import Settings

# What was seen longer ago says nothing of the system now.
_RECENT = timedelta(hours=1)


class Disk(BaseModel):
    """A mounted file system, at one moment. Sizes in bytes."""

    model_config = ConfigDict(frozen=True)

    device: str = Field(description="The same for all directories on it: the host that sees it, and the device there.")
    directory: str
    free: int = Field(description="For those who are not root.")
    total: int

    @classmethod
    def of(cls, directory: Path, host: str) -> Self:
        """The disk that a directory lies on.

        Raises:
            OSError: when it can't be asked.
        """
        sizes = os.statvfs(directory)
        return cls(
            device=f"{host}:{directory.stat().st_dev}",
            directory=str(directory),
            free=sizes.f_bavail * sizes.f_frsize,
            total=sizes.f_blocks * sizes.f_frsize,
        )


class SystemSeen(BaseModel):
    """A system, and the disks it lives on."""

    model_config = ConfigDict(frozen=True)

    name: str
    display_name: str
    at: datetime
    source: Disk
    staging: Disk | None = Field(description="Where its timesteps are copied to, if they are.")
    waits_for_room: str | None = Field(None, description="Why its timesteps can't be copied there now, if so.")
    trusts_tags: bool = Field(False, description="Whether an object's tag alone is taken for a tape copy.")
    waiting: int = Field(0, description="Its event files that are neither taken in nor rejected.")
    waiting_since: AwareDatetime | None = Field(None, description="When the oldest of these was seen first.")

    def is_recent(self, now: datetime) -> bool:
        """Whether it still says something: not so where a share is away, or nobody watches it any more."""
        return now - self.at <= _RECENT

    @classmethod
    def of(cls, system: ImagingSystem, settings: Settings, waiting: Collection[datetime] = ()) -> Self:
        """What is seen of a system now.

        Args:
            waiting: when each of its event files was seen first that is not dealt with.

        Raises:
            OSError: when its disks can't be asked.
        """
        staging = settings.staging_dir if system.staging != "never" else None
        return cls(
            name=system.name,
            trusts_tags=system.purge_trusts_tags,
            display_name=system.display_name or system.name,
            at=datetime.now(UTC),
            source=Disk.of(system.directory, settings.consumer),
            # It is made when the first timestep is copied.
            staging=Disk.of(staging, settings.consumer) if staging and staging.is_dir() else None,
            waiting=len(waiting),
            waiting_since=min(waiting, default=None),
        )


class SystemsSeen:
    """What was seen of each system last. It lives beside the log, in the same Redis."""

    def __init__(self, connection: redis.Redis, stream: str) -> None:
        self._redis = connection
        self._key = f"{stream}:systems"
        self._stream = stream

    def tell(self, seen: SystemSeen) -> None:
        """Have everybody know."""
        self._redis.hset(self._key, seen.name, seen.model_dump_json())

    def tell_of_no_room(self, system: str, why: str, seconds: float) -> None:
        """Have everybody know that a timestep waits for room in staging; forgotten when it is not said again."""
        self._redis.set(self._no_room(system), why, ex=round(seconds))

    def all(self) -> list[SystemSeen]:
        """The systems by their names, also those that nobody has seen for long."""
        known = sorted(cast(dict[str, str], self._redis.hgetall(self._key)).items())
        if not known:
            return []
        why = cast(list[str | None], self._redis.mget([self._no_room(name) for name, _ in known]))
        return [
            SystemSeen.model_validate_json(said).model_copy(update={"waits_for_room": reason})
            for (_, said), reason in zip(known, why, strict=True)
        ]

    def _no_room(self, system: str) -> str:
        return f"{self._stream}:no-room:{system}"
