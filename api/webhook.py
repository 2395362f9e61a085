"""surf-archiver says here what it has put on tape."""

import asyncio
import logging
from http import HTTPStatus
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from sqlalchemy import func
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, select

from api.body import read_body
from api.deps import Services, ServicesDep, require_surf_archiver
from api.problems import Problem, documented
from blocks.bulk import among
from blocks.messages import LogEvent
from blocks.surf_archiver import SOURCE, InvalidNotice, Notice, read_notice
from blocks.tables import Timestep

logger = logging.getLogger(__name__)

router = APIRouter(tags=["surf-archiver"], dependencies=[Depends(require_surf_archiver)])

MAX_BODY_BYTES = 8 << 20
# A notice does not wait longer than this for the timesteps it is about: the state-manager finds them by their keys.
LOOK_UP_SECONDS = 5


class Receipt(BaseModel):
    """What became of a notice."""

    matched: list[str] = Field(
        description="Keys of known timesteps.", examples=[["images/20261101_004/20261123/104207_6a0ecf0c.tar"]]
    )
    unknown: list[str] = Field(
        description="Keys nobody knows as yet, or can look up now. They are kept, and applied once somebody does.",
        examples=[["images/20261101_004/20261123/114207_0b1d2f3a.tar"]],
    )
    refused: list[str] = Field(
        description="Entries that make no sense, and why. The others are not affected.",
        examples=[["archives.1.path: Field required"]],
    )


_EXAMPLE = {
    "job_id": "0d9a7c1e-3f5b-4a57-9a55-7f3f0f1f2a3b",
    "date": "2026-11-23",
    "archives": [
        {
            "path": "images/20261101_004/20261123.tar",
            "src_keys": ["timesteps/images/20261101_004/20261123/104207_6a0ecf0c.tar"],
        }
    ],
}


@router.post(
    "/webhooks/surf-archiver",
    status_code=HTTPStatus.ACCEPTED,
    summary="Objects were put into archives on tape",
    responses=documented(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": Notice.model_json_schema(), "example": _EXAMPLE}},
        }
    },
)
async def surf_archiver(request: Request, services: ServicesDep) -> Receipt:
    """Append it to the stream; the state-manager applies it. Sending a notice again is harmless."""
    content = await read_body(request, MAX_BODY_BYTES)
    # A long one takes seconds to read, in which the others are to be answered.
    return await asyncio.to_thread(_take_in, content, services)


def _take_in(content: bytes, services: Services) -> Receipt:
    try:
        reading = read_notice(content, services.settings.bucket)
    except InvalidNotice as error:
        raise Problem(HTTPStatus.BAD_REQUEST, f"This is not a notice of surf-archiver: {error}.") from error
    known = known_timesteps([notice.key for notice in reading.archived], services)
    told = [notice.model_copy(update={"timestep_id": known.get(notice.key)}) for notice in reading.archived]
    services.patient_log.append_all([LogEvent.of(notice, SOURCE) for notice in told])
    receipt = Receipt(matched=[], unknown=[], refused=reading.refused)
    for notice in told:
        (receipt.matched if notice.timestep_id else receipt.unknown).append(notice.key)
    logger.info(
        "surf-archiver's notice: %d keys matched, %d unknown, %d entries refused",
        len(receipt.matched),
        len(receipt.unknown),
        len(receipt.refused),
    )
    return receipt


def known_timesteps(keys: list[str], services: Services) -> dict[str, UUID]:
    """The timesteps these keys belong to; none while the database can't tell, for a notice must not get lost."""
    try:
        with Session(services.engine) as session:
            # Who migrates has the tables locked meanwhile.
            session.execute(select(func.set_config("statement_timeout", f"{LOOK_UP_SECONDS}s", True)))
            found = session.exec(select(Timestep.key, Timestep.id).where(among(Timestep.key, keys)))
            return {key: id for key, id in found if key}
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        logger.warning("Keys of surf-archiver's notice can't be looked up: %s", cause)
        return {}
