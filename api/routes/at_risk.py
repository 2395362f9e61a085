"""What is in object storage only, for longer than it should be."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import Row, Select
from sqlmodel import col, select

from api.deps import ServicesDep, SessionDep
from api.filters import Name, TimestepFilter
from api.paging import Instant, Order, Page, Paging, fetch_page
from api.schemas import UploadedTimestep
from blocks.expiry import days_left
from blocks.tables import Timestep, of_microscopes

router = APIRouter(tags=["figures"])

OLDEST_FIRST = Order(
    (col(Timestep.uploaded_at), col(Timestep.id)), ("uploaded_at", "timestep_id"), (Instant, UUID), descending=False
)

DEFAULT_HOURS = 48.0


class AtRiskQuery(Paging):
    """Which timesteps, and which part of the list."""

    hours: float = Field(
        DEFAULT_HOURS, ge=0, le=24 * 3650, description="Uploaded longer ago than this, and not on tape.", examples=[48]
    )
    system: Name | None = Field(None, description="Imaging system.", examples=["prince"])
    experiment: Name | None = Field(None, description="Experiment.", examples=["20261101_004"])


class AtRisk(UploadedTimestep):
    """A timestep that is in object storage only."""

    days_left: float | None = Field(
        description="Until the bucket's lifecycle rule deletes the object; null when there is no such rule, "
        "or the bucket's rules can't be read.",
        examples=[11.5],
    )


class AtRiskPage(Page[AtRisk]):
    """One page of what is at risk, and what else will be if nobody does anything."""

    warnings: list[str] = Field(
        description="Systems that fell silent, disks that fill up, objects that expire: of the whole system, on every "
        "page.",
        examples=[["prince is silent since 2026-11-23 10:42 UTC; as a rule, it takes images every 60 minutes"]],
    )


@router.get("/at-risk", summary="Uploaded, but not on tape for too long")
def at_risk(query: Annotated[AtRiskQuery, Query()], session: SessionDep, services: ServicesDep) -> AtRiskPage:
    """Oldest upload first, with the days left before the bucket deletes the object."""
    now = datetime.now(UTC)

    def show(row: Row[Any]) -> AtRisk:
        # Each by the rules of its own bucket: it may be a former one.
        left = days_left(services.expiry_rules.read(row.bucket), row.key, row.uploaded_at, now)
        return AtRisk.model_validate({**row._asdict(), "days_left": left})

    waiting = not_on_tape(now - timedelta(hours=query.hours), *AtRisk.columns(), Timestep.bucket, system=query.system)
    rows = TimestepFilter(experiment=query.experiment).narrow(waiting)
    page = fetch_page(session, rows, OLDEST_FIRST, query, "at-risk", show)
    warnings = services.warnings.read(session, now).sentences()
    return AtRiskPage(count=page.count, data=page.data, next=page.next, warnings=warnings)


def not_on_tape(uploaded_before: datetime, *columns: Any, system: str | None = None) -> Select[Any]:
    """Timesteps that are in object storage only: of all microscopes, or of one system."""
    rows: Select[Any] = select(*columns)
    return rows.where(
        col(Timestep.uploaded_at).is_not(None),
        col(Timestep.archived_at).is_(None),
        col(Timestep.uploaded_at) < uploaded_before,
        col(Timestep.system) == system if system else of_microscopes(Timestep),
    )
