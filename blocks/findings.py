"""A difference between what is known and what is there."""

from collections.abc import Callable
from dataclasses import dataclass, field

from blocks.legible import legible


class NotFixed(Exception):
    """The action was not taken; the message says why."""


@dataclass(frozen=True)
class Finding:
    """One difference, and what is done about it."""

    kind: str
    subject: str
    action: str
    """What `--fix` does, or what a person has to do."""
    fix: Callable[[], object] | None = field(default=None, compare=False)
    """Takes the action by driving the normal path again, or raises `NotFixed`; None where only a person can."""

    def __str__(self) -> str:
        who = "can be fixed: " if self.fix else ""
        return legible(f"{self.kind}: {self.subject} ({who}{self.action})")
