"""Which flow runs are being executed somewhere, and how often a piece of work was tried."""

from collections.abc import Iterable
from typing import cast
from uuid import UUID

import redis

# How long an attempt is remembered. Nothing is tried again so long after its last try.
_REMEMBER_SECONDS = 30 * 24 * 3600


class FlowRunMarks:
    """Signs of life and attempts of flow runs. They live beside the log, in the same Redis."""

    def __init__(self, connection: redis.Redis, stream: str) -> None:
        self._redis = connection
        self._stream = stream

    def beat(self, flow_run_ids: Iterable[UUID], *, seconds: float) -> None:
        """Say that these flow runs are being executed; it counts for so many seconds."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for flow_run_id in flow_run_ids:
                pipeline.set(self._executing(flow_run_id), "1", px=int(seconds * 1000))
            pipeline.execute()

    def is_beating(self, flow_run_id: UUID) -> bool:
        """Whether a process, wherever it is, has said lately that it executes the flow run."""
        return bool(self._redis.exists(self._executing(flow_run_id)))

    def attempt(self, work: str) -> int:
        """The number of the present attempt at a piece of work, from 1 on."""
        return int(cast(str | None, self._redis.get(self._attempt(work))) or 1)

    def begin_attempt(self, work: str, number: int) -> None:
        """Remember that the attempt of that number has begun."""
        self._redis.set(self._attempt(work), number, ex=_REMEMBER_SECONDS)

    def _executing(self, flow_run_id: UUID) -> str:
        return f"{self._stream}:executing:{flow_run_id}"

    def _attempt(self, work: str) -> str:
        return f"{self._stream}:attempt:{work}"
