"""What the last audits left, for those that tell people: the API, and the daily report."""

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import cast

import redis
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

# An audit is made every night. A system that none was made of for so long is not there any more.
_FORGOTTEN = timedelta(days=3)
# Where that of all but the systems of other hosts is kept; no directory has this name.
_MAIN = ""


class AuditOutcome(BaseModel):
    """What one audit left."""

    model_config = ConfigDict(frozen=True)

    at: AwareDatetime
    system: str | None = Field(None, description="The only one whose disks it looked at; None for that of all else.")
    left: dict[str, int] = Field(description="How many differences of each kind it did not mend.")

    def warning(self) -> str | None:
        """What somebody should look after, if anything."""
        if not self.left:
            return None
        of = f" of {self.system}" if self.system else ""
        each = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(self.left.items()))
        return f"the audit{of} at {self.at:%Y-%m-%d %H:%M} UTC left differences, which `archiver audit` lists: {each}"


class AuditOutcomes:
    """Remembers what the last ones left. It lives beside the log, in the same Redis."""

    def __init__(self, connection: redis.Redis, stream: str) -> None:
        self._redis = connection
        self._key = f"{stream}:audits"

    def tell(self, left: dict[str, int], system: str | None = None, systems: Collection[str] = ()) -> None:
        """Have everybody know what one left, now.

        Args:
            system: the only one whose disks it looked at.
            systems: else those whose disks it looked at: what another audit left of one of them is of the past.
        """
        outcome = AuditOutcome(at=datetime.now(UTC), system=system, left=left)
        with self._redis.pipeline() as pipeline:
            pipeline.hset(self._key, system or _MAIN, outcome.model_dump_json())
            if systems:
                pipeline.hdel(self._key, *systems)
            pipeline.execute()

    def last(self) -> list[AuditOutcome]:
        """What the last audit left, and behind it the last of each system that only another host reaches."""
        known = sorted(cast(dict[str, str], self._redis.hgetall(self._key)).items())
        outcomes = [AuditOutcome.model_validate_json(said) for _, said in known]
        since = datetime.now(UTC) - _FORGOTTEN
        return [outcome for outcome in outcomes if outcome.system is None or outcome.at > since]
