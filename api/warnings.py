"""The early warnings, as the API tells them."""

import math
import time
from datetime import datetime
from typing import Self

from pydantic import BaseModel, Field
from sqlmodel import Session

from blocks.disk_outlook import DiskOutlook
from blocks.early_warnings import EarlyWarnings, SilentSystem
from blocks.event_log import EventLog
from blocks.expiry import ExpiryRules
from blocks.flight_outcome import FlightOutcome, Verdict
from blocks.redis_answers import AUDITS, FLIGHTS, MEMORY, SYSTEMS, UPLOADERS, RedisAnswers
from blocks.system_seen import SystemSeen

REMEMBER_SECONDS = 10.0


class SilentSystemRow(BaseModel):
    """An imaging system that announces nothing any more, as far as its own cadence tells."""

    system: str = Field(description="Imaging system.", examples=["prince"])
    last: datetime = Field(description="Its last timestep.", examples=["2026-11-23T10:42:07Z"])
    cadence_seconds: float = Field(description="Between two of its timesteps, as a rule.", examples=[3600.0])

    @classmethod
    def of(cls, silent: SilentSystem) -> Self:
        """The same, to be answered."""
        return cls(system=silent.system, last=silent.last, cadence_seconds=silent.cadence.total_seconds())


class FlightCheckRow(BaseModel):
    """How the last flight check ended."""

    at: datetime = Field(description="When it ended.", examples=["2026-11-23T10:52:09Z"])
    verdict: Verdict = Field(description="What came of it.", examples=["good"])
    sentence: str = Field(
        description="What was found, or what to do.",
        examples=["a timestep of 3 images went the whole way in 2.1 s, and was removed again"],
    )
    last_good: datetime | None = Field(
        description="When the last good one ended; null if none was.", examples=["2026-11-23T10:52:09Z"]
    )

    @classmethod
    def of(cls, outcome: FlightOutcome) -> Self:
        """The same, to be answered."""
        return cls(**outcome.model_dump())


class DiskRow(BaseModel):
    """A disk with files of systems or copies of them. Rates are those of the last day."""

    directory: str = Field(description="On it, where the event-ingester sees it.", examples=["/data/prince"])
    systems: list[str] = Field(description="Whose files or copies it holds.", examples=[["prince"]])
    free_bytes: int = Field(description="Free.", examples=[800_000_000_000])
    total_bytes: int = Field(description="Of all of it.", examples=[4_000_000_000_000])
    bytes_in_per_hour: float = Field(description="Taken in, or copied there.", examples=[20_000_000_000.0])
    bytes_out_per_hour: float = Field(description="Deleted.", examples=[15_000_000_000.0])
    hours_left: float | None = Field(
        description="Until it is full; null where no more comes than goes.", examples=[160]
    )
    hours_to_upload: float | None = Field(
        description="Until what waits is uploaded; null where nothing is uploaded.", examples=[0.5]
    )
    is_filling: bool = Field(
        description="Whether it will be full soon, or before the uploads catch up.", examples=[False]
    )

    @classmethod
    def of(cls, disk: DiskOutlook) -> Self:
        """The same, to be answered."""
        return cls(
            directory=disk.directory,
            systems=list(disk.systems),
            free_bytes=disk.free,
            total_bytes=disk.total,
            bytes_in_per_hour=disk.rate_in,
            bytes_out_per_hour=disk.rate_out,
            hours_left=_finite(disk.hours_left),
            hours_to_upload=_finite(disk.hours_to_upload),
            is_filling=disk.is_filling,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Warnings:
    """The early warnings, each time as they were some seconds ago at most: they count the events of a day."""

    def __init__(self, log: EventLog, rules: ExpiryRules) -> None:
        self._log = log
        self._rules = rules
        self._known: EarlyWarnings | None = None
        self._good_until = 0.0

    def read(self, session: Session, now: datetime) -> EarlyWarnings:
        """All of them; without those that Redis tells of while it is away."""
        if self._known is None or time.monotonic() >= self._good_until:
            ask, log = RedisAnswers().ask, self._log
            self._known = EarlyWarnings.of(
                session,
                ask(log.systems.all, [], SYSTEMS),
                self._rules.read(),
                now,
                ask(log.flights.last, None, FLIGHTS),
                lambda systems: ask(lambda: log.reach.not_uploading(systems), set(), UPLOADERS),
                ask(lambda: log.memory, None, MEMORY),
                ask(log.audits.last, [], AUDITS),
            )
            self._good_until = time.monotonic() + REMEMBER_SECONDS
        return self._known

    def names(self) -> dict[str, str]:
        """What people call each system; none while Redis is away."""
        systems: list[SystemSeen] = RedisAnswers().ask(self._log.systems.all, [], SYSTEMS)
        return {seen.name: seen.display_name for seen in systems}
