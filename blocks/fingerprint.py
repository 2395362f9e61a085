"""What decides about an event file, as it is on disk."""

import os

from pydantic import BaseModel, ConfigDict, Field


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
