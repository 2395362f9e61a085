"""Timesteps: lists, and all that is known of one."""

from http import HTTPStatus
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from fastapi.responses import RedirectResponse
from sqlalchemy import and_, or_
from sqlmodel import Session, col, select

from api.deps import SessionDep, StoreDep
from api.paging import Instant, Order, Page, fetch_page
from api.problems import Problem, documented
from api.schemas import (
    ArchiveReference,
    Export,
    HistoryEvent,
    TimestepDetail,
    TimestepObject,
    TimestepQuery,
    TimestepSummary,
)
from blocks.messages import Archived
from blocks.tables import Archive, ArchiveMember, Timestep, TimestepEvent

router = APIRouter(tags=["timesteps"])

NEWEST_FIRST = Order((col(Timestep.timestamp), col(Timestep.id)), ("timestamp", "id"), (Instant, UUID))


@router.get("/exports", summary="Uploaded timesteps, each with a URL that fetches it")
def exports(query: Annotated[TimestepQuery, Query()], session: SessionDep, store: StoreDep) -> Page[Export]:
    """Newest first, by the time the images were taken. Archived timesteps are among them."""

    def show(timestep: Timestep) -> Export:
        url = store.presigned_url(timestep.key or "")
        return Export.model_validate({**timestep.model_dump(), "timestep_id": timestep.id, "url": url})

    rows = query.narrow(select(Timestep).where(col(Timestep.uploaded_at).is_not(None)))
    return fetch_page(session, rows, NEWEST_FIRST, query, "exports", show)


@router.get("/timesteps", summary="Timesteps in any state")
def timesteps(query: Annotated[TimestepQuery, Query()], session: SessionDep) -> Page[TimestepSummary]:
    """Newest first, by the time the images were taken."""
    return fetch_page(session, query.narrow(select(Timestep)), NEWEST_FIRST, query, "timesteps", TimestepSummary.of)


def find_timestep(session: Session, timestep_id: UUID) -> Timestep:
    """The timestep.

    Raises:
        Problem: when there is none.
    """
    timestep = session.get(Timestep, timestep_id)
    if timestep is None:
        raise Problem(HTTPStatus.NOT_FOUND, f"There is no timestep {timestep_id}.")
    return timestep


def find_uploaded(session: Session, timestep_id: UUID) -> tuple[Timestep, str]:
    """The timestep and the key of its object.

    Raises:
        Problem: when there is none, or it is not uploaded as yet.
    """
    timestep = find_timestep(session, timestep_id)
    if timestep.key is None:
        raise Problem(HTTPStatus.NOT_FOUND, f"Timestep {timestep_id} is not uploaded; it is {timestep.state}.")
    return timestep, timestep.key


@router.get(
    "/timesteps/{timestep_id}",
    summary="All that is known of one timestep",
    responses=documented(HTTPStatus.NOT_FOUND),
)
def timestep(timestep_id: UUID, session: SessionDep) -> TimestepDetail:
    """Its object and what proves it, the archives it is in, its whole history, and what is wrong if something is."""
    timestep = find_timestep(session, timestep_id)
    # Who announces an archive may not know yet whose key it is.
    by_key = and_(col(TimestepEvent.type) == Archived.type, col(TimestepEvent.key) == timestep.key)
    history = session.exec(
        select(TimestepEvent)
        .where(or_(col(TimestepEvent.timestep_id) == timestep_id, by_key))
        .order_by(col(TimestepEvent.time), col(TimestepEvent.id))
    )
    archives = session.exec(
        select(Archive.id, Archive.path, ArchiveMember.archived_at)
        .where(col(ArchiveMember.archive_id) == col(Archive.id), col(ArchiveMember.key) == timestep.key)
        .order_by(col(ArchiveMember.archived_at), col(Archive.id))
    )
    return TimestepDetail(
        **TimestepSummary.of(timestep).model_dump(),
        event_file=timestep.event_file,
        image_dir=timestep.image_dir,
        announced=timestep.announced,
        object=TimestepObject.model_validate(timestep.model_dump()) if timestep.key else None,
        archives=[ArchiveReference(archive_id=id, path=path, archived_at=at) for id, path, at in archives],
        history=[HistoryEvent.of(event) for event in history],
    )


@router.get(
    "/timesteps/{timestep_id}/download",
    summary="Fetch the timestep's tar",
    status_code=HTTPStatus.TEMPORARY_REDIRECT,
    response_class=RedirectResponse,
    responses=documented(HTTPStatus.NOT_FOUND),
)
def download(timestep_id: UUID, session: SessionDep, store: StoreDep) -> RedirectResponse:
    """Redirects to a URL that fetches the tar from object storage, for an hour."""
    _, key = find_uploaded(session, timestep_id)
    return RedirectResponse(store.presigned_url(key), headers={"Cache-Control": "no-store"})
