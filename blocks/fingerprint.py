"""What decides about an event file, as it is on disk."""

import os
import time
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from blocks.image_survey import Survey


class Fingerprint(BaseModel):
    """What decides about an event file, as it was on disk: when it differs, look again."""

    model_config = ConfigDict(frozen=True)

    file: str = Field(description="State of the event file itself.")
    access: str | None = Field(None, description="Who may read it, where the verdict may depend on it.")
    img_dir: str | None = Field(None, description="The image directory, where the verdict depends on it.")
    images: str | None = Field(None, description="State of that directory.")
    content: str | None = Field(None, description="State of each image, where the verdict depends on them.")
    look_again_at: float | None = Field(
        None, description="When to look again though nothing differs (seconds since 1970), where the cause may pass."
    )

    @classmethod
    def of(cls, system: Path, event_file: str, img_dir: str | None = None, *, content: bool = False) -> Self:
        """The present state of an event file and, where given, of an image directory, or even of its images.

        Args:
            system: the directory below which both are.

        Raises:
            FileNotFoundError: when the event file is not there.
        """
        status = (system / event_file).lstat()
        alone = cls(file=cls.state_of(status), access=cls.access_of(status))
        if img_dir is None:
            return alone
        states = []
        for directory in (system / img_dir, system / img_dir / "Img"):
            try:
                status = directory.stat()
                states.append(f"{cls.state_of(status)} {cls.access_of(status)}")
            except OSError as error:
                states.append(type(error).__name__)
        found = alone.model_copy(update={"img_dir": img_dir, "images": " ".join(states)})
        if content:
            found = found.model_copy(update={"content": Survey.digest_of(system / img_dir)})
        return found

    def is_still(self, system: Path, event_file: str) -> bool:
        """Whether all that a verdict depended on is as it was, and it is not time to look again all the same.

        Raises:
            FileNotFoundError: when the event file is not there.
        """
        if self.look_again_at is not None and time.time() >= self.look_again_at:
            return False
        now = Fingerprint.of(system, event_file, self.img_dir, content=self.content is not None)
        return now == self.model_copy(update={"look_again_at": None})

    @staticmethod
    def state_of(status: os.stat_result) -> str:
        """What `file` is for an event file in this state."""
        return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"

    @staticmethod
    def is_of_inode(state: str, inode: int) -> bool:
        """Whether a state is that of a file with this inode."""
        return state.endswith(f"-{inode}")

    @staticmethod
    def differ_in_inode_only(one: str, other: str) -> bool:
        """Whether two states may be of one file, on a share that numbers its files anew when it is mounted again."""
        return one != other and one.rpartition("-")[0] == other.rpartition("-")[0]

    @staticmethod
    def access_of(status: os.stat_result) -> str:
        """What `access` is for something in this state."""
        return f"{status.st_mode:o}-{status.st_uid}-{status.st_gid}"
