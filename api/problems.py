"""Errors as problem documents (RFC 9457)."""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from starlette.exceptions import HTTPException

from blocks.object_errors import NotStored, ObjectStoreError

logger = logging.getLogger(__name__)


class ProblemDocument(BaseModel):
    """What went wrong, after RFC 9457."""

    type: str = Field("about:blank", description="Kind of problem; `about:blank` means that the status says it.")
    title: str = Field(description="The status in words.", examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(description="What happened, and what to do.", examples=["There is no such timestep."])


class Problem(Exception):
    """An answer other than the one that was asked for."""

    def __init__(self, status: HTTPStatus, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


def documented(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """These problems, for the OpenAPI document."""
    content = {"application/problem+json": {"schema": ProblemDocument.model_json_schema()}}
    return {status.value: {"description": status.phrase, "content": content} for status in statuses}


def answer(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """A problem document."""
    document = ProblemDocument(title=HTTPStatus(status).phrase, status=status, detail=detail)
    return JSONResponse(
        document.model_dump(), status_code=status, headers=headers, media_type="application/problem+json"
    )


def _problem(request: Request, error: Exception) -> JSONResponse:
    match error:
        case Problem():
            return answer(error.status, error.detail, error.headers)
        case HTTPException():
            return _of_the_framework(error)
        case RequestValidationError():
            # Without the values: one may be a secret that got into the wrong place.
            faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            return answer(HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(faults))
        case DataError():
            return answer(HTTPStatus.UNPROCESSABLE_ENTITY, "The database can't look such a value up.")
        case OperationalError():
            logger.warning("%s: the database can't be used: %s", request.url.path, error.orig)
            return answer(HTTPStatus.SERVICE_UNAVAILABLE, "The database can't be reached; try again later.")
        case NoConnectionFree():
            logger.warning("%s: all connections to the database are taken: %s", request.url.path, error)
            return answer(HTTPStatus.SERVICE_UNAVAILABLE, "The database is busy, or hangs; try again later.")
        case RedisError():
            logger.warning("%s: the stream can't be used: %s", request.url.path, error)
            return answer(HTTPStatus.SERVICE_UNAVAILABLE, "The stream can't be reached; try again later.")
        case NotStored():
            logger.error("%s: %s", request.url.path, error)
            return answer(HTTPStatus.BAD_GATEWAY, "The bucket does not hold what was recorded; an operator must look.")
        case ObjectStoreError():
            logger.warning("%s: %s", request.url.path, error)
            return answer(HTTPStatus.SERVICE_UNAVAILABLE, "Object storage can't be read; try again later.")
        case _:
            # The server's log has the traceback.
            return answer(HTTPStatus.INTERNAL_SERVER_ERROR, "This is a fault of the server; its log says more.")


def _of_the_framework(error: HTTPException) -> JSONResponse:
    headers = dict(error.headers or {})
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            detail = "There is nothing at this address; /docs describes what there is."
        case HTTPStatus.METHOD_NOT_ALLOWED:
            methods = {method.strip() for method in headers.pop("Allow", "").split(",")}
            # Wherever GET is answered, so is HEAD.
            headers["Allow"] = ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))
            detail = f"This address takes {headers['Allow']} only."
        case _:
            detail = error.detail
    return answer(error.status_code, detail, headers)


def answer_with_problems(app: FastAPI) -> None:
    """Answer every error with a problem document."""
    for kind in (
        Problem,
        HTTPException,
        RequestValidationError,
        DataError,
        OperationalError,
        NoConnectionFree,
        RedisError,
        ObjectStoreError,
        Exception,
    ):
        app.add_exception_handler(kind, _problem)
