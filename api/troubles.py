"""What is wrong with a timestep now, or what it waits for. Its history does not tell that, so it is asked for."""

import logging
from collections.abc import Iterator
from uuid import UUID

from redis.exceptions import RedisError
from sqlmodel import Session, col, select

from api.deps import Services
from blocks.object_errors import ObjectStoreError
from blocks.recorded_object import find_difference
from blocks.tables import RejectedEventFile, Timestep
from blocks.waits import Wait

logger = logging.getLogger(__name__)

# A reader of the history does not wait for a storage that hangs.
STORE_SECONDS = 2.0


def rejections_of(timestep_id: UUID, session: Session) -> list[str]:
    """Why event files with a timestep's id are not taken in."""
    file = RejectedEventFile
    rejected = select(file.reason).where(file.timestep_id == timestep_id)
    return list(session.exec(rejected.order_by(col(file.rejected_at), col(file.id))))


def find_wait(timestep_id: UUID, services: Services) -> tuple[Wait | None, list[str]]:
    """What a timestep waits for, if it does; and the same, or that it can't be told, for a person."""
    try:
        wait = services.log.waits.find(timestep_id)
    except RedisError as error:
        logger.warning("Timestep %s: the stream can't be asked what it waits for: %s", timestep_id, error)
        return None, ["what it waits for can't be told: the stream can't be reached"]
    return wait, [wait.sentence()] if wait else []


def what_became_of_its_object(timestep: Timestep, services: Services) -> Iterator[str]:
    """What is not as it was at the upload."""
    if timestep.key is None:
        return
    try:
        difference = find_difference(timestep, services.store.within(STORE_SECONDS))
    except ObjectStoreError as error:
        logger.warning("Timestep %s: the storage can't be asked for its object: %s", timestep.id, error)
        yield "its object can't be looked at: object storage can't be reached"
    else:
        if difference:
            yield difference + ("; it is on tape" if timestep.archived_at else "")
