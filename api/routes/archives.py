"""Archives on tape, as surf-archiver reported them."""

from http import HTTPStatus
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from sqlmodel import col, select

from api.deps import SessionDep
from api.paging import Instant, Order, Page, Paging, fetch_page
from api.problems import Problem, documented
from api.schemas import ArchiveDetail, ArchiveSummary, Member, TimestepFilter
from blocks.tables import Archive, ArchiveMember, Timestep

router = APIRouter(tags=["archives"])

NEWEST_FIRST = Order((col(Archive.archived_at), col(Archive.id)), ("archived_at", "id"), (Instant, UUID))


class ArchiveQuery(Paging, TimestepFilter):
    """Archives that hold such timesteps, and which part of the list."""


@router.get("/archives", summary="Archives on tape")
def archives(query: Annotated[ArchiveQuery, Query()], session: SessionDep) -> Page[ArchiveSummary]:
    """Newest first. The filters say which timesteps an archive must hold one of."""
    rows = select(Archive)
    if query.is_narrow:
        holding = select(ArchiveMember.archive_id).join(Timestep, col(Timestep.key) == col(ArchiveMember.key))
        rows = rows.where(col(Archive.id).in_(query.narrow(holding)))
    return fetch_page(session, rows, NEWEST_FIRST, query, "archives", ArchiveSummary.of)


@router.get("/archives/{archive_id}", summary="One archive", responses=documented(HTTPStatus.NOT_FOUND))
def archive(archive_id: UUID, session: SessionDep) -> ArchiveDetail:
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
