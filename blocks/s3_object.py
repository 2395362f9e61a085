"""Objects in S3: put with a signed hash, looked up, read by ranges.

All of these try again as long as the wire's patience lasts. They raise `Refused` when the store says
no, and `ObjectStoreError` when patience ends.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError

from blocks.object_errors import NotStored, Refused
from blocks.pace import Pace
from blocks.retry import Transient
from blocks.s3_wire import S3Wire

CONTENT_TYPE = "application/x-tar"

# A timeout applies to each of these, not to a whole body.
_SEND_BYTES = 1 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class ObjectHead:
    """What the store says about an object."""

    key: str
    size: int
    etag: str
    metadata: dict[str, str]
    modified_at: datetime
    """When the store got it, by the store's clock, in whole seconds."""


def put(
    wire: S3Wire,
    key: str,
    content: memoryview,
    sha256: str,
    query: Mapping[str, str | int] | None = None,
    headers: Mapping[str, str] | None = None,
    fence: Callable[[], None] = lambda: None,
) -> str:
    """Store an object, or a part with the query `partNumber`, `uploadId`; returns its ETag.

    Args:
        sha256: of the content, in hex. The store refuses content that does not match it.
        fence: raises when this process may no longer write; asked before every try.
    """

    def attempt() -> str:
        fence()
        return _put(wire, key, content, sha256, query or {}, headers or {})

    return wire.patience.retry(f"sending {_describe(key, query)}", attempt)


def _put(
    wire: S3Wire, key: str, content: memoryview, sha256: str, query: Mapping[str, str | int], headers: Mapping[str, str]
) -> str:
    headers = {**headers, "content-length": str(len(content)), "content-type": CONTENT_TYPE}
    with closing(wire.request("PUT", key, query, headers, sha256, _paced(content, wire.pace))) as answer:
        answer.read()
        return _etag(answer)


def _paced(content: memoryview, pace: Pace | None) -> Iterator[Any]:
    for start in range(0, len(content), _SEND_BYTES):
        chunk = content[start : start + _SEND_BYTES]
        if pace:
            pace.wait_for(len(chunk))
        yield chunk


def head(wire: S3Wire, key: str) -> ObjectHead | None:
    """What the store says about an object; None if there is none."""
    try:
        return wire.patience.retry(f"looking up {key}", partial(_head, wire, key))
    except Refused as error:
        if error.code == str(HTTPStatus.NOT_FOUND.value):
            return None
        raise


def _head(wire: S3Wire, key: str) -> ObjectHead:
    with closing(wire.request("HEAD", key)) as answer:
        etag = _etag(answer)
        prefix = "x-amz-meta-"
        metadata = {
            name.lower().removeprefix(prefix): value
            for name, value in answer.headers.items()
            if name.lower().startswith(prefix)
        }
        answer.read()
        modified_at = parsedate_to_datetime(answer.headers["last-modified"])
        return ObjectHead(key, int(answer.headers["content-length"]), etag, metadata, modified_at)


def read(wire: S3Wire, key: str, start: int, stop: int, if_match: str | None = None) -> Iterator[bytes]:
    """The object's bytes from `start` up to `stop`, in chunks; goes on where a connection broke off.

    Raises:
        NotStored: if there is no such object, its ETag is not `if_match`, or it ends before `stop`.
    """
    answer: urllib3.BaseHTTPResponse | None = None

    def read_some() -> bytes:
        nonlocal answer, if_match
        if answer is None:
            answer = _open_range(wire, key, start, stop, if_match)
            # Should the connection break, what follows must be of the same object.
            if_match = _etag(answer)
        try:
            if chunk := answer.read(_READ_BYTES):
                return chunk
            cause = "the answer ended early"
        except HTTPError as error:
            cause = str(error)
        answer.close()
        answer = None
        raise Transient(cause)

    try:
        while start < stop:
            chunk = wire.patience.retry(f"reading {key}", read_some)
            start += len(chunk)
            yield chunk
    finally:
        if answer:
            answer.close()


def _open_range(wire: S3Wire, key: str, start: int, stop: int, if_match: str | None) -> urllib3.BaseHTTPResponse:
    headers = {"range": f"bytes={start}-{stop - 1}"}
    if if_match:
        headers["if-match"] = f'"{if_match}"'
    try:
        answer = wire.request("GET", key, headers=headers)
    except Refused as error:
        causes = {
            "NoSuchKey": "there is no such object",
            "PreconditionFailed": f"its ETag is no longer {if_match}",
            "InvalidRange": f"it ends before byte {start}",
        }
        if cause := causes.get(error.code):
            raise NotStored(f"{key} can't be read: {cause}") from error
        raise
    last = answer.headers.get("content-range", "").partition("-")[2].partition("/")[0]
    if last != str(stop - 1):
        answer.close()
        raise NotStored(f"{key} ends before byte {stop}")
    return answer


def _etag(answer: urllib3.BaseHTTPResponse) -> str:
    etag = answer.headers.get("etag", "")
    # The end of the headers can be lost without any error.
    if len(etag) < 2 or not (etag.startswith('"') and etag.endswith('"')):
        raise Transient("the answer was cut short")
    return etag.strip('"')


def _describe(key: str, query: Mapping[str, str | int] | None) -> str:
    return f"part {query['partNumber']} of {key}" if query else key
