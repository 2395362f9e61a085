"""Experiments: how much there is of each, and where something is missing."""

from collections.abc import Sequence
from datetime import datetime
from http import HTTPStatus
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from sqlalchemy import Row, func
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlmodel import col, select

from api.deps import SessionDep
from api.experiment_figures import figures_of
from api.filters import EXPERIMENTS, Name, TimestepFilter, TimestepQuery
from api.paging import Order, Page, fetch_page
from api.problems import Problem, documented
from blocks.event_file import TimestepType
from blocks.tables import Timestep, TimestepState
from blocks.tallies import TimestepTally

router = APIRouter(tags=["experiments"])

NEWEST_FIRST = Order((col(TimestepTally.experiment_id),), ("experiment_id",), (str,))

# A timestep is missing where one took longer than this many times what is usual.
LATE = 1.5


ExperimentPath = Annotated[Name, Path(description="Its id.", examples=["20261101_004"])]


class Experiment(BaseModel):
    """How much there is of an experiment."""

    experiment_id: str = Field(description="Its id.", examples=["20261101_004"])
    systems: list[str] = Field(description="Imaging systems that took it.", examples=[["prince"]])
    timesteps: int = Field(description="How many.", examples=[2000])
    positions: int = Field(description="How many.", examples=[40])
    images: int = Field(description="As announced.", examples=[300_000])
    bytes: int = Field(description="In object storage.", examples=[1_200_246_784_000])
    states: dict[TimestepState, int] = Field(
        description="How many timesteps are in each state.", examples=[{"uploaded": 12, "archived": 1988}]
    )
    first: datetime = Field(description="When the first timestep was taken.", examples=["2026-11-01T18:00:03Z"])
    last: datetime = Field(description="When the last one was taken.", examples=["2026-11-23T10:42:07Z"])


class Gap(BaseModel):
    """A time in which timesteps are missing."""

    after: datetime = Field(description="The last timestep before it.", examples=["2026-11-20T10:00:00Z"])
    before: datetime | None = Field(
        description="The next one; null when the position has not gone on at all.", examples=["2026-11-20T16:00:00Z"]
    )
    missing: int = Field(description="How many timesteps, by the position's own cadence.", examples=[2])


class Coverage(BaseModel):
    """What there is of one position over time."""

    type: TimestepType = Field(description="What the images are.", examples=["stitch"])
    position: int = Field(description="Position on the plate.", examples=[12])
    timesteps: int = Field(description="How many.", examples=[50])
    first: datetime = Field(description="When the first one was taken.", examples=["2026-11-01T18:12:03Z"])
    last: datetime = Field(description="When the last one was taken.", examples=["2026-11-23T10:42:07Z"])
    cadence_seconds: float | None = Field(
        description="The usual time between two; null below three timesteps.", examples=[7200.0]
    )
    gaps: list[Gap] = Field(description="Where timesteps are missing.")


class ExperimentDetail(Experiment):
    """An experiment with its positions."""

    coverage: list[Coverage] = Field(description="Position by position.")


def _experiment(row: Row[Any]) -> Experiment:
    found = row._asdict()
    return Experiment.model_validate({**found, "states": {state: found[state.value] for state in TimestepState}})


@router.get("/experiments", summary="Experiments")
def experiments(query: Annotated[TimestepQuery, Query()], session: SessionDep) -> Page[Experiment]:
    """By their id, the highest first: ids begin with a date. The filters say which timesteps count."""
    rows, tally = query.experiments(), query.tally(EXPERIMENTS)
    page = fetch_page(session, rows, NEWEST_FIRST, query, "experiments", lambda row: str(row.experiment_id), tally)
    figures = figures_of(session, page.data, query)
    # What was removed in between is left out.
    data = [_experiment(figures[id]) for id in page.data if id in figures]
    return Page(count=page.count, data=data, next=page.next)


@router.get("/experiments/{experiment_id}", summary="One experiment", responses=documented(HTTPStatus.NOT_FOUND))
def experiment(experiment_id: ExperimentPath, session: SessionDep) -> ExperimentDetail:
    """Coverage per position over time, with the gaps: where one should have a timestep by its own cadence."""
    row = figures_of(session, [experiment_id], TimestepFilter()).get(experiment_id)
    if row is None:
        raise Problem(HTTPStatus.NOT_FOUND, f"There is no experiment {experiment_id}.")
    # One row per position: two thousand rows take longer than all the rest.
    series = session.exec(
        select(
            Timestep.type,
            Timestep.position,
            func.array_agg(aggregate_order_by(col(Timestep.timestamp), col(Timestep.timestamp))),
        )
        .where(col(Timestep.experiment_id) == experiment_id)
        .group_by(col(Timestep.type), col(Timestep.position))
        .order_by(col(Timestep.type), col(Timestep.position))
    ).all()
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
