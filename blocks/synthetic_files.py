"""The files of synthetic timesteps: written as a microscope does, found, and deleted again."""

import json
from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

from blocks.deletion import delete_empty_directories, delete_files
from blocks.source_file import SourceFile
from blocks.synthetic_timestep import SYSTEM, announcement, images

_PARTIAL = ".partial"


def event_file(timestep_id: UUID) -> str:
    """Its path below the system's directory."""
    return f"events/{timestep_id.hex}.json"


def prepare(root: Path) -> Path:
    """The system's directory, with a place for event files, so that it is watched. It stays.

    Raises:
        OSError: when it can't be made; also when the root is not there, which is not made.
    """
    home = root / SYSTEM
    for directory in (home, home / "events"):
        directory.mkdir(exist_ok=True)
    return home


def drop(home: Path, timestep_id: UUID) -> None:
    """Write the images, and then the event file that announces them.

    Raises:
        OSError: when they can't be written.
    """
    for name, content in images(timestep_id).items():
        path = home / timestep_id.hex / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    announced = home / event_file(timestep_id)
    partial = announced.with_name(_hidden(announced.name))
    partial.write_bytes(_announced(timestep_id))
    partial.rename(announced)


def found(home: Path) -> set[UUID]:
    """The timesteps of which anything is there.

    Raises:
        OSError: when the directory can't be read.
    """
    named = [path.name for path in home.iterdir()]
    named += [path.name.removeprefix(".").partition(".")[0] for path in (home / "events").iterdir()]
    return {UUID(name) for name in named if _is_id(name)}


def delete_event_file(home: Path, timestep_id: UUID) -> None:
    """Delete what announces it, if it does. What is gone already is no matter.

    Raises:
        NotDeleted: when it is not a file any more, or lies elsewhere.
        OSError: when its mount refuses.
    """
    name = Path(event_file(timestep_id)).name
    contents = dict.fromkeys([name, _hidden(name)], _announced(timestep_id))
    delete_files(home, "events", _ours(home / "events", contents))


def delete_images(home: Path, timestep_id: UUID) -> None:
    """Delete its images, and the directories that are empty by that. Whatever else lies there stays.

    Raises:
        NotDeleted: when one of them is not a file any more, or lies elsewhere.
        OSError: when their mount refuses.
    """
    contents = images(timestep_id)
    delete_files(home, timestep_id.hex, _ours(home / timestep_id.hex, contents))
    delete_empty_directories(home, timestep_id.hex, contents)


def _ours(directory: Path, contents: Mapping[str, bytes]) -> dict[str, SourceFile]:
    """The files with these contents, or the beginning of them, as what wrote them may have been killed."""
    ours = {}
    for name, content in contents.items():
        path = directory / name
        try:
            file = SourceFile.of(path, path.lstat())
            with file.open() as opened:
                if content.startswith(opened.read(len(content) + 1)):
                    ours[name] = file
        except FileNotFoundError:
            continue
    return ours


def _announced(timestep_id: UUID) -> bytes:
    return json.dumps(announcement(timestep_id).document(), indent=2).encode()


def _hidden(name: str) -> str:
    return f".{name}{_PARTIAL}"


def _is_id(name: str) -> bool:
    try:
        return UUID(name).hex == name
    except ValueError:
        return False
