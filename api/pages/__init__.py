"""The web pages, and how a browser signs in to them."""

from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, select_autoescape

from api.body import read_body
from api.deps import COOKIE, ServicesDep, cookie_value, is_token
from blocks.settings import Settings

router = APIRouter(include_in_schema=False)

SIGNED_IN_SECONDS = 12 * 3600
MAX_FORM_BYTES = 4096

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]), trim_blocks=True
)
_templates.filters["time"] = lambda at: f"{at:%Y-%m-%d %H:%M:%S}" if at else ""
_templates.filters["duration"] = lambda seconds: "-" if seconds is None else str(timedelta(seconds=round(seconds)))
_templates.filters["number"] = "{:,}".format
_templates.filters["megabytes"] = lambda size: "" if size is None else f"{size / 1e6:,.1f}"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def render(request: Request, template: str, status: HTTPStatus = HTTPStatus.OK, **values: object) -> HTMLResponse:
    """A page, whose links begin where a reverse proxy has put the API."""
    content = _templates.get_template(template).render(root=root_of(request), **values)
    return HTMLResponse(content, status_code=status, headers=_HEADERS)


def root_of(request: Request) -> str:
    """Where a reverse proxy has put the API; empty for its root."""
    return str(request.scope.get("root_path", ""))


def is_over_tls(request: Request, settings: Settings) -> bool:
    """Whether browsers talk to the API by TLS: a proxy says so, or the address they are told to use does."""
    return "https" in (request.url.scheme, urlsplit(settings.api_url or "").scheme)


@router.post("/sign-in")
async def sign_in(request: Request, services: ServicesDep) -> Response:
    """Give the browser a cookie for the token."""
    content = await read_body(request, MAX_FORM_BYTES)
    token = services.settings.api_token
    sent = parse_qs(content.decode(errors="replace")).get("token", [""])[0]
    answer: Response = RedirectResponse(f"{root_of(request)}/", status_code=HTTPStatus.SEE_OTHER)
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
        secure=is_over_tls(request, services.settings),
    )
    return answer


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """Take the cookie back."""
    answer = RedirectResponse(f"{root_of(request)}/", status_code=HTTPStatus.SEE_OTHER)
    answer.delete_cookie(COOKIE)
    return answer
