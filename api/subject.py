"""Which timestep a request is about, for the lines that are logged of it: a traceback names none."""

import re
from uuid import UUID

from starlette.types import ASGIApp, Receive, Scope, Send

from blocks.logs import log_about

_TIMESTEP = re.compile(r"/timesteps/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:/|$)", re.IGNORECASE)


class LogSubject:
    """Has everything that is logged of a request name the timestep in its path, also by the server, also later on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Each request is a task, whose context ends with it.
        if scope["type"] == "http" and (named := _TIMESTEP.search(scope["path"])):
            log_about(UUID(named[1]))
        await self._app(scope, receive, send)
