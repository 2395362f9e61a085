"""The content of a request, bounded in bytes and in time."""

import asyncio
from http import HTTPStatus

from fastapi import Request
from starlette.requests import ClientDisconnect

from api.problems import Problem

# Who sends more slowly would hold a connection for ever, and costs nothing to do so.
MOST_SECONDS = 30.0


async def read_body(request: Request, most_bytes: int) -> bytes:
    """All of it.

    Raises:
        Problem: when it is too long, takes too long, or breaks off.
    """
    content = bytearray()
    try:
        async with asyncio.timeout(MOST_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > most_bytes:
                    raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Send at most {most_bytes} bytes.")
    except TimeoutError:
        # The rest of it must not be taken for the next request.
        raise Problem(
            HTTPStatus.REQUEST_TIMEOUT, f"Send all of it within {MOST_SECONDS:g} seconds.", {"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise Problem(HTTPStatus.BAD_REQUEST, "The request broke off.") from None
    return bytes(content)
