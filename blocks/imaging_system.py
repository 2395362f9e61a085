"""A microscope as we see it: a directory with event files and image directories."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self
from zoneinfo import ZoneInfo

from prefect.blocks.core import Block
from pydantic import BaseModel, ConfigDict, Field, field_validator

from blocks.messages import MAX_EVENT_FILE_BYTES, ImagingEvent, InvalidEventFile, parse_event_file

IMAGE_SUFFIXES = (".tif", ".tiff")


class ImagesMissing(Exception):
    """Not all announced images are there yet; the message says how many are."""


class Fingerprint(BaseModel):
    """What decides about an event file, as it was on disk: when it differs, look again."""

    model_config = ConfigDict(frozen=True)

    file: str = Field(description="State of the event file itself.")
    img_dir: str | None = Field(None, description="The image directory, where the verdict depends on it.")
    images: str | None = Field(None, description="State of that directory.")

    @classmethod
    def of(cls, event_file: os.stat_result) -> Self:
        """The fingerprint of an event file alone, from its state on disk."""
        return cls(file=_state(event_file))


class ImagingSystem(Block):
    """One microscope's directory and how it is to be read.

    Every `<root>/<name>` with an `events` directory is a system with the values below; a block
    of the system's name overrides them.
    """

    _block_type_name = "Imaging System"
    _block_type_slug = "imaging-system"
    _description = "A microscope's directory and how it is to be read."

    name: str = Field(description="Name of the system, which is the name of its directory.")
    root: Path = Field(description="The directory that holds the system's directory.")
    time_zone: str = Field("UTC", description="Of timestamps without an offset, e.g. Europe/Amsterdam.")
    watching: Literal["native", "polling"] = Field(
        "native", description="Network mounts need polling: inotify sees nothing there."
    )
    settle_seconds: float = Field(
        2.0, ge=0, description="An invalid event file is rejected only after it has not changed for this long."
    )

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        ZoneInfo(value)
        return value

    @classmethod
    def discover(cls, root: Path) -> list[Self]:
        """The systems below a root, sorted by name. A root that is not mounted has none."""
        try:
            with os.scandir(root) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []
        return [cls(name=name, root=root) for name in names if (root / name / "events").is_dir()]

    @property
    def directory(self) -> Path:
        """The system's directory; nothing outside of it is read."""
        return self.root / self.name

    def event_files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Path below the system's directory, and state, of each event file that is there now."""
        with os.scandir(self.directory / "events") as entries:
            for entry in entries:
                if entry.name.endswith(".json") and not entry.name.startswith("."):
                    try:
                        yield f"events/{entry.name}", entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # renamed or removed since it was listed

    def fingerprint(self, event_file: str, img_dir: str | None = None) -> Fingerprint:
        """The present state of an event file and, where given, of an image directory.

        Raises:
            FileNotFoundError: when the event file is not there.
        """
        alone = Fingerprint.of((self.directory / event_file).lstat())
        if img_dir is None:
            return alone
        states = []
        for directory in (self.directory / img_dir, self.directory / img_dir / "Img"):
            try:
                states.append(_state(directory.stat()))
            except OSError as error:
                states.append(type(error).__name__)
        return Fingerprint(file=alone.file, img_dir=img_dir, images=" ".join(states))

    def read_event(self, event_file: str) -> ImagingEvent:
        """Read and check an event file.

        Raises:
            InvalidEventFile: when it is not a regular file, or not a valid event.
            FileNotFoundError: when it is not there.
        """
        path = self.directory / event_file
        # O_NONBLOCK: opening a fifo must not wait for somebody to write to it.
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InvalidEventFile(f"it can't be opened: {error.strerror}") from error
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidEventFile("it is not a regular file")
            content = file.read(MAX_EVENT_FILE_BYTES + 1)
        return parse_event_file(content, ZoneInfo(self.time_zone))

    def image_directory(self, event: ImagingEvent) -> Path:
        """The directory that an event announces.

        Raises:
            InvalidEventFile: when it does not exist, or leaves the system's directory.
        """
        path = self.directory / event.img_dir
        home = self.directory.resolve()
        try:
            real = path.resolve(strict=True)
        except OSError as error:
            raise InvalidEventFile(f"its image directory {event.img_dir} can't be read: {error.strerror}") from error
        # The path has no '..', so only a symbolic link can make the two differ.
        if real != home / event.img_dir:
            raise InvalidEventFile(f"its image directory {event.img_dir} leads through a symbolic link")
        if not real.is_dir():
            raise InvalidEventFile(f"its image directory {event.img_dir} is not a directory")
        if real.is_relative_to(home / "events"):
            raise InvalidEventFile(f"its image directory {event.img_dir} is the directory of the event files")
        return path

    def check_images(self, event: ImagingEvent) -> Path:
        """The event's image directory, once exactly the announced images are in it.

        Raises:
            ImagesMissing: while there are fewer.
            InvalidEventFile: when there are more, or the directory is not acceptable.
        """
        directory = self.image_directory(event)
        found = sum(
            1
            for folder in (directory, directory / "Img")
            if folder.is_dir()
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES
        )
        if found < event.img_count:
            raise ImagesMissing(f"{found} of {event.img_count} images are in {event.img_dir}")
        if found > event.img_count:
            raise InvalidEventFile(f"it announces {event.img_count} images, but {found} are in {event.img_dir}")
        return directory


def _state(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"
