"""What stands in an event file, and which image directories it names though it is half-written, or wrong otherwise."""

import json
import os
import re
import stat
from pathlib import Path

from blocks.event_file import InvalidEventFile
from blocks.image_directory import faults

_PIECE = 1 << 18
# As a field of that name stands in JSON, wherever: too many directories only keep files that might have gone.
_FIELD = re.compile(r'"(?:img_dir|path)"\s*:\s*("(?:[^"\\]|\\.)*")')


def read_content(path: Path, most: int) -> bytes:
    """The first bytes of an event file, at most so many.

    Raises:
        InvalidEventFile: when it is not a regular file.
        OSError: when it is not there, or its mount fails.
    """
    with faults("it can't be opened"):
        # O_NONBLOCK: opening a fifo must not wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidEventFile("it is not a regular file")
    content = b""
    with os.fdopen(descriptor, "rb") as file:
        # Piece by piece, as a read takes the memory for all that it may give.
        while len(content) < most and (piece := file.read(min(_PIECE, most - len(content)))):
            content += piece
    return content


def claimed_directories(content: bytes, home: Path) -> set[str]:
    """The directories that a text names which need not be JSON.

    Args:
        home: the system's directory; only what is inside of it counts.
    """
    text = content.decode(json.detect_encoding(content), "replace")
    found = set()
    for literal in _FIELD.findall(text):
        try:
            value = str(json.loads(literal, strict=False))
        except ValueError:
            continue
        # By its letters alone: a directory that is above by a link is another one.
        path = Path(os.path.normpath(home / value))
        if path != home and path.is_relative_to(home):
            found.add(str(path.relative_to(home)))
    return found
