"""Many rows in one statement. A statement per row costs more than the row, and fires triggers once for each."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, cast

import psycopg
from psycopg import sql
from sqlalchemy import BindParameter, ColumnElement, Table, any_, bindparam, func, select, tuple_
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlmodel import Session, SQLModel, col

# So many rows are sent to PostgreSQL at a time.
_BLOCK = 1000
# What would end a value, or a row, where rows are sent as text.
_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def among(column: Any, values: Iterable[object]) -> ColumnElement[bool]:
    """Whether the column has one of many values. None is none of them."""
    return col(column) == any_(_array(column, [value for value in values if value is not None]))


def upsert(session: Session, table: type[SQLModel], rows: Sequence[dict[str, Any]], lowest: Sequence[str] = ()) -> None:
    """Insert rows, or replace those with the same primary key: all, or only by a lower value of some columns.

    Args:
        rows: with the same columns each, and each with another primary key.
        lowest: a row is replaced only by one with a lower value of these columns.

    Raises:
        sqlalchemy.exc.DBAPIError: when one of them can't be stored; then none is.
    """
    if not rows:
        return
    target = _table(table)
    names = list(rows[0])
    arrays = (_array(target.columns[name], [row[name] for row in rows]) for name in names)
    statement = insert(target).from_select(names, select(*map(func.unnest, arrays)))
    is_lower = tuple_(*(statement.excluded[name] for name in lowest)) < tuple_(
        *(target.columns[name] for name in lowest)
    )
    session.execute(
        statement.on_conflict_do_update(
            index_elements=[name for name in names if target.columns[name].primary_key],
            set_={name: statement.excluded[name] for name in names if not target.columns[name].primary_key},
            where=is_lower if lowest else None,
        )
    )


def copy(session: Session, table: type[SQLModel], rows: Iterable[tuple[object, ...]]) -> None:
    """Insert rows by COPY, the fastest way there is.

    Args:
        rows: values in the order of the table's columns, none of them null; no row may be there already.

    Raises:
        psycopg.Error: when one of them can't be stored; then none is.
    """
    target = _table(table)
    statement = sql.SQL("copy {} ({}) from stdin").format(
        sql.Identifier(target.name), sql.SQL(", ").join(sql.Identifier(column.name) for column in target.columns)
    )
    connection = cast(psycopg.Connection[Any], session.connection().connection.driver_connection)
    remaining = iter(rows)
    with connection.cursor() as cursor, cursor.copy(statement) as copying:
        while block := list(islice(remaining, _BLOCK)):
            copying.write(_as_text(block))


def _as_text(rows: Sequence[tuple[object, ...]]) -> str:
    """Rows as COPY reads them. psycopg would write them one by one, for longer than PostgreSQL takes to store them."""
    line = "\t".join(["%s"] * len(rows[0])) + "\n"
    text = "".join(map(line.__mod__, rows))
    if "\\" in text or "\r" in text or text.count("\t") + text.count("\n") != len(rows[0]) * len(rows):
        text = "".join([line % tuple(str(value).translate(_ESCAPES) for value in row) for row in rows])
    return text


def _table(table: type[SQLModel]) -> Table:
    return cast(Table, table.__table__)  # type: ignore[attr-defined]


def _array(column: Any, values: list[Any]) -> BindParameter[Any]:
    # A JSON value may be a list itself.
    return bindparam(None, values, ARRAY(column.type, dimensions=1))
