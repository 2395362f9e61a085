"""Event files that can't be taken in."""

from datetime import datetime
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlalchemy import Row, Select
from sqlmodel import Session, col, select

from api.deps import SessionDep
from api.filters import TimestepFilter, asked_for
from api.paging import Instant, Order, Page, Paging, fetch_page
from blocks.event_file import TimestepType
from blocks.tables import RejectedEventFile, Timestep, TimestepState

router = APIRouter(tags=["event files"])

NEWEST_FIRST = Order(
    (col(RejectedEventFile.rejected_at), col(RejectedEventFile.id)), ("rejected_at", "id"), (Instant, UUID)
)


class RejectedRow(BaseModel):
    """An event file that can't be taken in as it is. It stays where it is, and is looked at again once it changes.

    What it announces is null where the file could not be read.
    """

    system: str = Field(description="Imaging system.", examples=["prince"])
    event_file: str = Field(description="Path below the system's directory.", examples=["events/0815.json"])
    reason: str = Field(description="Why.", examples=["prince/events/0815.json was rejected: position: Field required"])
    rejected_at: datetime = Field(description="When.", examples=["2026-11-23T10:42:07Z"])
    timestep_id: UUID | None = Field(description="Of the timestep it announces.", examples=[None])
    experiment_id: str | None = Field(description="Experiment it announces.", examples=["20261101_004"])
    position: int | None = Field(description="Position it announces.", examples=[12])
    type: TimestepType | None = Field(description="What its images are.", examples=["stitch"])
    timestamp: datetime | None = Field(description="When its images were taken.", examples=["2026-11-23T10:40:00Z"])
    state: TimestepState | None = Field(
        description="Of the timestep with this id, where one was taken in: from another event file.", examples=[None]
    )

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """What is shown of a rejection."""
        return cls.model_validate(row._asdict())


class RejectedQuery(Paging, TimestepFilter):
    """Which rejected event files, and which part of the list."""

    state: TimestepState | None = Field(
        None,
        description="Of the timestep with the id that the file announces, where one was taken in.",
        examples=["uploaded"],
    )
    start: Instant | None = Field(
        None, description="Rejected at this time or later.", examples=["2026-11-23T00:00:00Z"]
    )
    end: Instant | None = Field(None, description="Rejected before this time.", examples=["2026-11-24T00:00:00Z"])

    def narrow(self, rows: Select[Any]) -> Select[Any]:
        """The rows of a query over rejected event files and their timesteps that pass."""
        file = RejectedEventFile
        rows = rows.where(
            *asked_for(
                {
                    file.system: self.system,
                    file.experiment_id: self.experiment,
                    file.position: self.position,
                    file.type: self.type,
                    Timestep.state: self.state,
                }
            )
        )
        if self.start:
            rows = rows.where(col(file.rejected_at) >= self.start)
        if self.end:
            rows = rows.where(col(file.rejected_at) < self.end)
        return rows


@router.get("/rejected", summary="Event files that can't be taken in as they are")
def rejected(query: Annotated[RejectedQuery, Query()], session: SessionDep) -> Page[RejectedRow]:
    """Newest first. A file leaves the list when it was changed and taken in.

    `experiment`, `type`, `position` and `state` find only files that could be read.
    """
    return list_rejected(session, query)


def list_rejected(session: Session, query: RejectedQuery) -> Page[RejectedRow]:
    """The page of rejected event files that was asked for."""
    file = RejectedEventFile
    shown = [getattr(file, name) for name in RejectedRow.model_fields if name in file.model_fields]
    rows: Select[Any] = select(*shown, file.id, Timestep.state).join(  # type: ignore[call-overload]
        Timestep, col(Timestep.id) == col(file.timestep_id), isouter=True
    )
    return fetch_page(session, query.narrow(rows), NEWEST_FIRST, query, "rejected", RejectedRow.of)
