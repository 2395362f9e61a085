"""What lists can be narrowed down to."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field
from sqlalchemy import ColumnElement, Select
from sqlmodel import col, func, select

from api.paging import Instant, Paging
from blocks.event_file import TimestepType
from blocks.tables import Timestep, TimestepState
from blocks.tallies import PositionTally, TimestepTally

TIMESTEPS = func.coalesce(func.sum(TimestepTally.timesteps), 0)
EXPERIMENTS = func.count(col(TimestepTally.experiment_id).distinct())

_Timesteps = type[Timestep]
_Tally = type[TimestepTally] | type[PositionTally]

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]


def asked_for(values: Mapping[Any, object]) -> list[ColumnElement[bool]]:
    """The conditions that these columns have these values, of those values that are asked for."""
    return [col(column) == value for column, value in values.items() if value is not None]


class TimestepFilter(BaseModel):
    """Which timesteps."""

    system: Name | None = Field(None, description="Imaging system.", examples=["prince"])
    experiment: Name | None = Field(None, description="Experiment.", examples=["20261101_004"])
    state: TimestepState | None = Field(None, description="How far it has come.", examples=["uploaded"])
    type: TimestepType | None = Field(None, description="What its images are.", examples=["stitch"])
    position: int | None = Field(None, ge=0, le=2**31 - 1, description="Position on the plate.", examples=[12])
    start: Instant | None = Field(None, description="Taken at this time or later.", examples=["2026-11-23T00:00:00Z"])
    end: Instant | None = Field(None, description="Taken before this time.", examples=["2026-11-24T00:00:00Z"])

    @property
    def is_narrow(self) -> bool:
        """Whether anything is asked for at all."""
        return any(getattr(self, name) is not None for name in TimestepFilter.model_fields)

    def narrow(self, rows: Select[Any]) -> Select[Any]:
        """The rows of a query over timesteps that pass."""
        rows = rows.where(
            *asked_for({**self._kind(Timestep), Timestep.state: self.state, Timestep.position: self.position})
        )
        if self.start:
            rows = rows.where(col(Timestep.timestamp) >= self.start)
        if self.end:
            rows = rows.where(col(Timestep.timestamp) < self.end)
        return rows

    def narrow_tally(self, rows: Select[Any], tally: _Tally) -> Select[Any]:
        """The rows of a query over a tally that pass, as far as it tells."""
        return rows.where(*asked_for(self._kind(tally)))

    def tally(
        self, counted: Any = TIMESTEPS, states: Sequence[TimestepState] = tuple(TimestepState)
    ) -> Select[Any] | None:
        """How many timesteps in these states pass; None where the tallies don't tell that."""
        if self._goes_beyond_tallies:
            return None
        return self._tallied(select(counted)).where(col(TimestepTally.state).in_(states))

    def experiments(self) -> Select[Any]:
        """The experiments with timesteps that pass."""
        rows = self._tallied(select(TimestepTally.experiment_id, TIMESTEPS)).group_by(col(TimestepTally.experiment_id))
        if not self._goes_beyond_tallies:
            return rows
        # One look into an index for each experiment: OFFSET keeps PostgreSQL from joining all timesteps instead.
        one = self.narrow(select(Timestep.id)).where(col(Timestep.experiment_id) == TimestepTally.experiment_id)
        return rows.where(one.offset(0).correlate(TimestepTally).exists())

    @property
    def _goes_beyond_tallies(self) -> bool:
        return self.position is not None or self.start is not None or self.end is not None

    def _tallied(self, rows: Select[Any]) -> Select[Any]:
        there = col(TimestepTally.timesteps) > 0
        return self.narrow_tally(rows, TimestepTally).where(there, *asked_for({TimestepTally.state: self.state}))

    def _kind(self, table: _Tally | _Timesteps) -> dict[Any, object]:
        return {table.system: self.system, table.experiment_id: self.experiment, table.type: self.type}


class TimestepQuery(Paging, TimestepFilter):
    """Which timesteps, and which part of the list. What a flight check sent is listed only where it is asked for."""

    def narrow(self, rows: Select[Any]) -> Select[Any]:
        """The rows of a query over timesteps that pass."""
        return super().narrow(rows).where(*self._no_flight_check(Timestep))

    def narrow_tally(self, rows: Select[Any], tally: _Tally) -> Select[Any]:
        """The rows of a query over a tally that pass, as far as it tells."""
        return super().narrow_tally(rows, tally).where(*self._no_flight_check(tally))

    def _no_flight_check(self, table: _Tally | _Timesteps) -> list[ColumnElement[bool]]:
        return [] if self.system or self.type else [col(table.type) != TimestepType.FLIGHT_CHECK]
