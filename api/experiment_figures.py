"""How much there is of experiments: out of tallies where these tell it, else counted."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Select
from sqlmodel import Session, col, func, select

from api.filters import TimestepFilter, asked_for
from blocks.bulk import among
from blocks.tables import Timestep, TimestepState
from blocks.tallies import PositionTally, TimestepTally


def figures_of(session: Session, experiment_ids: Sequence[str], asked: TimestepFilter) -> dict[str, Row[Any]]:
    """Of each of these experiments with timesteps that pass: systems, timesteps, positions, images, bytes, first, last,
    and the number in each state, under the state's name."""

    def by_id(rows: Select[Any]) -> dict[str, Row[Any]]:
        return {row.experiment_id: row for row in session.execute(rows)}

    if asked.position is not None:
        return by_id(_counted(experiment_ids, asked))
    # A hundred experiments have two hundred thousand timesteps, but few of them lie only in part in the time asked for.
    found = by_id(_tallied(experiment_ids, asked.model_copy(update={"start": None, "end": None})))
    in_part = [
        id
        for id, row in found.items()
        if (asked.start and row.first < asked.start) or (asked.end and row.last >= asked.end)
    ]
    counted = by_id(_counted(in_part, asked)) if in_part else {}
    return {id: row for id, row in found.items() if id not in in_part} | counted


def _tallied(experiment_ids: Sequence[str], asked: TimestepFilter) -> Select[Any]:
    """Whatever their position, and whenever they were taken."""
    tally, place = TimestepTally, PositionTally
    total = func.sum(tally.timesteps)

    def times(end: Any) -> Any:
        of_it = select(end(Timestep.timestamp)).where(col(Timestep.experiment_id) == tally.experiment_id)
        return asked.narrow(of_it).correlate(tally).scalar_subquery()

    positions = asked.narrow_tally(select(func.count(col(place.position).distinct())), place).where(
        col(place.timesteps) > 0, col(place.experiment_id) == tally.experiment_id
    )
    if asked.state is not None:
        one = asked.narrow(select(Timestep.id)).where(
            col(Timestep.experiment_id) == place.experiment_id, col(Timestep.position) == place.position
        )
        # One look into an index for each: OFFSET keeps PostgreSQL from joining all timesteps instead.
        positions = positions.where(one.offset(0).correlate(place).exists())
    rows: Select[Any] = select(  # type: ignore[call-overload]
        tally.experiment_id,
        func.array_agg(col(tally.system).distinct()).label("systems"),
        total.label("timesteps"),
        positions.correlate(tally).scalar_subquery().label("positions"),
        func.sum(tally.images).label("images"),
        func.sum(tally.bytes).label("bytes"),
        times(func.min).label("first"),
        times(func.max).label("last"),
        *(func.coalesce(total.filter(col(tally.state) == state), 0).label(state.value) for state in TimestepState),
    )
    return (
        asked.narrow_tally(rows, tally)
        .where(
            col(tally.timesteps) > 0, among(tally.experiment_id, experiment_ids), *asked_for({tally.state: asked.state})
        )
        .group_by(col(tally.experiment_id))
    )


def _counted(experiment_ids: Sequence[str], asked: TimestepFilter) -> Select[Any]:
    """Position by position first: counting distinct positions and systems sorts what it counts."""
    sums = {"images": func.sum(Timestep.image_count), "bytes": func.coalesce(func.sum(Timestep.size), 0)}
    counts = {state.value: func.count().filter(col(Timestep.state) == state) for state in TimestepState}
    added: dict[str, Any] = {"timesteps": func.count(), **sums, **counts}
    place = (Timestep.experiment_id, Timestep.position, Timestep.system)
    each = asked.narrow(
        select(  # type: ignore[call-overload]
            *place,
            *(figure.label(name) for name, figure in added.items()),
            func.min(Timestep.timestamp).label("first"),
            func.max(Timestep.timestamp).label("last"),
        )
    )
    one = each.where(among(Timestep.experiment_id, experiment_ids)).group_by(*map(col, place)).subquery().c
    rows: Select[Any] = select(  # type: ignore[call-overload]
        one.experiment_id,
        func.array_agg(one.system.distinct()).label("systems"),
        func.count(one.position.distinct()).label("positions"),
        *(func.sum(one[name]).label(name) for name in added),
        func.min(one.first).label("first"),
        func.max(one.last).label("last"),
    )
    return rows.group_by(one.experiment_id)
