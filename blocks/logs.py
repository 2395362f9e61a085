"""Logs of the entrypoints: one JSON object per line, with the timestep's id in every line that concerns one."""

import logging
import re
import sys
from contextvars import ContextVar
from typing import TextIO
from uuid import UUID

from pythonjsonlogger.json import JsonFormatter

_concerned: ContextVar[str | None] = ContextVar("concerned", default=None)

# How messages and paths name a timestep.
_NAMED = re.compile(r"(?:/timesteps/|timestep )([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\b", re.IGNORECASE)
# They bring handlers of their own, in formats of their own.
_OUTSPOKEN = ("uvicorn", "uvicorn.access", "uvicorn.error", "fastapi")


def log_about(timestep_id: UUID) -> None:
    """Everything that is logged from here on, in this task and what inherits its context, is about a timestep."""
    _concerned.set(str(timestep_id))


def log_as_json(stream: TextIO | None = None) -> None:
    """Write all logs of this process as JSON, to standard error by default.

    To be called when everything is imported: Prefect and uvicorn set their logging up at that time.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(_enrich)
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
    )
    logging.getLogger().handlers[:] = [handler]
    for name in _OUTSPOKEN:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn").setLevel(logging.INFO)


def _enrich(record: logging.LogRecord) -> bool:
    """Name the timestep; and of a request the path alone, for a query may hold what is nobody's business."""
    timestep_id = getattr(record, "timestep_id", None) or _concerned.get()
    if record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, target, version, status = record.args
        path = str(target).partition("?")[0]
        record.args = (client, method, path, version, status)
        record.method, record.path, record.status = method, path, status
    if not timestep_id and (named := _NAMED.search(record.getMessage())):
        timestep_id = named[1].lower()
    if timestep_id:
        record.timestep_id = timestep_id
    else:
        record.__dict__.pop("timestep_id", None)  # an empty one says nothing
    # Colours for a terminal, of uvicorn.
    record.__dict__.pop("color_message", None)
    return True
