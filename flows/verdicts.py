"""How the event files of one system were dealt with, at hand for every rescan."""

import os
from collections.abc import Iterable

from blocks.fingerprint import Fingerprint
from blocks.imaging_system import ImagingSystem

# So many files that are taken in are asked for their state in one rescan; the others have their turn in the next ones.
CLOSELY = 20_000


class Verdicts:
    """How the event files of a system were dealt with. There may be 100,000, so what is taken in is kept small."""

    def __init__(self, conclusions: Iterable[tuple[str, str]] = ()) -> None:
        """`conclusions` are event files, and how the register says they were dealt with."""
        self._taken_in: dict[str, str] = {}
        self._rejected: dict[str, Fingerprint] = {}
        self._turn, self._turns = 0, 1
        for event_file, conclusion in conclusions:
            self.learn(event_file, conclusion)

    def __len__(self) -> int:
        return len(self._taken_in) + len(self._rejected)

    def __contains__(self, event_file: str) -> bool:
        return event_file in self._taken_in or event_file in self._rejected

    def learn(self, event_file: str, conclusion: str) -> None:
        """Take over how a file was dealt with, as the register says it."""
        verdict = Fingerprint.model_validate_json(conclusion)
        self.forget(event_file)
        # Once taken in, nothing but the file itself matters.
        if verdict.access is None:
            self._taken_in[event_file] = verdict.file
        else:
            self._rejected[event_file] = verdict

    def forget(self, event_file: str) -> None:
        """Have the file looked at again."""
        self._taken_in.pop(event_file, None)
        self._rejected.pop(event_file, None)

    def begin_rescan(self) -> None:
        """Have other files than in the last rescan looked at closely."""
        self._turns = 1 + len(self._taken_in) // CLOSELY
        self._turn = (self._turn + 1) % self._turns

    def rests(self, event_file: str, inode: int) -> bool:
        """Whether it is enough for this rescan that a file which was taken in is there under its name.

        Another file under this name has another inode. One that is written anew in place is noticed when it has its
        turn, where no hint comes before.
        """
        if inode % self._turns == self._turn:
            return False
        known = self._taken_in.get(event_file)
        return known is not None and Fingerprint.is_of_inode(known, inode)

    def stands(self, event_file: str, status: os.stat_result, system: ImagingSystem) -> bool:
        """Whether the file was dealt with as it is now, and with what its verdict depended on."""
        if known := self._taken_in.get(event_file):
            return known == Fingerprint.state_of(status)
        verdict = self._rejected.get(event_file)
        return (
            verdict is not None and verdict.file == Fingerprint.state_of(status) and system.is_as(verdict, event_file)
        )
