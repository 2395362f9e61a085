"""How the last flight check ended, for those that tell people: the API, and the daily report."""

from datetime import UTC, datetime
from typing import Literal, cast

import redis
from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["good", "failed", "not possible"]


class FlightOutcome(BaseModel):
    """What came of a flight check."""

    model_config = ConfigDict(frozen=True)

    at: datetime
    verdict: Verdict
    sentence: str = Field(description="For a person: what was found, or what to do.")
    last_good: datetime | None = Field(description="When one was good last, this one included.")
    is_alarmed: bool = Field(description="Whether people were told that it fails, and not since that it is good again.")

    def warning(self) -> str | None:
        """What somebody should look after, if anything."""
        if self.verdict != "failed":
            return None
        since = f"the last good one was at {self.last_good:%Y-%m-%d %H:%M} UTC" if self.last_good else "none was good"
        return f"the flight check of {self.at:%Y-%m-%d %H:%M} UTC failed ({since}): {self.sentence}"


class FlightOutcomes:
    """Remembers how the last one ended. It lives beside the log, in the same Redis."""

    def __init__(self, connection: redis.Redis, stream: str) -> None:
        self._redis = connection
        self._key = f"{stream}:flight-check"

    def tell(self, verdict: Verdict, sentence: str, *, is_alarmed: bool = False) -> None:
        """Have everybody know how one ended, now."""
        now, before = datetime.now(UTC), self.last()
        last_good = now if verdict == "good" else before and before.last_good
        outcome = FlightOutcome(at=now, verdict=verdict, sentence=sentence, last_good=last_good, is_alarmed=is_alarmed)
        self._redis.set(self._key, outcome.model_dump_json())

    def last(self) -> FlightOutcome | None:
        """How the last one ended; None if nobody knows of any."""
        known = cast(str | None, self._redis.get(self._key))
        return FlightOutcome.model_validate_json(known) if known else None
