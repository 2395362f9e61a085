"""Many rows in one statement. A statement per row costs more than the row, and fires triggers once for each."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import psycopg
from psycopg import sql
from sqlalchemy import BindParameter, ColumnElement, Table, any_, bindparam, func, select, tuple_
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlmodel import Session, SQLModel, col


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


def copy(session: Session, table: type[SQLModel], rows: Iterable[Sequence[object]]) -> None:
    """Insert rows by COPY, the fastest way there is, in binary, which PostgreSQL need not parse.

    Args:
        rows: values in the order of the table's columns; none of them may be there already.

    Raises:
        psycopg.Error: when one of them can't be stored; then none is.
    """
    target = _table(table)
    columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in target.columns)
    place = sql.Identifier(target.name)
    connection = cast(psycopg.Connection[Any], session.connection().connection.driver_connection)
    with connection.cursor() as cursor:
        nothing = cursor.execute(sql.SQL("select {} from {} limit 0").format(columns, place))
        types = [column.type_code for column in nothing.description or ()]
        with cursor.copy(sql.SQL("copy {} ({}) from stdin (format binary)").format(place, columns)) as copying:
            copying.set_types(types)
            for row in rows:
                copying.write_row(row)


def _table(table: type[SQLModel]) -> Table:
    return cast(Table, table.__table__)  # type: ignore[attr-defined]


def _array(column: Any, values: list[Any]) -> BindParameter[Any]:
    # A JSON value may be a list itself.
    return bindparam(None, values, ARRAY(column.type, dimensions=1))
