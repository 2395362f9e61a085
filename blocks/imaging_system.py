"""A microscope as we see it: a directory with event files and image directories."""

import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Literal, Self, cast
from zoneinfo import ZoneInfo

from prefect.blocks.core import Block
from prefect.exceptions import ObjectNotFound
from pydantic import Field, ValidationError, field_validator

from blocks.discovery import is_event_file
from blocks.errors import ArchiverError
from blocks.event_content import claimed_directories, read_content
from blocks.event_file import MAX_EVENT_FILE_BYTES, ImagingEvent, InvalidEventFile, parse_event_file
from blocks.fingerprint import Fingerprint
from blocks.image_directory import NotAllowed, faults, image_directory
from blocks.image_survey import Survey
from blocks.mounts import mount_of

logger = logging.getLogger(__name__)

# A source with less room than this part of its disk is emptied by staging.
_NEARLY_FULL = 0.1
# Of an event file that is too large, so much is looked through for the directories that it names.
_MOST_OF_WRONG_BYTES = 1 << 24


class ImagesMissing(Exception):
    """Not all announced images are there and readable yet; the message says which."""


class WrongBlock(ArchiverError):
    """The block of a system can't be used as it is; the message says why. Not that there is none."""


class ImagingSystem(Block):
    """One microscope's directory and how it is to be read.

    Every `<root>/<name>` with an `events` directory is a system with the values below; a block
    of the system's name overrides them.
    """

    _block_type_name = "Imaging System"
    _block_type_slug = "imaging-system"
    _description = "A microscope's directory and how it is to be read."

    name: str = Field("", description="Filled in: the block's name is that of the system and its directory.")
    root: Path = Field(Path(), description="Filled in: the directory that holds the system's directory.")
    display_name: str = Field("", description="What people read on pages and in reports; the name if empty.")
    priority: int = Field(
        0,
        ge=-1000,
        le=1000,
        description="Of a backlog, timesteps of systems with a higher number are uploaded first.",
    )
    time_zone: str = Field("UTC", description="Of timestamps without an offset, e.g. Europe/Amsterdam.")
    watching: Literal["auto", "native", "polling"] = Field(
        "auto", description="Network mounts need polling, as inotify sees nothing there; auto goes by the mount's type."
    )
    settle_seconds: float = Field(
        2.0,
        ge=0,
        description="What has not changed for this long is finished: event files that are not valid, and images that "
        "are not as announced.",
    )
    image_deadline_seconds: float = Field(
        600.0, ge=0, description="How long images are waited for, before the event file is rejected."
    )
    strictness: Literal["strict", "accept"] = Field(
        "strict",
        description="Whether a timestep with more images than announced, or damaged ones, is rejected or accepted "
        "with a warning.",
    )

    staging: Literal["never", "always", "auto"] = Field(
        "never",
        description="Copy timesteps to the staging directory before they are uploaded; auto does where the source is "
        "on a network mount, or its disk is nearly full.",
    )
    staging_retention_hours: float = Field(24.0, ge=0, description="Delete a copy so long after its upload.")
    source_retention_days: float | None = Field(
        None, ge=0, description="Delete a timestep's files so long after its upload; never if empty."
    )
    purge_needs_tape: bool = Field(True, description="Delete files only once the timestep is known to be on tape.")
    purge_trusts_tags: bool = Field(
        False,
        description="Take the tag archived=true alone for a tape copy. surf-archiver leaves it behind where it takes "
        "an archive back.",
    )
    purge_compares: Literal["state", "content"] = Field(
        "state", description="Compare files before they are deleted by sizes, inodes and times, or by content."
    )

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, OSError) as error:
            raise ValueError(f"there is no time zone {value!r}") from error
        return value

    @classmethod
    async def configured(
        cls, name: str, root: Path, load: Callable[[str], Awaitable["ImagingSystem"]] | None = None
    ) -> Self:
        """The system of that name below a root: as its block says, or else with the default values.

        Args:
            load: gives the block of a name, where it need not be asked for anew.

        Raises:
            httpx.HTTPError: when the Prefect server can't be asked.
            WrongBlock: when there is a block that can't be used; it must not be passed over.
        """
        try:
            system = cast(Self, await (load or cls.aload)(name))
        except (ValueError, RuntimeError) as error:
            # Prefect wraps both what a block must not be and that there is none.
            if not isinstance(error.__cause__, ObjectNotFound):
                why = error.__cause__ if isinstance(error.__cause__, ValidationError) else error
                raise WrongBlock(f"the block of {name} can't be used, change it in the Prefect UI: {why}") from error
            system = cls()
        return system.model_copy(update={"name": name, "root": root})

    @property
    def directory(self) -> Path:
        """The system's directory; nothing outside of it is read."""
        return self.root / self.name

    @property
    def observation(self) -> Literal["native", "polling"]:
        """How changes of its event files are noticed."""
        if self.watching != "auto":
            return self.watching
        return "polling" if mount_of(self.directory / "events").is_network else "native"

    @property
    def is_staged(self) -> bool:
        """Whether its timesteps are copied before they are uploaded."""
        if self.staging != "auto":
            return self.staging == "always"
        disk = shutil.disk_usage(self.directory)
        return mount_of(self.directory).is_network or disk.free < _NEARLY_FULL * disk.total

    def event_files(
        self, is_passed_over: Callable[[str, int], bool] = lambda name, inode: False
    ) -> Iterator[tuple[str, os.stat_result]]:
        """Path below the system's directory, and state, of each event file that is there now.

        Args:
            is_passed_over: asked for each path and inode, before the file's state is asked for. To list names is
                cheap; on a share, the state of each file may cost a question of its own.
        """
        with os.scandir(self.directory / "events") as entries:
            for entry in entries:
                if not is_event_file(entry.name) or is_passed_over(name := f"events/{entry.name}", entry.inode()):
                    continue
                try:
                    yield name, entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # renamed or removed since it was listed

    def fingerprint(self, event_file: str, img_dir: str | None = None, *, content: bool = False) -> Fingerprint:
        """The present state of an event file and, where given, of an image directory, or even of its images.

        Raises:
            FileNotFoundError: when the event file is not there.
        """
        return Fingerprint.of(self.directory, event_file, img_dir, content=content)

    def is_as(self, verdict: Fingerprint, event_file: str) -> bool:
        """Whether all that a verdict depended on is as it was, and it is not time to look again all the same.

        Raises:
            FileNotFoundError: when the event file is not there.
        """
        return verdict.is_still(self.directory, event_file)

    def read_event(self, event_file: str) -> ImagingEvent:
        """Read and check an event file.

        Raises:
            InvalidEventFile: when it is not a regular file, or not a valid event.
            OSError: when it is not there, or its mount fails.
        """
        content = read_content(self.directory / event_file, MAX_EVENT_FILE_BYTES + 1)
        return parse_event_file(content, ZoneInfo(self.time_zone))

    def announced_directories(self, event_file: str) -> set[str]:
        """The image directory that an event file announces, or all that it names where it is not valid otherwise.

        Raises:
            NotAllowed: when we may not read it.
            OSError: when its mount fails.
        """
        try:
            return {self.read_event(event_file).img_dir}
        except FileNotFoundError:
            return set()
        except NotAllowed:
            raise
        except InvalidEventFile:
            pass
        try:
            return claimed_directories(read_content(self.directory / event_file, _MOST_OF_WRONG_BYTES), self.directory)
        except (InvalidEventFile, FileNotFoundError):
            return set()  # a link, a pipe or a device: it announces nothing, and never will

    def survey(self, event: ImagingEvent, *, headers: bool = True) -> Survey:
        """What there is of an event's images.

        Args:
            headers: look into the images too, whether they are readable and as long as they say.

        Raises:
            InvalidEventFile: when the directory or an image is not acceptable.
            SystemAway: when the whole system is not there.
            OSError: when their mount fails.
        """
        directory = image_directory(self.directory, event.img_dir)
        with faults(f"its image directory {event.img_dir} can't be read"):
            return Survey.of(directory, event.img_dir, event.img_count, headers=headers)

    def check_images(self, event: ImagingEvent, *, accept_surplus: bool = False) -> Path:
        """The event's image directory, once the announced images are in it.

        Args:
            accept_surplus: whether there may be more of them.

        Raises:
            ImagesMissing: while there are fewer.
            InvalidEventFile: when there are more, or the directory or an image is not acceptable.
            OSError: when their mount fails.
        """
        survey = self.survey(event, headers=False)
        if survey.shortage:
            raise ImagesMissing(survey.shortage)
        if survey.surplus and not accept_surplus:
            raise InvalidEventFile(survey.surplus)
        return self.directory / event.img_dir

    def judge(self, survey: Survey, *, in_time: bool) -> list[str]:
        """Decide about a timestep by what there is of its images.

        Args:
            in_time: whether what is not there yet may still come.

        Returns:
            A sentence for everything that is not as announced and accepted all the same.

        Raises:
            ImagesMissing: when there is something to wait for.
            InvalidEventFile: when the timestep can't be taken in.
        """
        if in_time and not survey.is_complete:
            raise ImagesMissing(survey.sentence())
        if survey.shortage or (self.strictness == "strict" and survey.sentence()):
            raise InvalidEventFile(survey.sentence(whole=True))
        return [sentence for sentence in (survey.surplus, survey.damage) if sentence]
