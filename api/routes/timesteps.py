"""Timesteps: lists, and all that is known of one."""

from collections.abc import Iterable, Iterator
from datetime import UTC
from functools import cache
from http import HTTPStatus
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from fastapi.responses import RedirectResponse
from sqlalchemy import Row, and_, or_
from sqlmodel import Session, col, select

from api.deps import Services, ServicesDep, SessionDep, StoreDep
from api.filters import TimestepQuery
from api.paging import Instant, Order, Page, fetch_page
from api.problems import Problem, documented
from api.schemas import (
    ArchiveReference,
    Export,
    FlowRun,
    HistoryEvent,
    TimestepDetail,
    TimestepObject,
    TimestepPath,
    TimestepSummary,
)
from api.troubles import find_wait, rejections_of, what_became_of_its_object
from blocks.messages import Archived, Withdrawn
from blocks.object_store import ObjectStore
from blocks.tables import Archive, ArchiveMember, Timestep, TimestepEvent, TimestepState
from blocks.waits import Wait

router = APIRouter(tags=["timesteps"])

URL_SECONDS = 3600

NEWEST_FIRST = Order((col(Timestep.timestamp), col(Timestep.id)), ("timestamp", "timestep_id"), (Instant, UUID))


@router.get("/exports", summary="Uploaded timesteps, each with a URL that fetches it")
def exports(query: Annotated[TimestepQuery, Query()], session: SessionDep, store: StoreDep) -> Page[Export]:
    """Newest first, by the time the images were taken. Archived timesteps are among them."""
    presigner_of = cache(lambda bucket: store.of_bucket(bucket).presigner)

    def show(row: Row[Any]) -> Export:
        url = presigner_of(row.bucket).url(row.key, URL_SECONDS)
        return Export.model_validate({**row._asdict(), "url": url})

    states = (TimestepState.UPLOADED, TimestepState.ARCHIVED)
    rows = query.narrow(select(*Export.columns()).where(col(Timestep.state).in_(states)))
    tally = query.tally(states=states)
    return fetch_page(session, rows, NEWEST_FIRST, query, "exports", show, tally)


@router.get("/timesteps", summary="Timesteps in any state")
def timesteps(query: Annotated[TimestepQuery, Query()], session: SessionDep) -> Page[TimestepSummary]:
    """Newest first, by the time the images were taken."""
    return list_timesteps(session, query)


def list_timesteps(session: Session, query: TimestepQuery) -> Page[TimestepSummary]:
    """The page of timesteps that was asked for."""
    rows = query.narrow(select(*TimestepSummary.columns()))
    return fetch_page(
        session, rows, NEWEST_FIRST, query, "timesteps", lambda row: TimestepSummary.of(row._asdict()), query.tally()
    )


def find_timestep(session: Session, timestep_id: UUID) -> Timestep:
    """The timestep.

    Raises:
        Problem: when there is none.
    """
    timestep = session.get(Timestep, timestep_id)
    if timestep is None:
        event = TimestepEvent
        said = select(event.time, event.data).where(event.timestep_id == timestep_id, event.type == Withdrawn.type)
        if (withdrawn := session.exec(said).first()) is None:
            raise Problem(HTTPStatus.NOT_FOUND, f"There is no timestep {timestep_id}.")
        at, data = withdrawn
        when = f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        raise Problem(
            HTTPStatus.NOT_FOUND,
            f"There is no timestep {timestep_id} any more: a flight check withdrew it at {when}, {data['reason']}.",
        )
    return timestep


def find_uploaded(session: Session, timestep_id: UUID, store: ObjectStore) -> tuple[Timestep, str, ObjectStore]:
    """The timestep, the key of its object, and the store that has it: this one, or another bucket there.

    Raises:
        Problem: when there is none, or it is not uploaded as yet.
    """
    timestep = find_timestep(session, timestep_id)
    if timestep.key is None or timestep.bucket is None:
        raise Problem(HTTPStatus.NOT_FOUND, f"Timestep {timestep_id} is not uploaded; it is {timestep.state}.")
    return timestep, timestep.key, store.of_bucket(timestep.bucket)


