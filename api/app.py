"""The REST gateway and its page."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import APIRouter, Depends, FastAPI

from api import documentation, pages, webhook
from api.deps import Services, require_few_parameters, require_reader
from api.head import HeadAsGet
from api.loopback import REFUSALS, LoopbackOnly
from api.pages import views
from api.problems import answer_with_problems, documented
from api.routes import archives, at_risk, experiments, health, images, rejected, stats, status, timesteps
from api.subject import LogSubject
from blocks.loopback import is_loopback
from blocks.settings import MissingSetting, Settings, get_settings

_DESCRIPTION = """
Where every timestep is: announced by its microscope, in object storage, on tape.

Lists answer `{"count", "data", "next"}`; send `next` as `cursor` to get the page behind.
Times without an offset are taken for UTC. Errors are problem documents (RFC 9457).
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; `uvicorn --factory api.app:create_app` serves it with the settings of the environment.

    Without a token it answers nobody but its own machine, wherever the server listens.

    Raises:
        MissingSetting: when something is not set that it needs, or must not be without.
    """
    settings = settings or get_settings()
    if settings.api_token is None and not is_loopback(settings.api_host):
        raise MissingSetting(
            f"not set: ARCHIVER_API_TOKEN. Without it the API serves this machine only, "
            f"but ARCHIVER_API_HOST is {settings.api_host!r}"
        )
    services = Services.from_settings(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        services.close()

    app = FastAPI(
        title="Timestep archiver",
        version="1",
        description=_DESCRIPTION,
        lifespan=lifespan,
        root_path=settings.api_root_path,
        openapi_url=None,
        # It would send the token on to wherever the request says it came to, without TLS perhaps.
        redirect_slashes=False,
        responses=documented(*REFUSALS) if settings.api_token is None else None,
    )
    app.state.services = services
    if settings.api_token is None:
        app.add_middleware(LoopbackOnly, api_url=settings.api_url)
    app.add_middleware(HeadAsGet)
    app.add_middleware(LogSubject)
    reading = APIRouter(
        dependencies=[Depends(require_reader), Depends(require_few_parameters)],
        responses=documented(HTTPStatus.UNAUTHORIZED, HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.SERVICE_UNAVAILABLE),
    )
    for module in (timesteps, images, experiments, archives, rejected, stats, at_risk, status):
        reading.include_router(module.router)
    app.include_router(reading, prefix="/api/1")
    app.include_router(
        status.metrics_router,
        dependencies=[Depends(require_reader)],
        responses=documented(HTTPStatus.UNAUTHORIZED),
    )
    app.include_router(webhook.router, prefix="/api/1")
    app.include_router(health.router)
    app.include_router(pages.router)
    app.include_router(views.router)
    app.include_router(documentation.router)
    app.mount(documentation.ASSETS, documentation.assets())
    answer_with_problems(app)
    return app
