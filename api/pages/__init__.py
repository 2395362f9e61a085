"""The web page: the latest timesteps, what failed, and what was rejected, at a glance."""

from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, select_autoescape
from pydantic import ConfigDict, ValidationError
from sqlmodel import Session, col, func, select

from api.deps import COOKIE, ServicesDep, cookie_value, is_signed_in, is_token
from api.filters import TimestepQuery
from api.routes.timesteps import list_timesteps
from blocks.tables import RejectedEventFile, TimestepState, TimestepTally

router = APIRouter(include_in_schema=False)

ROWS = 50
SIGNED_IN_SECONDS = 12 * 3600
MAX_FORM_BYTES = 4096

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]), trim_blocks=True
)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageQuery(TimestepQuery):
    """The page's form sends its empty fields too."""

    model_config = ConfigDict(extra="ignore")


def render(request: Request, template: str, status: HTTPStatus = HTTPStatus.OK, **values: object) -> HTMLResponse:
    """A page, whose links begin where a reverse proxy has put the API."""
    content = _templates.get_template(template).render(root=_root(request), **values)
    return HTMLResponse(content, status_code=status, headers=_HEADERS)


def _root(request: Request) -> str:
    return str(request.scope.get("root_path", ""))


@router.get("/")
def page(request: Request, services: ServicesDep) -> Response:
    """The page, or the form to sign in where a token is needed."""
    if not is_signed_in(request, services.settings):
        return render(request, "sign_in.html", HTTPStatus.UNAUTHORIZED)
    asked = {name: value for name, value in request.query_params.items() if value}
    try:
        query = PageQuery.model_validate({**asked, "limit": ROWS})
    except ValidationError:
        return RedirectResponse(f"{_root(request)}/", status_code=HTTPStatus.SEE_OTHER)
    with Session(services.engine) as session:
        found = list_timesteps(session, query)
        tallied = select(TimestepTally.state, func.sum(TimestepTally.timesteps)).group_by(col(TimestepTally.state))
        counts = dict(session.exec(tallied).all())
        rejected = session.exec(
            select(RejectedEventFile).order_by(col(RejectedEventFile.rejected_at).desc()).limit(ROWS)
        ).all()
        rejections = session.exec(select(func.count()).select_from(RejectedEventFile)).one()
        return render(
            request,
            "page.html",
            timesteps=found.data,
            next=found.next,
            counts=[(state.value, counts.get(state, 0)) for state in TimestepState],
            rejected=rejected,
            rejections=rejections,
            asked=asked,
            has_token=services.settings.api_token is not None,
        )


@router.post("/sign-in")
async def sign_in(request: Request, services: ServicesDep) -> Response:
    """Give the browser a cookie for the token."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_FORM_BYTES:
            return render(request, "sign_in.html", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, wrong=True)
    token = services.settings.api_token
    sent = parse_qs(content.decode(errors="replace")).get("token", [""])[0]
    answer: Response = RedirectResponse(f"{_root(request)}/", status_code=HTTPStatus.SEE_OTHER)
    if token is None:
        return answer
    if not is_token(sent.strip(), token):
        return render(request, "sign_in.html", HTTPStatus.UNAUTHORIZED, wrong=True)
    answer.set_cookie(
        COOKIE,
        cookie_value(token),
        max_age=SIGNED_IN_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """Take the cookie back."""
    answer = RedirectResponse(f"{_root(request)}/", status_code=HTTPStatus.SEE_OTHER)
    answer.delete_cookie(COOKIE)
    return answer
