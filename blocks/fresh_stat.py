"""What a file server says of a file now, where its mount would answer from memory for seconds, or a minute."""

import ctypes
import os
from pathlib import Path

# From linux/stat.h and linux/fcntl.h, the same on every processor.
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS = -100, 0x100, 0x2000, 0x7FF
_STATX_BYTES = 256

_statx = ctypes.CDLL(None).statx


def fresh_stat(path: Path | str, *, dir_fd: int | None = None) -> os.stat_result:
    """The state of a file, or of a link itself.

    NFS, CIFS and FUSE remember it; what another machine does meanwhile is not to be seen there otherwise.

    Raises:
        OSError: as os.stat does.
    """
    base = _AT_FDCWD if dir_fd is None else dir_fd
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    # Only for the mount to ask anew: os.stat then tells what it was answered, or what went wrong.
    _statx(base, os.fsencode(path), _AT_SYMLINK_NOFOLLOW | _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS, answer)
    return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
