"""Archives on tape, as surf-archiver reported them."""

from datetime import date, datetime
from http import HTTPStatus
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from sqlalchemy import Select
from sqlmodel import col, select

from api.deps import SessionDep
from api.filters import TimestepFilter, asked_for
from api.paging import Instant, Order, Page, Paging, fetch_page
from api.problems import Problem, documented
from api.schemas import Key
from blocks.tables import Archive, ArchiveMember, Timestep
from blocks.tallies import ArchiveHolding, PositionTally, TimestepTally

router = APIRouter(tags=["archives"])

NEWEST_FIRST = Order((col(Archive.archived_at), col(Archive.id)), ("archived_at", "id"), (Instant, UUID))


class ArchiveSummary(BaseModel):
    """An archive on tape."""

    archive_id: UUID = Field(description="Follows from its path.", examples=["a7933df7-2cb2-5ff3-9f9d-44cca3a3be33"])
    path: str = Field(description="On tape.", examples=["images/20261101_004/20261123.tar"])
    date: Annotated[date, Field(description="The day it is of.", examples=["2026-11-23"])]
    job_id: UUID = Field(
        description="surf-archiver's job that first reported it.", examples=["0d9a7c1e-3f5b-4a57-9a55-7f3f0f1f2a3b"]
    )
    archived_at: datetime = Field(description="When it was first reported.", examples=["2026-11-24T03:00:00Z"])

    @classmethod
    def of(cls, archive: Archive) -> Self:
        """What is shown of an archive."""
        return cls.model_validate({**archive.model_dump(), "archive_id": archive.id})


class Member(BaseModel):
    """An object in an archive."""

    key: Key
    timestep_id: UUID | None = Field(
        description="Null while nobody knows an upload of this key.", examples=["6a0ecf0c-4a5b-4a49-9cb3-0c7a86a4e2a1"]
    )
    archived_at: datetime = Field(description="When that was first reported.", examples=["2026-11-24T03:00:00Z"])


class ArchiveDetail(ArchiveSummary):
    """An archive with the objects in it."""

    members: list[Member] = Field(description="By key.")


ArchivePath = Annotated[UUID, Path(description="Its id.", examples=["a7933df7-2cb2-5ff3-9f9d-44cca3a3be33"])]


class ArchiveQuery(Paging, TimestepFilter):
    """Archives that hold such timesteps, and which part of the list."""


@router.get("/archives", summary="Archives on tape")
def archives(query: Annotated[ArchiveQuery, Query()], session: SessionDep) -> Page[ArchiveSummary]:
    """Newest first. The filters say which timesteps an archive must hold one of."""
    rows, holding = select(Archive), _holding(query)
    if query.experiment is not None:
        rows = rows.where(col(Archive.id).in_(holding))
    elif query.is_narrow:
        # One after the other, until there is a page of them: OFFSET keeps PostgreSQL from looking into all first.
        rows = rows.where(holding.where(col(ArchiveHolding.archive_id) == Archive.id).offset(0).exists())
    # Few are looked into for a page, but all of them for their number.
    is_countable = not query.is_narrow or query.experiment is not None
    return fetch_page(session, rows, NEWEST_FIRST, query, "archives", ArchiveSummary.of, is_countable=is_countable)


def _holding(query: ArchiveQuery) -> Select[Any]:
    """The archives that hold a timestep that passes: those that may hold one are looked into until one is found."""
    held = ArchiveHolding
    rows = select(held.archive_id).where(
        *asked_for({held.system: query.system, held.experiment_id: query.experiment, held.type: query.type})
    )
    if query.start:
        rows = rows.where(col(held.last) >= query.start)
    if query.end:
        rows = rows.where(col(held.first) < query.end)
    for tally, column, value in (
        (TimestepTally, TimestepTally.state, query.state),
        (PositionTally, PositionTally.position, query.position),
    ):
        if value is not None:
            there = select(tally.timesteps).where(
                col(tally.experiment_id) == held.experiment_id,
                col(tally.system) == held.system,
                col(tally.type) == held.type,
                col(column) == value,
                col(tally.timesteps) > 0,
            )
            rows = rows.where(there.offset(0).correlate(held).exists())
    one = query.narrow(select(Timestep.id).join(ArchiveMember, col(ArchiveMember.key) == col(Timestep.key)))
    # OFFSET again: it would join all timesteps with all members.
    return rows.where(one.where(col(ArchiveMember.archive_id) == held.archive_id).offset(0).correlate(held).exists())


@router.get("/archives/{archive_id}", summary="One archive", responses=documented(HTTPStatus.NOT_FOUND))
def archive(archive_id: ArchivePath, session: SessionDep) -> ArchiveDetail:
    """The objects in it, and the timesteps they are, where these are known."""
    archive = session.get(Archive, archive_id)
    if archive is None:
        raise Problem(HTTPStatus.NOT_FOUND, f"There is no archive {archive_id}.")
    members = session.exec(
        select(ArchiveMember, Timestep.id)
        .join(Timestep, col(Timestep.key) == col(ArchiveMember.key), isouter=True)
        .where(col(ArchiveMember.archive_id) == archive_id)
        .order_by(col(ArchiveMember.key))
    )
    return ArchiveDetail(
        **ArchiveSummary.of(archive).model_dump(),
        members=[Member(key=member.key, timestep_id=id, archived_at=member.archived_at) for member, id in members],
    )
