"""The description of the API, and a page to try it out.

The page's assets come from the installation: labs without internet have it too.
"""

from http import HTTPStatus

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from api.deps import ServicesDep, has_read_access, require_reader
from api.pages import render

ASSETS = "/docs/assets"

_HEADERS = {
    # The page's own script is inline; nothing is loaded from elsewhere, and nothing is sent elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@router.get("/openapi.json", dependencies=[Depends(require_reader)])
def openapi(request: Request) -> JSONResponse:
    """The OpenAPI document."""
    app: FastAPI = request.app
    root = request.scope.get("root_path")
    return JSONResponse(app.openapi() | ({"servers": [{"url": root}]} if root else {}))


@router.get("/docs")
def docs(request: Request, services: ServicesDep) -> Response:
    """Swagger UI, for those who may read."""
    if not has_read_access(request, services.settings):
        return render(request, "sign_in.html", HTTPStatus.UNAUTHORIZED)
    root = request.scope.get("root_path", "")
    page = get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title=request.app.title,
        swagger_js_url=f"{root}{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{root}{ASSETS}/favicon.png",
    )
    return HTMLResponse(page.body, headers=_HEADERS)


def assets() -> StaticFiles:
    """The files of Swagger UI, out of the package that carries them."""
    return StaticFiles(packages=[("fastapi_offline", "static")])
