"""Figures: how much came in per day, and what is not on tape while it should be."""

import zoneinfo
from datetime import UTC, date, datetime, timedelta
from functools import cache
from http import HTTPStatus
from typing import Annotated, Any
from uuid import UUID
from zoneinfo import ZoneInfo

from botocore.exceptions import BotoCoreError, ClientError
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Date, cast, func
from sqlmodel import col, select

from api.deps import SessionDep, StoreDep
from api.paging import Instant, Order, Page, Paging, fetch_page
from api.problems import Problem
from api.schemas import Name, TimestepFilter
from blocks.event_file import TimestepType
from blocks.object_store import ObjectStore
from blocks.tables import Timestep, TimestepState

router = APIRouter(tags=["figures"])

MAX_DAYS = 366

OLDEST_FIRST = Order(
    (col(Timestep.uploaded_at), col(Timestep.id)), ("uploaded_at", "id"), (Instant, UUID), descending=False
)


class DailyQuery(BaseModel):
    """Which days, and where a day begins."""

    model_config = ConfigDict(extra="forbid")

    time_zone: Name = Field(
        "UTC", description="IANA name of the zone that days are told in.", examples=["Europe/Amsterdam"]
    )
    first: date | None = Field(None, description="First day; 30 days up to the last one by default.")
    last: date | None = Field(None, description="Last day; today by default.")
    system: Name | None = Field(None, description="Imaging system.")
    experiment: Name | None = Field(None, description="Experiment.")


class Day(BaseModel):
    """What was taken on one day."""

    day: date
    timesteps: int
    images: int = Field(description="As announced.")
    bytes: int = Field(description="In object storage.")
    states: dict[TimestepState, int] = Field(description="How many timesteps are in each state now.")


class Days(BaseModel):
    """The days of which there is anything."""

    count: int
    data: list[Day]
    next: None = None


@cache
def _time_zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())


@router.get("/stats/daily", summary="Timesteps per day")
def daily(query: Annotated[DailyQuery, Query()], session: SessionDep) -> Days:
    """By the time the images were taken, oldest day first; days without any are left out."""
    if query.time_zone not in _time_zones():
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "time_zone: there is no time zone of this name.")
    zone = ZoneInfo(query.time_zone)
    try:
        last = query.last or datetime.now(zone).date()
        first = query.first or last - timedelta(days=29)
        start, end = (
            datetime.combine(day, datetime.min.time(), zone).astimezone(UTC)
            for day in (first, last + timedelta(days=1))
        )
    except OverflowError:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "first, last: must be in a year from 1 to 9998.") from None
    if not 0 <= (last - first).days < MAX_DAYS:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"first, last: at least one day, at most {MAX_DAYS}.")
    day = cast(func.timezone(query.time_zone, col(Timestep.timestamp)), Date).label("day")
    rows: Any = select(
        day,
        func.count().label("timesteps"),
        func.sum(Timestep.image_count).label("images"),
        func.coalesce(func.sum(Timestep.size), 0).label("bytes"),
        *(func.count().filter(col(Timestep.state) == state).label(state.value) for state in TimestepState),
    )
    narrowed = TimestepFilter(system=query.system, experiment=query.experiment, start=start, end=end).narrow(rows)
    found = [row._asdict() for row in session.execute(narrowed.group_by(day).order_by(day))]
    days = [
        Day.model_validate({**row, "states": {state: row[state.value] for state in TimestepState}}) for row in found
    ]
    return Days(count=len(days), data=days)


class AtRiskQuery(Paging):
    """Which timesteps, and which part of the list."""

    hours: float = Field(48, ge=0, le=24 * 3650, description="Uploaded longer ago than this, and not on tape.")
    system: Name | None = Field(None, description="Imaging system.")
    experiment: Name | None = Field(None, description="Experiment.")


class AtRisk(BaseModel):
    """A timestep that is in object storage only."""

    timestep_id: UUID
    system: str
    experiment_id: str
    position: int
    type: TimestepType
    timestamp: datetime
    key: str
    size: int
    uploaded_at: datetime
    days_left: float | None = Field(
        description="Until the bucket's lifecycle rule deletes the object; null when there is no such rule to be read."
    )


@router.get("/at-risk", summary="Uploaded, but not on tape for too long")
def at_risk(query: Annotated[AtRiskQuery, Query()], session: SessionDep, store: StoreDep) -> Page[AtRisk]:
    """Oldest upload first, with the days left before the bucket deletes the object."""
    now = datetime.now(UTC)
    rules = expiry_rules(store)

    def show(timestep: Timestep) -> AtRisk:
        days = [days for prefix, days in rules if (timestep.key or "").startswith(prefix)]
        age = now - timestep.uploaded_at if timestep.uploaded_at else timedelta()
        left = round(min(days) - age / timedelta(days=1), 2) if days else None
        return AtRisk.model_validate({**timestep.model_dump(), "timestep_id": timestep.id, "days_left": left})

    waiting = select(Timestep).where(
        col(Timestep.uploaded_at).is_not(None),
        col(Timestep.archived_at).is_(None),
        col(Timestep.uploaded_at) < now - timedelta(hours=query.hours),
    )
    rows = TimestepFilter(system=query.system, experiment=query.experiment).narrow(waiting)
    return fetch_page(session, rows, OLDEST_FIRST, query, "at-risk", show)


def expiry_rules(store: ObjectStore) -> list[tuple[str, int]]:
    """The bucket's rules that delete objects: a prefix, and the days after which. None where they can't be read."""
    try:
        answer = store.client.get_bucket_lifecycle_configuration(Bucket=store.bucket_name)
    except (ClientError, BotoCoreError):
        return []
    rules = []
    for rule in answer["Rules"]:
        days = rule.get("Expiration", {}).get("Days")
        chosen = rule.get("Filter", {})
        # Rules for tagged objects are for those that are on tape.
        if rule["Status"] == "Enabled" and days and not (chosen.get("Tag") or chosen.get("And", {}).get("Tags")):
            prefix = chosen.get("Prefix") or chosen.get("And", {}).get("Prefix") or rule.get("Prefix") or ""
            rules.append((prefix, days))
    return rules
