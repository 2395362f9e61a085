"""The event files of one system that are not dealt with, and which of them have a run under way."""

import time
from dataclasses import dataclass

from blocks.fingerprint import Fingerprint

# Of a backlog, so many files get a run at the same time, so that a new one need not wait for all of them. A run
# that takes longer than this (seconds), once it has begun, waits for its images, and does not count.
BACKLOG_RUNS = 50
BACKLOG_RUN_SECONDS = 30.0


@dataclass
class PendingFile:
    """One of them: since when it looks as it does, since when at most its run is at work, when it was last seen to."""

    fingerprint: Fingerprint
    since: float
    began: float | None = None
    driven: float = float("-inf")

    def was_driven(self, *, has_begun: bool) -> None:
        """It has a run, as of now. One that is only looked at again has not begun again."""
        self.driven = time.monotonic()
        self.began = (self.began if has_begun else None) or self.driven


class Pending:
    """All of them, by their paths."""

    def __init__(self) -> None:
        self._files: dict[str, PendingFile] = {}

    def seen(self, event_file: str, state: Fingerprint) -> PendingFile:
        """What is known of a file that looks like this now."""
        pending = self._files.get(event_file)
        if pending is None or pending.fingerprint != state:
            pending = self._files[event_file] = PendingFile(state, since=time.monotonic())
        return pending

    def forget(self, event_file: str) -> None:
        """It is dealt with, or gone."""
        self._files.pop(event_file, None)

    def names(self) -> list[str]:
        """All of them."""
        return list(self._files)

    def under_way(self) -> list[str]:
        """Those with a run that does not only wait."""
        oldest = time.monotonic() - BACKLOG_RUN_SECONDS
        return [event_file for event_file, pending in self._files.items() if (pending.began or oldest) > oldest]

    def room(self) -> int:
        """How many more of a backlog may get a run now; not above 0 when none may."""
        return BACKLOG_RUNS - len(self.under_way())
