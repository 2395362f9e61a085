"""Without a token, nobody beyond this machine is answered, nor a page from there, however the server was started."""

import ipaddress
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import answer

# What is answered to others: beyond this machine, or by another name.
REFUSALS = (HTTPStatus.FORBIDDEN, HTTPStatus.MISDIRECTED_REQUEST)


class LoopbackOnly:
    """Refuses what comes in at another address than loopback, or by another name.

    `uvicorn --host 0.0.0.0 --factory api.app:create_app` knows nothing of ARCHIVER_API_HOST, so what counts is the
    address a connection was made to. A Unix socket has none, and is for this machine only.

    A page that a browser here shows may say that its name is an address of this machine, and would then read what
    we answer as its own. The browser tells by which name it came.

    Args:
        api_url: where clients find the API; its name is a good one too.
    """

    def __init__(self, app: ASGIApp, api_url: str | None = None) -> None:
        self._app = app
        self._name = urlsplit(api_url or "").hostname

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server")
        if scope["type"] != "http" or not server or not is_address(server[0]):
            await self._app(scope, receive, send)
        elif not is_own_address(server[0]):
            refusal = answer(HTTPStatus.FORBIDDEN, "Without ARCHIVER_API_TOKEN the API serves its own machine only.")
            await refusal(scope, receive, send)
        elif not self._is_own_name(Headers(scope=scope).get("host", "localhost")):  # no browser leaves it out
            refusal = answer(
                HTTPStatus.MISDIRECTED_REQUEST,
                "Without ARCHIVER_API_TOKEN the API is found at localhost, and by the name in ARCHIVER_API_URL.",
            )
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name == self._name or name.rpartition(".")[2] == "localhost" or is_own_address(name)


def is_address(host: str) -> bool:
    """Whether this is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_own_address(host: str) -> bool:
    """Whether this is an IP address that only this machine reaches, written as IPv4 or IPv6."""
    if not is_address(host):
        return False
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
