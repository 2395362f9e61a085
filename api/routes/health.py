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
PREFECT_SECONDS = 10.0


class Check(BaseModel):
    """One thing the system needs."""

    ok: bool = Field(description="Whether it can be used.", examples=[True])
    reason: str = Field(description="Why it can't be used; empty when it can.", examples=[""])


class Readiness(BaseModel):
    """Everything the system needs."""

    ready: bool = Field(description="Whether all of it can be used.", examples=[True])
    checks: dict[str, Check] = Field(
        description="Each thing by its name.", examples=[{"database": {"ok": True, "reason": ""}}]
    )


class Alive(BaseModel):
    """The process answers."""

    status: str = Field("alive", description="Always the same.")


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
    results = await asyncio.gather(*(_run(name, check, services) for name, check in checks.items()))
    readiness = Readiness(ready=all(result.ok for result in results), checks=dict(zip(checks, results, strict=True)))
    return JSONResponse(readiness.model_dump(), status_code=200 if readiness.ready else 503)


async def _run(name: str, check: Callable[[Services], None], services: Services) -> Check:
    # One at a time: a service that hangs must not take up a thread more with every time it is asked for.
    running = services.checking.get(name)
    if running is None or running.done():
        running = services.checking[name] = services.checkers.submit(check, services)
    waiting = asyncio.wrap_future(running)
    # What it ends with after this has been answered is nobody's business, and no line of the log.
    waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    try:
        await asyncio.wait_for(asyncio.shield(waiting), CHECK_SECONDS)
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
    answer = httpx.get(f"{url}/health", timeout=PREFECT_SECONDS)
    if not answer.is_success:
        raise NotReady(f"it answers {answer.status_code}")
