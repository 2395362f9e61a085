"""The Redis stream: the one append-only log of everything that happened to a timestep."""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Self, cast

import redis
from prefect.blocks.core import Block
from pydantic import Field, PrivateAttr, SecretStr
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from blocks.absent_consumers import take_from_absent
from blocks.append_once import append_once
from blocks.audit_outcome import AuditOutcomes
from blocks.backlog import Backlog, GroupMissing, group_names, has_work, last_delivered, no_such_group, read_backlog
from blocks.dead_letters import DeadLetters
from blocks.entry import GROUPS, Entry, Group, UnreadableEntry
from blocks.event_register import EventFileRegister
from blocks.flight_outcome import FlightOutcomes
from blocks.flow_run_marks import FlowRunMarks
from blocks.messages import LogEvent
from blocks.reach import Reach
from blocks.redis_memory import RedisMemory
from blocks.settings import Settings
from blocks.system_seen import SystemsSeen
from blocks.waits import Waits

logger = logging.getLogger(__name__)

__all__ = ["GROUPS", "Backlog", "DeadLetters", "Entry", "EventLog", "Group", "GroupMissing", "UnreadableEntry"]


class EventLog(Block):
    """The stream of events: append once, read in a group, acknowledge when the work is durable."""

    _block_type_name = "Event Log"
    _block_type_slug = "event-log"
    _description = "The Redis stream of everything that happened to a timestep."

    url: SecretStr = Field(description="Redis, as redis://:password@host:port/db.")
    stream: str = Field("timesteps", description="Name of the stream.")

    _hasty_seconds: float | None = PrivateAttr(None)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The log of this installation.

        Raises:
            MissingSetting: when ARCHIVER_REDIS_URL is not set.
        """
        settings.require("redis_url")
        return cls(url=cast(SecretStr, settings.redis_url))

    def within(self, seconds: float) -> Self:
        """This log, for who would rather be told that Redis is away than wait for it any longer than that."""
        log = type(self)(url=self.url, stream=self.stream)
        log._hasty_seconds = seconds
        return log

    @cached_property
    def redis(self) -> redis.Redis:
        """The connection, which reconnects by itself after Redis restarts."""
        return redis.Redis.from_url(
            self.url.get_secret_value(),
            decode_responses=True,
            socket_connect_timeout=self._hasty_seconds or 5,
            socket_timeout=self._hasty_seconds or 30,
            health_check_interval=15,
            retry=Retry(ExponentialBackoff(cap=2, base=0.1), retries=0 if self._hasty_seconds else 5),
            retry_on_error=[RedisConnectionError, RedisTimeoutError],
        )

    @property
    def register(self) -> EventFileRegister:
        """What is known of the event files, over the same connection."""
        return EventFileRegister(self.redis, self.stream)

    @property
    def systems(self) -> SystemsSeen:
        """What was seen of each system last, over the same connection."""
        return SystemsSeen(self.redis, self.stream)

    @property
    def flights(self) -> FlightOutcomes:
        """How the last flight check ended, over the same connection."""
        return FlightOutcomes(self.redis, self.stream)

    @property
    def audits(self) -> AuditOutcomes:
        """What the last audits left, over the same connection."""
        return AuditOutcomes(self.redis, self.stream)

    @property
    def waits(self) -> Waits:
        """What timesteps wait for between two tries, over the same connection."""
        return Waits(self.redis, self.stream)

    @property
    def reach(self) -> Reach:
        """Which systems the living workers reach, over the same connection."""
        return Reach(self.redis, self.stream)

    @property
    def memory(self) -> RedisMemory:
        """How full Redis is now."""
        return RedisMemory.of(self.redis)

    @property
    def flow_runs(self) -> FlowRunMarks:
        """Which flow runs are executed, and which attempt at its work each is, over the same connection."""
        return FlowRunMarks(self.redis, self.stream)

    def close(self) -> None:
        """Give the connection back."""
        if "redis" in self.__dict__:
            self.redis.close()

    # --- writing

    def append(self, event: LogEvent) -> str:
        """Append an event, once: if it is there already, its first entry stands.

        Returns:
            The id of its entry in the stream.
        """
        return append_once(self.redis, self.stream, [event])[0]

    def append_all(self, events: Sequence[LogEvent]) -> None:
        """Append events in this order, each once, many per round trip."""
        append_once(self.redis, self.stream, events)

    def repeat(self, event: LogEvent) -> str:
        """Append an event that is there already, so that what it asks for is done once more.

        Returns:
            The id of its new entry.
        """
        fields = {"event": event.model_dump_json(), "type": event.type, "timestep_id": event.subject or ""}
        return cast(str, self.redis.xadd(self.stream, fields))  # type: ignore[arg-type]

    def ensure_groups(self) -> None:
        """Create the stream and its groups where missing, to be read from the very first entry."""
        for group in GROUPS:
            try:
                self.redis.xgroup_create(self.stream, group, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    def is_durable(self) -> bool:
        """Whether Redis writes to an append-only file. One that does not tell is taken at its word."""
        try:
            return cast(dict[str, str], self.redis.config_get("appendonly")).get("appendonly", "yes") == "yes"
        except ResponseError:
            return True

    # --- reading all of it

    def newest(self) -> str:
        """The id of the entry that was appended last, whether it is still there or not."""
        return cast(dict[str, str], self.redis.xinfo_stream(self.stream))["last-generated-id"]

    def pages(self, count: int, after: str = "-") -> Iterator[list[Entry]]:
        """Every entry there is, oldest first, up to `count` at a time.

        Args:
            after: `(` and the id of an entry: only those behind it.
        """
        while page := cast(list[tuple[str, dict[str, str]]], self.redis.xrange(self.stream, after, count=count)):
            yield [Entry(id, fields) for id, fields in page]
            after = f"({page[-1][0]}"

    # --- reading in a group

    def read(self, group: Group, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        """Take up to `count` new entries for a consumer, waiting a bounded time for the first."""
        return self._entries(self._read(group, consumer, ">", count, max(1, int(wait_seconds * 1000))))

    def held(self, group: Group, consumer: str, *, count: int, after: str = "0") -> list[Entry]:
        """What the consumer took and has not acknowledged, oldest first, behind entry `after`."""
        answer = self._read(group, consumer, after, count)
        streams = cast(list[tuple[str, list[tuple[str, dict[str, str]]]]], answer)
        gone = [id for _, entries in streams for id, fields in entries if not fields]
        if gone:
            logger.error("Removed from the stream before %s was done with them: %s", group, ", ".join(gone))
            self.acknowledge(group, *gone)
        return self._entries(answer)

    def held_ids(self, group: Group, consumer: str) -> list[str]:
        """The ids alone of what the consumer took and has not acknowledged, oldest first."""
        ids: list[str] = []
        after = "-"
        while page := self.redis.xpending_range(self.stream, group, after, "+", 1000, consumer):
            ids += [entry["message_id"] for entry in cast(list[dict[str, str]], page)]
            after = f"({ids[-1]}"
        return ids

    def take_over(self, group: Group, consumer: str, *, idle_seconds: float, count: int) -> list[Entry]:
        """Take what other consumers of the group hold and have not touched for `idle_seconds`."""
        answer = self.redis.xautoclaim(self.stream, group, consumer, int(idle_seconds * 1000), count=count)
        return [Entry(id, fields) for id, fields in cast(list[tuple[str, dict[str, str]]], answer[1]) if fields]

    def take_over_from_absent(
        self, group: Group, consumer: str, *, absent_seconds: float, count: int = 500
    ) -> list[Entry]:
        """Take what consumers hold that have not called this, or read anything, for `absent_seconds`."""
        # Waiting for new entries in vain does not count for Redis 6 as a sign of life; this does.
        self._read(group, consumer, "0", 1)
        return take_from_absent(self.redis, self.stream, group, consumer, absent_seconds, count)

    def entry(self, id: str) -> Entry | None:
        """One entry of the stream; None if it was removed."""
        found = cast(list[tuple[str, dict[str, str]]], self.redis.xrange(self.stream, id, id))
        return Entry(*found[0]) if found else None

    def unacknowledged(self, group: Group) -> Iterator[Entry]:
        """Every entry that the group has not acknowledged, taken or not; also what it takes meanwhile."""
        last, after = last_delivered(self.redis, self.stream, group), "-"
        while page := cast(list[dict[str, str]], self.redis.xpending_range(self.stream, group, after, last, 1000)):
            yield from filter(None, (self.entry(pending["message_id"]) for pending in page))
            after = f"({page[-1]['message_id']}"
        for entries in self.pages(1000, f"({last}"):
            yield from entries

    def is_pending(self, group: Group, id: str) -> bool:
        """Whether an entry was delivered to the group and is not acknowledged."""
        return bool(self.redis.xpending_range(self.stream, group, id, id, 1))

    def acknowledge(self, group: Group, *ids: str) -> None:
        """Say that the work these entries asked for is durable."""
        if ids:
            self.redis.xack(self.stream, group, *ids)

    def dead_letters(self, group: str) -> DeadLetters:
        """What the group has set aside because it can't be worked on."""
        return DeadLetters(self.redis, self.stream, group)

    def has_work(self, group: Group) -> bool:
        """Whether there is an entry that the group has not acknowledged."""
        return has_work(self.redis, self.stream, group)

    def group_names(self) -> list[str]:
        """Who reads the stream: ours first, then foreign ones, from before which nothing is trimmed either."""
        return group_names(self.redis, self.stream)

    def backlog(self, group: str) -> Backlog:
        """How far the group is behind the end of the stream."""
        return read_backlog(self.redis, self.stream, group)

    # --- inside

    def _read(self, group: Group, consumer: str, after: str, count: int, block: int | None = None) -> object:
        try:
            return self.redis.xreadgroup(group, consumer, {self.stream: after}, count=count, block=block)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            raise no_such_group(self.stream, group) from error

    @staticmethod
    def _entries(answer: object) -> list[Entry]:
        streams = cast(list[tuple[str, list[tuple[str, dict[str, str]]]]], answer or [])
        # An entry that was removed while it was pending comes without its fields.
        return [Entry(id, fields) for _, entries in streams for id, fields in entries if fields]
