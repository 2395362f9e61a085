"""HEAD, wherever GET is answered: RFC 9110 asks for it, and what watches whether a service is alive sends it."""

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_IS_HEAD = "archiver.is_head"


class HeadAsGet:
    """Has HEAD answered as GET, and drops the content."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_content(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET", _IS_HEAD: True}, receive, send_without_content)
        else:
            await self._app(scope, receive, send)


def is_head(request: Request) -> bool:
    """Whether nobody will see the content, so that it need not be fetched."""
    return _IS_HEAD in request.scope
