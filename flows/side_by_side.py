"""Two sequences in the same order, side by side, so that neither has to fit into memory."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def side_by_side(one: Iterator[T], other: Iterator[T], by: Callable[[T], Any]) -> Iterator[tuple[T | None, T | None]]:
    """What is the same in both together, and what is only in one of them with None in the other's place.

    Args:
        by: what both are in order by, and compared by.
    """
    left, right = next(one, None), next(other, None)
    while left is not None or right is not None:
        take_left = right is None or (left is not None and by(left) <= by(right))
        take_right = left is None or (right is not None and by(right) <= by(left))
        yield (left if take_left else None), (right if take_right else None)
        left = next(one, None) if take_left else left
        right = next(other, None) if take_right else right
