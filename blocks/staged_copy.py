"""What a copy in staging is made of: durable files, and beside them a record of what they were copied from."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from blocks.source_file import SourceFile

_CHUNK = 1 << 20


class CopyRecord(BaseModel):
    """What is said of a copy, beside it."""

    model_config = ConfigDict(frozen=True)

    files: dict[str, str] = Field(description="SHA-256 of each file, by its name.")
    source_state: str | None = Field(None, description="Of the source before it was read.")
    source: str | None = Field(None, description="Where it was copied from.")
    announcement: str | None = Field(
        None, description="Identifies what was announced, so also in which directory; null where nobody said so."
    )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read one; of an older release, it says only what the files hash to."""
        said = json.loads(path.read_text())
        return cls.model_validate(said if isinstance(said.get("files"), dict) else {"files": said})

    def write(self, path: Path) -> None:
        """Write it durably, whole or not at all."""
        partial = path.with_name(f".{path.name}.new")
        with partial.open("wb") as file:
            file.write(self.model_dump_json(indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    def is_of(self, announcement: str | None) -> bool:
        """Whether the copy may be one of what was announced: no other is said to have been copied."""
        return self.announcement is None or self.announcement == announcement


def holds(copy: Mapping[str, SourceFile], source: Mapping[str, SourceFile]) -> bool:
    """Whether a copy has all that the source has (still), each file as it is there."""
    return {name: (file.size, file.mtime_ns) for name, file in source.items()}.items() <= {
        name: (file.size, file.mtime_ns) for name, file in copy.items()
    }.items()


def copy_file(source: SourceFile, target: Path) -> str:
    """Copy a file with its modification time, durably; returns its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open() as file, target.open("xb") as copy:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    os.utime(target, ns=(source.mtime_ns, source.mtime_ns))
    return digest.hexdigest()


def hash_file(file: SourceFile) -> str:
    """Read a whole file; returns its SHA-256."""
    with file.open() as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sync(directory: Path) -> None:
    """Make durable what was renamed or created in a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
