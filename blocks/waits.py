"""What a timestep waits for between two tries, for those who ask: the log tells only how a stage ended."""

from datetime import UTC, datetime
from typing import Literal, Self, cast
from uuid import UUID

import redis
from pydantic import BaseModel, ConfigDict, Field

# A wait that is not said again so long after it should have ended is over: its run was cancelled, or is gone.
_GRACE_SECONDS = 600.0


class Wait(BaseModel):
    """A stage has tried, and tries again."""

    model_config = ConfigDict(frozen=True)

    stage: Literal["ingest", "upload"]
    reason: str = Field(description="A sentence for an operator, as in the state of the flow run.")
    until: datetime = Field(description="When it is tried again.")
    flow_run_id: UUID | None = Field(None, description="Which flow run tries.")

    @classmethod
    def of(
        cls,
        stage: Literal["ingest", "upload"],
        reason: str | None,
        until: datetime | None,
        flow_run_id: UUID | None = None,
    ) -> Self:
        """What the state of a flow run tells that is scheduled again."""
        return cls(stage=stage, reason=reason or "", until=until or datetime.now(UTC), flow_run_id=flow_run_id)

    def sentence(self) -> str:
        """All of it, for a person."""
        return f"{self.stage} tries again at {self.until.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC: {self.reason}"


class Waits:
    """The waits of all timesteps. They live beside the log, in the same Redis."""

    def __init__(self, connection: redis.Redis, stream: str) -> None:
        self._redis = connection
        self._stream = stream

    def tell(self, timestep_id: UUID, wait: Wait) -> None:
        """Have everybody know, until it is over."""
        seconds = max((wait.until - datetime.now(UTC)).total_seconds(), 0.0) + _GRACE_SECONDS
        self._redis.set(self._wait(timestep_id), wait.model_dump_json(), ex=round(seconds))

    def end(self, timestep_id: UUID) -> None:
        """The timestep waits no more: it went on, or was given up."""
        self._redis.delete(self._wait(timestep_id))

    def find(self, timestep_id: UUID) -> Wait | None:
        """What a timestep waits for, if it does."""
        said = cast(str | None, self._redis.get(self._wait(timestep_id)))
        return Wait.model_validate_json(said) if said else None

    def _wait(self, timestep_id: UUID) -> str:
        return f"{self._stream}:waits:{timestep_id}"
