"""Without a token, nobody beyond this machine is answered, however the server was started."""

import ipaddress
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import answer


class LoopbackOnly:
    """Refuses what comes in at another address than loopback.

    `uvicorn --host 0.0.0.0 --factory api.app:create_app` knows nothing of ARCHIVER_API_HOST, so what counts is the
    address a connection was made to. A Unix socket has none, and is for this machine only.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server")
        if scope["type"] == "http" and server and is_address_elsewhere(server[0]):
            refusal = answer(HTTPStatus.FORBIDDEN, "Without ARCHIVER_API_TOKEN the API serves its own machine only.")
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def is_address_elsewhere(host: str) -> bool:
    """Whether this is an IP address that other machines may reach."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return not (mapped or address).is_loopback
