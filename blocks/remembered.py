"""Prefect blocks that are asked for often."""

import time
from typing import Generic, TypeVar, cast

from prefect.blocks.core import Block

B = TypeVar("B", bound=Block)

# A change in the UI counts after this long at most (seconds).
SECONDS = 3.0


class Remembered(Generic[B]):
    """Blocks of one class by their names, each as it was at most `SECONDS` ago."""

    def __init__(self, kind: type[B]) -> None:
        self._kind = kind
        self._known: dict[str, tuple[float, B | ValueError]] = {}

    async def load(self, name: str) -> B:
        """The block of that name.

        Raises:
            ValueError: when there is none.
            httpx.HTTPError: when the Prefect server can't be asked.
        """
        at, known = self._known.get(name, (float("-inf"), None))
        if known is None or time.monotonic() - at > SECONDS:
            try:
                known = cast(B, await self._kind.aload(name))
            except ValueError as error:
                known = error  # that there is none is remembered as well
            self._known[name] = (time.monotonic(), known)
        if isinstance(known, ValueError):
            raise known
        return known
