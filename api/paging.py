"""Pages of a list, by a cursor that says where the last one ended.

A page begins behind the last row of the one before, whatever was added meanwhile, and costs the
same wherever it is. Offsets can do neither.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from http import HTTPStatus
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, Select, func, tuple_
from sqlalchemy.orm import Mapped
from sqlmodel import Session, select

from api.problems import Problem

T = TypeVar("T")

# Counting row by row is not worth more than this.
COUNT_LIMIT = 10_000


def _in_utc(value: datetime) -> datetime:
    try:
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)
    except OverflowError:
        raise ValueError("must be in a year from 1 to 9999") from None


def _no_number(value: object) -> object:
    try:
        float(value)  # type: ignore[arg-type]
    except OverflowError:
        pass  # a number all the same
    except (TypeError, ValueError):
        return value
    raise ValueError("must be written out, as in ISO 8601")


# Pydantic would take a number for seconds since 1970, which nobody means.
WrittenOut = BeforeValidator(_no_number)

# A point in time; without an offset it is taken for UTC.
Instant = Annotated[datetime, AfterValidator(_in_utc), WrittenOut]


# It begins with what names its query.
_CURSOR = "WyI4ZjE0ZTQ1ZmNlZWExNjdhIiwiMjAyNi0xMS0yM1QxMDo0MjowN1oiLCI2YTBlY2YwYyJd"


class Paging(BaseModel):
    """Which part of a list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=500, description="At most so many rows.")
    cursor: str | None = Field(
        None, max_length=1000, description="`next` of the page before, of the same query.", examples=[_CURSOR]
    )

    def scope(self, path: str) -> str:
        """Names the query that a cursor belongs to."""
        query = self.model_dump_json(exclude={"limit", "cursor"})
        return hashlib.sha256(f"{path} {query}".encode()).hexdigest()[:16]


class Page(BaseModel, Generic[T]):
    """One page of a list."""

    count: int | None = Field(
        description=f"Rows on all pages; null above {COUNT_LIMIT:,}, but where a tally tells it.", examples=[2400]
    )
    data: list[T] = Field(description="The rows of this page.")
    next: str | None = Field(description="Cursor of the next page; null on the last one.", examples=[_CURSOR])


@dataclass(frozen=True)
class Order:
    """A stable order: the last of its columns is unique, together with what the query is limited to."""

    columns: Sequence[Mapped[Any]]
    names: Sequence[str]  # of the same, in a row
    types: Sequence[Any]
    descending: bool = True

    @cached_property
    def _adapters(self) -> list[TypeAdapter[Any]]:
        return [TypeAdapter(kind) for kind in self.types]

    def behind(self, values: Sequence[Any]) -> ColumnElement[bool]:
        """The rows behind the one with these values."""
        here = tuple_(*self.columns)
        there = tuple_(*values)
        return here < there if self.descending else here > there

    def by(self) -> list[ColumnElement[Any]]:
        """For ORDER BY."""
        return [column.desc() if self.descending else column.asc() for column in self.columns]

    def read(self, cursor: str, scope: str) -> list[object]:
        """The values in a cursor.

        Raises:
            Problem: when it is not one of ours, or of another query.
        """
        try:
            padded = cursor + "=" * (-len(cursor) % 4)
            of, *values = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
            json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
            position = [kind.validate_python(value) for kind, value in zip(self._adapters, values, strict=True)]
        except (ValueError, TypeError, ValidationError, RecursionError):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "cursor: it is not one that this API gave.") from None
        if of != scope:
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "cursor: it belongs to another query.")
        return position

    def write(self, row: Any, scope: str) -> str:
        """The cursor that says: behind this row."""
        values = [
            kind.dump_python(getattr(row, name), mode="json")
            for kind, name in zip(self._adapters, self.names, strict=True)
        ]
        return base64.urlsafe_b64encode(json.dumps([scope, *values]).encode()).decode().rstrip("=")


def fetch_page(
    session: Session,
    rows: Select[Any],
    order: Order,
    paging: Paging,
    path: str,
    show: Callable[[Any], T],
    tally: Select[Any] | None = None,
    *,
    is_countable: bool = True,
) -> Page[T]:
    """Fetch the page of `rows` that was asked for.

    Args:
        rows: what the list is of, without an order.
        path: names the list, so that no cursor is taken for one of another list.
        show: makes of a row what is answered.
        tally: tells how many rows there are, where that is known without counting them.
        is_countable: whether counting them is worth its time.

    Raises:
        Problem: when the cursor makes no sense.
    """
    scope = paging.scope(path)
    part = rows.where(order.behind(order.read(paging.cursor, scope))) if paging.cursor else rows
    found = session.execute(part.order_by(*order.by()).limit(paging.limit + 1)).all()
    page = [row[0] if len(row) == 1 else row for row in found[: paging.limit]]
    is_last = len(found) <= paging.limit
    count: int | None = None
    if is_last and not paging.cursor:
        count = len(page)
    elif is_countable:
        count = _count(session, rows, tally)
    return Page(
        count=count,
        data=[show(row) for row in page],
        next=None if is_last else order.write(page[-1], scope),
    )


def _count(session: Session, rows: Select[Any], tally: Select[Any] | None) -> int | None:
    if tally is not None:
        return int(session.execute(tally).scalar_one())
    counted = select(func.count()).select_from(rows.limit(COUNT_LIMIT + 1).subquery())
    count = session.exec(counted).one()
    return count if count <= COUNT_LIMIT else None
