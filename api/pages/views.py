"""What the pages show: first what needs a hand, then the latest timesteps; and one timestep with all that is known."""

from http import HTTPStatus
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import ConfigDict, ValidationError
from sqlmodel import Session, col, select

from api.deps import ServicesDep, is_signed_in
from api.filters import TimestepQuery
from api.overview import read_status
from api.pages import render, root_of
from api.problems import Problem
from api.routes.timesteps import describe, find_timestep, list_timesteps
from blocks.tables import RejectedEventFile, TimestepImage, TimestepState

router = APIRouter(include_in_schema=False)

ROWS = 50
IMAGES = 500


class PageQuery(TimestepQuery):
    """The page's form sends its empty fields too."""

    model_config = ConfigDict(extra="ignore")


@router.get("/")
def overview(request: Request, services: ServicesDep) -> Response:
    """The page, or the form to sign in where a token is needed."""
    if not is_signed_in(request, services.settings):
        return render(request, "sign_in.html", HTTPStatus.UNAUTHORIZED)
    asked = {name: value for name, value in request.query_params.items() if value}
    try:
        query = PageQuery.model_validate({**asked, "limit": ROWS})
    except ValidationError:
        return RedirectResponse(f"{root_of(request)}/", status_code=HTTPStatus.SEE_OTHER)
    found, rejected = None, []
    status = read_status(services)
    if status.state:
        with Session(services.engine) as session:
            found = list_timesteps(session, query)
            newest = select(RejectedEventFile).order_by(col(RejectedEventFile.rejected_at).desc()).limit(ROWS)
            rejected = list(session.exec(newest))
    return render(
        request,
        "overview.html",
        overview=status,
        found=found,
        rejected=rejected,
        states=[state.value for state in TimestepState],
        asked=asked,
        has_token=services.settings.api_token is not None,
        prefect=services.prefect_ui_url,
    )


@router.get("/timesteps/{timestep_id}")
def timestep(timestep_id: str, request: Request, services: ServicesDep) -> Response:
    """All that is known of one timestep."""
    if not is_signed_in(request, services.settings):
        return render(request, "sign_in.html", HTTPStatus.UNAUTHORIZED)
    try:
        id = UUID(timestep_id)
    except ValueError:
        raise Problem(HTTPStatus.NOT_FOUND, "There is no such timestep.") from None
    with Session(services.engine) as session:
        found = find_timestep(session, id)
        of_it = select(TimestepImage).where(col(TimestepImage.timestep_id) == id)
        images = list(session.exec(of_it.order_by(col(TimestepImage.name)).limit(IMAGES)))
        detail = describe(session, found, services)
    return render(
        request,
        "timestep.html",
        timestep=detail,
        names=services.warnings.names(),
        images=images,
        has_token=services.settings.api_token is not None,
        prefect=services.prefect_ui_url,
    )
