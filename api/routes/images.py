"""Single images, read out of a timestep's tar in object storage."""

import hashlib
import mimetypes
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlmodel import col, select

from api.deps import SessionDep, StoreDep
from api.head import is_head
from api.paging import Order, Page, Paging, fetch_page
from api.problems import Problem, documented
from api.routes.timesteps import archives_with, find_timestep, find_uploaded
from api.schemas import Sha256, TimestepPath
from blocks.object_errors import NotStored
from blocks.tables import TimestepImage

router = APIRouter(tags=["images"])

BY_NAME = Order((col(TimestepImage.name),), ("name",), (str,), descending=False)


class ImageRow(BaseModel):
    """One file in a timestep's tar."""

    name: str = Field(description="Path in the tar, without its './'.", examples=["Img/Img_r00_c01.tif"])
    offset: int = Field(description="Where its bytes begin in the object.", examples=[4608])
    size: int = Field(description="Bytes.", examples=[4_000_512])
    sha256: Sha256


_ETAG = '"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"'

# No object has as many bytes as a number with more digits could say.
_RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))", re.ASCII | re.IGNORECASE)


@router.get(
    "/timesteps/{timestep_id}/images",
    summary="The files in a timestep's tar",
    responses=documented(HTTPStatus.NOT_FOUND),
)
def images(timestep_id: TimestepPath, query: Annotated[Paging, Query()], session: SessionDep) -> Page[ImageRow]:
    """By name. Where each lies in the object, and what it must hash to."""
    find_timestep(session, timestep_id)
    rows = select(TimestepImage).where(col(TimestepImage.timestep_id) == timestep_id)
    return fetch_page(
        session, rows, BY_NAME, query, f"images {timestep_id}", lambda row: ImageRow.model_validate(row.model_dump())
    )


@router.get(
    "/timesteps/{timestep_id}/images/{name:path}",
    summary="One image",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"image/tiff": {}}, "description": "The image."},
        206: {"content": {"image/tiff": {}}, "description": "The part of it that Range asks for."},
        304: {"description": "It is the one that If-None-Match names."},
        **documented(HTTPStatus.NOT_FOUND, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, HTTPStatus.BAD_GATEWAY),
    },
)
def image(
    timestep_id: TimestepPath,
    name: Annotated[str, Path(description="As in the list of images.", examples=["Img/Img_r00_c01.tif"])],
    request: Request,
    session: SessionDep,
    store: StoreDep,
    range: Annotated[str | None, Header(description="Only these bytes.", examples=["bytes=0-1023"])] = None,
    if_range: Annotated[str | None, Header(description="The ETag for which Range counts.", examples=[_ETAG])] = None,
    if_none_match: Annotated[
        str | None, Header(description="ETags that need not be sent again.", examples=[_ETAG])
    ] = None,
) -> Response:
    """Read out of the tar by a range request, without fetching the tar, and hashed on the way.

    Its ETag is its SHA-256. An image that does not hash to it breaks off before its end.
    """
    timestep, key, store = find_uploaded(session, timestep_id, store)
    image = session.get(TimestepImage, (timestep_id, name)) if "\0" not in name else None
    if image is None:
        raise Problem(HTTPStatus.NOT_FOUND, f"Timestep {timestep_id} has no image of this name.")
    session.close()  # the connection is not needed while we stream

    etag = f'"{image.sha256}"'
    media_type = mimetypes.guess_type(image.name)[0] or ""
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        # What came from a microscope's disk must not run as a page of ours.
        "Content-Type": media_type if media_type.startswith("image/") and "svg" not in media_type else _OCTETS,
        "X-Content-Type-Options": "nosniff",
    }
    if if_none_match and (if_none_match.strip() == "*" or etag in _etags(if_none_match)):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)

    whole = slice(0, image.size)
    # RFC 9110: a Range counts for GET only, and an If-Range that is not its strong ETag means the whole.
    is_partial = range is not None and not is_head(request) and if_range in (None, etag)
    part = _asked_for(range, image.size) if range and is_partial else whole
    if part is None:
        raise Problem(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            f"The image has {image.size} bytes.",
            {"Content-Range": f"bytes */{image.size}"},
        )
    status = HTTPStatus.OK
    if part != whole:
        status = HTTPStatus.PARTIAL_CONTENT
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{image.size}"
    headers["Content-Length"] = str(part.stop - part.start)
    if is_head(request):
        return Response(status_code=status, headers=headers)
    stored = store.read_range(key, image.offset + part.start, image.offset + part.stop, if_match=timestep.etag)
    # The first chunk is fetched now: when it can't be, there is still time to say so.
    try:
        chunks = _from(next(stored, b""), stored)
    except NotStored:
        if timestep.archived_at is None or store.head(key) is not None:
            raise
        # As the bucket's lifecycle rules want it.
        paths = ", ".join(archive.path for archive in archives_with(session, key))
        raise Problem(
            HTTPStatus.NOT_FOUND, f"Its object is no longer in the bucket; it is on tape in {paths}."
        ) from None
    return StreamingResponse(
        chunks if part != whole else _proven(chunks, image, key), status_code=status, headers=headers
    )


_OCTETS = "application/octet-stream"


def _etags(header: str) -> list[str]:
    return [tag.strip().removeprefix("W/") for tag in header.split(",")]


def _asked_for(header: str, size: int) -> slice | None:
    """The bytes a Range header asks for: all where it is none we know, None where there are no such bytes."""
    asked = _RANGE.fullmatch(header.strip())
    if not asked:
        return slice(0, size)  # several ranges, or another unit: RFC 9110 lets us answer with all of it
    first, last, suffix = asked.groups()
    if suffix:
        start, stop = max(0, size - int(suffix)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return slice(0, size)
    return slice(start, stop) if start < stop else None


def _from(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _proven(chunks: Iterator[bytes], image: TimestepImage, key: str) -> Iterator[bytes]:
    """Pass an image on, but keep its last chunk back until the whole has the right hash.

    Raises:
        NotStored: when it has not. The client then sees fewer bytes than were announced.
    """
    digest = hashlib.sha256()
    held = b""
    for chunk in chunks:
        digest.update(chunk)
        if held:
            yield held
        held = chunk
    if digest.hexdigest() != image.sha256:
        raise NotStored(f"{image.name} in {key} has SHA-256 {digest.hexdigest()}, not {image.sha256}")
    yield held
