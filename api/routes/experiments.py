"""Experiments: how much there is of each, and where something is missing."""

from collections.abc import Sequence
from datetime import datetime
from http import HTTPStatus
from itertools import groupby, pairwise
from statistics import median
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from sqlalchemy import Row, Select, func
from sqlmodel import col, select

from api.deps import SessionDep
from api.paging import Order, Page, fetch_page
from api.problems import Problem, documented
from api.schemas import Name, TimestepQuery
from blocks.event_file import TimestepType
from blocks.tables import Timestep, TimestepState

router = APIRouter(tags=["experiments"])

NEWEST_FIRST = Order((col(Timestep.experiment_id),), ("experiment_id",), (str,))

# A timestep is missing where one took longer than this many times what is usual.
LATE = 1.5


class Experiment(BaseModel):
    """How much there is of an experiment."""

    experiment_id: str = Field(examples=["20261101_004"])
    systems: list[str]
    timesteps: int
    positions: int
    images: int = Field(description="As announced.")
    bytes: int = Field(description="In object storage.")
    states: dict[TimestepState, int] = Field(description="How many timesteps are in each state.")
    first: datetime
    last: datetime


class Gap(BaseModel):
    """A time in which timesteps are missing."""

    after: datetime
    before: datetime | None = Field(description="Null when the position has not gone on at all.")
    missing: int = Field(description="How many timesteps, by the position's own cadence.")


class Coverage(BaseModel):
    """What there is of one position over time."""

    type: TimestepType
    position: int
    timesteps: int
    first: datetime
    last: datetime
    cadence_seconds: float | None = Field(description="The usual time between two; null below three timesteps.")
    gaps: list[Gap]


class ExperimentDetail(Experiment):
    """An experiment with its positions."""

    coverage: list[Coverage]


def _experiments() -> Select[Any]:
    states = (func.count().filter(col(Timestep.state) == state).label(state.value) for state in TimestepState)
    return select(  # type: ignore[call-overload,no-any-return]
        Timestep.experiment_id,
        func.array_agg(col(Timestep.system).distinct()).label("systems"),
        func.count().label("timesteps"),
        func.count(col(Timestep.position).distinct()).label("positions"),
        func.sum(Timestep.image_count).label("images"),
        func.coalesce(func.sum(Timestep.size), 0).label("bytes"),
        func.min(Timestep.timestamp).label("first"),
        func.max(Timestep.timestamp).label("last"),
        *states,
    ).group_by(col(Timestep.experiment_id))


def _experiment(row: Row[Any]) -> Experiment:
    found = row._asdict()
    return Experiment.model_validate({**found, "states": {state: found[state.value] for state in TimestepState}})


@router.get("/experiments", summary="Experiments")
def experiments(query: Annotated[TimestepQuery, Query()], session: SessionDep) -> Page[Experiment]:
    """By their id, the highest first: ids begin with a date. The filters say which timesteps count."""
    return fetch_page(session, query.narrow(_experiments()), NEWEST_FIRST, query, "experiments", _experiment)


@router.get("/experiments/{experiment_id}", summary="One experiment", responses=documented(HTTPStatus.NOT_FOUND))
def experiment(experiment_id: Annotated[Name, Path()], session: SessionDep) -> ExperimentDetail:
    """Coverage per position over time, with the gaps: where one should have a timestep by its own cadence."""
    row = session.execute(_experiments().where(col(Timestep.experiment_id) == experiment_id)).one_or_none()
    if row is None:
        raise Problem(HTTPStatus.NOT_FOUND, f"There is no experiment {experiment_id}.")
    taken = session.exec(
        select(Timestep.type, Timestep.position, Timestep.timestamp)
        .where(col(Timestep.experiment_id) == experiment_id)
        .order_by(col(Timestep.type), col(Timestep.position), col(Timestep.timestamp))
    )
    series = [
        (type, position, [at for _, _, at in group])
        for (type, position), group in groupby(taken, key=lambda row: (row[0], row[1]))
    ]
    last = {type: max(times[-1] for kind, _, times in series if kind == type) for type, _, _ in series}
    return ExperimentDetail(
        **_experiment(row).model_dump(),
        coverage=[
            Coverage(
                type=type,
                position=position,
                timesteps=len(times),
                first=times[0],
                last=times[-1],
                cadence_seconds=cadence_of(times),
                gaps=gaps_in(times, last[type]),
            )
            for type, position, times in series
        ],
    )


def cadence_of(times: Sequence[datetime]) -> float | None:
    """The usual time between two timesteps, in seconds; None where there are too few to tell."""
    if len(times) < 3:
        return None
    return median((after - before).total_seconds() for before, after in pairwise(times)) or None


def gaps_in(times: Sequence[datetime], end: datetime) -> list[Gap]:
    """Where a position should have timesteps and hasn't, up to the last one of its experiment."""
    cadence = cadence_of(times)
    if cadence is None:
        return []
    gaps = [
        Gap(after=before, before=after, missing=round(seconds / cadence) - 1)
        for before, after in pairwise(times)
        if (seconds := (after - before).total_seconds()) > LATE * cadence
    ]
    if (behind := (end - times[-1]).total_seconds()) > LATE * cadence:
        gaps.append(Gap(after=times[-1], before=None, missing=int(behind / cadence)))
    return gaps
