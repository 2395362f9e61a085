"""How much there is of experiments: out of tallies where these tell it, else counted."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Select
from sqlmodel import Session, col, func, select

from api.filters import TimestepFilter
from blocks.bulk import among
from blocks.tables import PositionTally, Timestep, TimestepState, TimestepTally


def figures_of(session: Session, experiment_ids: Sequence[str], asked: TimestepFilter) -> dict[str, Row[Any]]:
    """Of each of these experiments with timesteps that pass: systems, timesteps, positions, images, bytes, first, last,
    and the number in each state, under the state's name."""
    of_all = asked.position is None and asked.state is None and asked.start is None and asked.end is None
    rows = _tallied(experiment_ids, asked) if of_all else _counted(experiment_ids, asked)
    return {row.experiment_id: row for row in session.execute(rows)}


def _tallied(experiment_ids: Sequence[str], asked: TimestepFilter) -> Select[Any]:
    """A hundred experiments have two hundred thousand timesteps, but a few thousand positions."""
    tally = TimestepTally
    total = func.sum(tally.timesteps)

    def times(end: Any) -> Any:
        of_it = select(end(Timestep.timestamp)).where(col(Timestep.experiment_id) == tally.experiment_id)
        return asked.narrow(of_it).correlate(tally).scalar_subquery()

    positions = asked.narrow_tally(select(func.count(col(PositionTally.position).distinct())), PositionTally).where(
        col(PositionTally.timesteps) > 0, col(PositionTally.experiment_id) == tally.experiment_id
    )
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
        .where(col(tally.timesteps) > 0, among(tally.experiment_id, experiment_ids))
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
