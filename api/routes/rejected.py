"""Event files that can't be taken in."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import Field
from sqlmodel import col, select

from api.deps import SessionDep
from api.paging import Instant, Order, Page, Paging, fetch_page
from api.schemas import Name, RejectedRow
from blocks.tables import RejectedEventFile

router = APIRouter(tags=["event files"])

NEWEST_FIRST = Order(
    (col(RejectedEventFile.rejected_at), col(RejectedEventFile.id)), ("rejected_at", "id"), (Instant, UUID)
)


class RejectedQuery(Paging):
    """Which rejected event files, and which part of the list."""

    system: Name | None = Field(None, description="Imaging system.", examples=["prince"])
    start: Instant | None = Field(None, description="Rejected at this time or later.")
    end: Instant | None = Field(None, description="Rejected before this time.")


@router.get("/rejected", summary="Event files that can't be taken in as they are")
def rejected(query: Annotated[RejectedQuery, Query()], session: SessionDep) -> Page[RejectedRow]:
    """Newest first. A file leaves the list when it was changed and taken in."""
    rows = select(RejectedEventFile)
    if query.system:
        rows = rows.where(col(RejectedEventFile.system) == query.system)
    if query.start:
        rows = rows.where(col(RejectedEventFile.rejected_at) >= query.start)
    if query.end:
        rows = rows.where(col(RejectedEventFile.rejected_at) < query.end)
    return fetch_page(session, rows, NEWEST_FIRST, query, "rejected", RejectedRow.of)
