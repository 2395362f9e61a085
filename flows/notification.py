"""Tells people something, through a notification block of Prefect."""

from typing import Any, cast

from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block

from blocks.errors import ArchiverError


class NoNotificationBlock(ArchiverError):
    """ARCHIVER_REPORT_BLOCK names no Prefect block that can notify anybody."""


async def notification_block(name: str) -> NotificationBlock:
    """The block of this name, `type/name` as in the Prefect UI, e.g. `slack-webhook/lab`.

    Raises:
        NoNotificationBlock: when there is no such block, or it is of another kind.
    """
    try:
        block: Any = await Block.aload(name)
    except ValueError as error:
        raise NoNotificationBlock(f"ARCHIVER_REPORT_BLOCK is {name}, which Prefect does not have: {error}") from error
    if not isinstance(block, NotificationBlock):
        raise NoNotificationBlock(f"ARCHIVER_REPORT_BLOCK is {name}, which is no notification block")
    return block


async def notify(name: str, title: str, text: str) -> None:
    """Send a text through the block of this name.

    Raises:
        NoNotificationBlock: when there is no such block, or it is of another kind.
    """
    block = await notification_block(name)
    await cast(Any, block).notify(text, title)
