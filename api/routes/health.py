"""Whether the API is alive, and whether what it needs is there."""

import asyncio
from collections.abc import Callable

import httpx
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy import text

from api.deps import Services, ServicesDep
from blocks.database import pending_migrations

router = APIRouter(tags=["operating"])

CHECK_SECONDS = 5.0


class Check(BaseModel):
    """One thing the system needs."""

    ok: bool
    reason: str = Field(description="Why it can't be used; empty when it can.", examples=[""])


class Readiness(BaseModel):
    """Everything the system needs."""

    ready: bool
    checks: dict[str, Check]


class Alive(BaseModel):
    """The process answers."""

    status: str = "alive"


class NotReady(Exception):
    """Something can't be used; the message says why."""


@router.get("/health", summary="Alive")
async def health() -> Alive:
    """Answers as long as the process does, whatever becomes of the services it needs."""
    return Alive()


@router.get("/ready", summary="Ready", responses={503: {"model": Readiness, "description": "Something is missing."}})
async def ready(services: ServicesDep) -> Response:
    """Database, stream, storage and Prefect, each with its reason."""
    checks: dict[str, Callable[[Services], None]] = {
        "database": _check_database,
        "stream": _check_stream,
        "storage": lambda services: services.store.check(),
        "prefect": _check_prefect,
    }
    results = await asyncio.gather(*(_run(check, services) for check in checks.values()))
    readiness = Readiness(ready=all(result.ok for result in results), checks=dict(zip(checks, results, strict=True)))
    return JSONResponse(readiness.model_dump(), status_code=200 if readiness.ready else 503)


async def _run(check: Callable[[Services], None], services: Services) -> Check:
    try:
        await asyncio.wait_for(asyncio.to_thread(check, services), CHECK_SECONDS)
    except TimeoutError:
        return Check(ok=False, reason=f"no answer within {CHECK_SECONDS:g} s")
    except Exception as error:
        cause = getattr(error, "orig", None) or error
        return Check(ok=False, reason=str(cause).strip().split("\n")[0] or type(cause).__name__)
    return Check(ok=True, reason="")


def _check_database(services: Services) -> None:
    with services.engine.connect() as connection:
        connection.execute(text("select 1"))
    if pending := pending_migrations(services.engine):
        raise NotReady(f"migrations are missing: {', '.join(pending)}; run `archiver init`")


def _check_stream(services: Services) -> None:
    services.log.redis.ping()
    services.log.has_work("state-manager")


def _check_prefect(services: Services) -> None:
    url = services.settings.prefect_api_url
    if url is None:
        raise NotReady("PREFECT_API_URL is not set")
    httpx.get(f"{url}/health", timeout=CHECK_SECONDS).raise_for_status()