@router.get(
    "/timesteps/{timestep_id}",
    summary="All that is known of one timestep",
    responses=documented(HTTPStatus.NOT_FOUND),
)
def timestep(timestep_id: TimestepPath, session: SessionDep, services: ServicesDep) -> TimestepDetail:
    """Its object and what proves it, the archives it is in, its whole history, and what is wrong if something is."""
    try:
        found = find_timestep(session, timestep_id)
    except Problem as problem:
        kept = [*rejections_of(timestep_id, session), *find_wait(timestep_id, services)[1]]
        kept = [f"{sentence}." for sentence in kept]
        raise Problem(problem.status, " ".join([problem.detail, *kept])) from None
    return describe(session, found, services)


def describe(session: Session, timestep: Timestep, services: Services) -> TimestepDetail:
    """All that is known of a timestep. The session is given back before object storage is asked."""
    history = [HistoryEvent.of(event) for event in _said_of(session, timestep)]
    references = list(archives_with(session, timestep.key)) if timestep.key else []
    wait, waits = find_wait(timestep.id, services)
    kept = [*rejections_of(timestep.id, session), *waits]
    columns = {**timestep.model_dump(), "timestep_id": timestep.id}
    session.close()
    return TimestepDetail.of(
        {
            **columns,
            "object": TimestepObject.model_validate(columns) if timestep.key else None,
            "archives": references,
            "problems": [*kept, *what_became_of_its_object(timestep, services)],
            "flow_runs": _flow_runs(history, wait, services.prefect_ui_url),
            "history": history,
        }
    )


def _said_of(session: Session, timestep: Timestep) -> Iterable[TimestepEvent]:
    event = TimestepEvent
    about = col(event.timestep_id) == timestep.id
    if timestep.key:
        # Who announces an archive may not know yet whose key it is. Without a key, this would read all such events.
        about = or_(about, and_(col(event.type) == Archived.type, col(event.key) == timestep.key))
    return session.exec(select(event).where(about).order_by(col(event.time), col(event.id)))


def archives_with(session: Session, key: str) -> Iterator[ArchiveReference]:
    """The archives on tape that an object is in, the first one first."""
    for id, path, at in session.exec(
        select(Archive.id, Archive.path, ArchiveMember.archived_at)
        .where(col(ArchiveMember.archive_id) == col(Archive.id), col(ArchiveMember.key) == key)
        .order_by(col(ArchiveMember.archived_at), col(Archive.id))
    ):
        yield ArchiveReference(archive_id=id, path=path, archived_at=at)


def _flow_runs(history: Iterable[HistoryEvent], wait: Wait | None, prefect_ui_url: str | None) -> list[FlowRun]:
    said: dict[UUID, list[str]] = {}
    for event in history:
        if event.flow_run_id:
            said.setdefault(event.flow_run_id, []).append(event.type)
    if wait and wait.flow_run_id:
        said.setdefault(wait.flow_run_id, [])  # it tries again, and has left nothing as yet
    return [
        FlowRun(flow_run_id=id, said=types, url=f"{prefect_ui_url}/runs/flow-run/{id}" if prefect_ui_url else None)
        for id, types in said.items()
    ]


@router.get(
    "/timesteps/{timestep_id}/download",
    summary="Fetch the timestep's tar",
    status_code=HTTPStatus.TEMPORARY_REDIRECT,
    response_class=RedirectResponse,
    responses=documented(HTTPStatus.NOT_FOUND),
)
def download(timestep_id: TimestepPath, session: SessionDep, store: StoreDep) -> RedirectResponse:
    """Redirects to a URL that fetches the tar from object storage, for an hour."""
    _, key, store = find_uploaded(session, timestep_id, store)
    return RedirectResponse(store.presigned_url(key, URL_SECONDS), headers={"Cache-Control": "no-store"})
