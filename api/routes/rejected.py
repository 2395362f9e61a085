"""Event files that can't be taken in."""

from datetime import datetime
from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlmodel import col, select

from api.deps import SessionDep
from api.filters import Name
from api.paging import Instant, Order, Page, Paging, fetch_page
from blocks.tables import RejectedEventFile

router = APIRouter(tags=["event files"])

NEWEST_FIRST = Order(
    (col(RejectedEventFile.rejected_at), col(RejectedEventFile.id)), ("rejected_at", "id"), (Instant, UUID)
)


class RejectedRow(BaseModel):
    """An event file that can't be taken in as it is. It stays where it is, and is looked at again once it changes."""

    system: str = Field(description="Imaging system.", examples=["prince"])
    event_file: str = Field(description="Path below the system's directory.", examples=["events/0815.json"])
    reason: str = Field(description="Why.", examples=["prince/events/0815.json: position: Field required"])
    rejected_at: datetime = Field(description="When.", examples=["2026-11-23T10:42:07Z"])
    timestep_id: UUID | None = Field(description="Of the timestep it announces, if that can be read.", examples=[None])

    @classmethod
    def of(cls, row: RejectedEventFile) -> Self:
        """What is shown of a rejection."""
        return cls.model_validate(row.model_dump())


class RejectedQuery(Paging):
    """Which rejected event files, and which part of the list."""

    system: Name | None = Field(None, description="Imaging system.", examples=["prince"])
    start: Instant | None = Field(
        None, description="Rejected at this time or later.", examples=["2026-11-23T00:00:00Z"]
    )
    end: Instant | None = Field(None, description="Rejected before this time.", examples=["2026-11-24T00:00:00Z"])


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
