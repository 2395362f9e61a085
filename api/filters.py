"""What lists can be narrowed down to."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field
from sqlalchemy import ColumnElement, Select
from sqlmodel import col, func, select

from api.paging import Instant, Paging
from blocks.event_file import TimestepType
from blocks.tables import Timestep, TimestepState, TimestepTally

TIMESTEPS = func.coalesce(func.sum(TimestepTally.timesteps), 0)
EXPERIMENTS = func.count(col(TimestepTally.experiment_id).distinct())

_Table = type[Timestep] | type[TimestepTally]

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
        rows = self._narrow(rows, Timestep)
        if self.position is not None:
            rows = rows.where(col(Timestep.position) == self.position)
        if self.start:
            rows = rows.where(col(Timestep.timestamp) >= self.start)
        if self.end:
            rows = rows.where(col(Timestep.timestamp) < self.end)
        return rows

    def tally(
        self, counted: Any = TIMESTEPS, states: Sequence[TimestepState] = tuple(TimestepState)
    ) -> Select[Any] | None:
        """How many timesteps in these states pass; None where the tallies don't tell that."""
        if self.position is not None or self.start or self.end:
            return None
        there = col(TimestepTally.timesteps) > 0, col(TimestepTally.state).in_(states)
        return self._narrow(select(counted), TimestepTally).where(*there)

    def _narrow(self, rows: Select[Any], table: _Table) -> Select[Any]:
        return rows.where(
            *asked_for(
                {
                    table.system: self.system,
                    table.experiment_id: self.experiment,
                    table.state: self.state,
                    table.type: self.type,
                }
            )
        )


class TimestepQuery(Paging, TimestepFilter):
    """Which timesteps, and which part of the list."""
