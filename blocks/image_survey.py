"""What there is of a timestep's images: which are there, what is wrong with them, which are missing."""

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Self

from blocks.event_file import InvalidEventFile
from blocks.fresh_stat import fresh_stat
from blocks.tiff import DamagedTiff, check_tiff

IMAGE_SUFFIXES = (".tif", ".tiff")
# So many names are said in the message of a state; of the others, how many they are.
_NAMES_IN_A_MESSAGE = 100
# A rejection lists them all, up to so many characters: it is one entry of the stream, and one row of the page.
MOST_OF_A_LIST = 32_768
_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True)
class Survey:
    """The images of one timestep, as they were found at one moment."""

    img_dir: str
    announced: int
    found: dict[str, tuple[int, int, int, int]]
    """By their paths below the image directory: size, modification and change time (ns), inode."""
    faults: dict[str, str]
    """What is wrong with an image: `is empty`."""

    @classmethod
    def of(cls, directory: Path, img_dir: str, announced: int, *, headers: bool = True) -> Self:
        """Look at the images directly in a directory, and in its `Img`.

        Args:
            headers: read them too; otherwise `faults` stays empty.

        Raises:
            InvalidEventFile: when one of them is not a regular file.
            OSError: when one can't be read.
        """
        found, faults = {}, {}
        for name, path in _images(directory):
            # To read a header, its mount has to ask for the file anyway.
            status = path.lstat() if headers else fresh_stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidEventFile(f"image {path.name!a} is not a regular file")
            found[name] = _state(status)
            if headers:
                try:
                    check_tiff(path)
                except DamagedTiff as error:
                    faults[name] = str(error)
        return cls(img_dir, announced, found, faults)

    @staticmethod
    def digest_of(directory: Path) -> str:
        """Of the state of each image there is, to notice any change of them; of the error where they can't be seen."""
        try:
            states = [(name, _state(path.lstat())) for name, path in _images(directory)]
        except (OSError, InvalidEventFile) as error:
            return type(error).__name__
        return hashlib.sha256(repr(states).encode()).hexdigest()

    @property
    def is_complete(self) -> bool:
        """Whether nothing has to be waited for."""
        return len(self.found) >= self.announced and not self.faults

    @property
    def changed_at(self) -> float:
        """When something happened to one of the images for the last time, in seconds since 1970."""
        return max((max(mtime, ctime) for _, mtime, ctime, _ in self.found.values()), default=0) / 1e9

    @property
    def shortage(self) -> str:
        """How many images are there of how many, and which are missing where their names tell; or nothing."""
        return self._shortage(_NAMES_IN_A_MESSAGE)

    @property
    def surplus(self) -> str:
        """How many images there are too many, and which where their names tell, or else all; or nothing."""
        return self._surplus(_NAMES_IN_A_MESSAGE)

    @property
    def damage(self) -> str:
        """Every image that something is wrong with, and what; or nothing."""
        return self._damage(_NAMES_IN_A_MESSAGE)

    def sentence(self, *, whole: bool = False) -> str:
        """All that is not as it was announced.

        Args:
            whole: with all names, and not only with as many as the message of a state has room for.
        """
        most = None if whole else _NAMES_IN_A_MESSAGE
        return "; ".join(filter(None, (self._shortage(most), self._surplus(most), self._damage(most))))

    def _shortage(self, most: int | None) -> str:
        if len(self.found) >= self.announced:
            return ""
        missing = missing_names(self.found, self.announced)
        which = f"; missing: {_enumeration(missing, most)}" if missing else ""
        return f"{len(self.found)} of {self.announced} images are in {self.img_dir}{which}"

    def _surplus(self, most: int | None) -> str:
        if len(self.found) <= self.announced:
            return ""
        more = surplus_names(self.found, self.announced)
        which = "too many" if more else "there"
        names = _enumeration([ascii(name)[1:-1] for name in more or self.found], most)
        return f"it announces {self.announced} images, but {len(self.found)} are in {self.img_dir}; {which}: {names}"

    def _damage(self, most: int | None) -> str:
        return _enumeration([f"{ascii(name)[1:-1]} {fault}" for name, fault in self.faults.items()], most)


def missing_names(found: Collection[str], count: int) -> list[str]:
    """The names that are missing of `count`, where the names are numbered or follow a grid; else none."""
    names = [_DIGITS.split(name) for name in found]
    if count > 10_000 or len({tuple(name[::2]) for name in names}) != 1:
        return []
    columns = list(zip(*(name[1::2] for name in names), strict=True))
    numbers = [range(min(map(int, column)), max(map(int, column)) + 1) for column in columns]
    if len(numbers) == 1 and numbers[0].start <= 1 and len(numbers[0]) < count:
        # Numbered from the start on, so also the last ones can be told.
        numbers = [range(numbers[0].start, numbers[0].start + count)]
    if prod(map(len, numbers)) != count:
        return []
    widths = [len(column[0]) if len(set(map(len, column))) == 1 else 0 for column in columns]
    text = names[0][::2]
    made = (
        text[0]
        + "".join(f"{number:0{width}d}{after}" for number, width, after in zip(row, widths, text[1:], strict=True))
        for row in product(*numbers)
    )
    return [name for name in made if name not in found]


def surplus_names(found: Collection[str], count: int) -> list[str]:
    """The names that are too many, where `count` of them are of one kind, or numbered from the start on; else none."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name in found:
        kinds.setdefault(tuple(_DIGITS.split(name)[::2]), []).append(name)
    whole = [names for names in kinds.values() if len(names) == count]
    if len(whole) == 1:
        return sorted(set(found).difference(whole[0]))
    if len(kinds) != 1 or len(next(iter(kinds))) != 2:
        return []
    numbers = {name: int(_DIGITS.split(name)[1]) for name in found}
    first = min(numbers.values())
    more = sorted(name for name, number in numbers.items() if number >= first + count)
    return more if first <= 1 and len(more) == len(found) - count else []


def _images(directory: Path) -> Iterator[tuple[str, Path]]:
    for prefix in ("", "Img/"):
        folder = directory / prefix
        if prefix and folder.is_symlink():
            raise InvalidEventFile(f"{prefix[:-1]} in its image directory is a symbolic link")
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES)
        yield from ((prefix + name, folder / name) for name in names)


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _enumeration(parts: Collection[str], most: int | None) -> str:
    said: list[str] = []
    room = MOST_OF_A_LIST
    for part in islice(parts, most):
        room -= len(part) + 2
        if room < 0:
            break
        said.append(part)
    more = len(parts) - len(said)
    return ", ".join([*said, *([f"and {more} more"] if more > 0 else [])])
