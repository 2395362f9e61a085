"""Limits of memory, as a container engine sets them: a control group for each service, where this machine lets us."""

import shlex
from contextlib import suppress
from pathlib import Path

# Of the first version of control groups, beside which the second may be in use for other things.
_PARENT = Path("/sys/fs/cgroup/memory")
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def missing() -> str:
    """Why there can't be such groups here; empty if there can."""
    probe = _PARENT / "archiver-probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"needs control groups for memory that it may write to: {error}"
    return ""


def to_bytes(limit: str) -> int:
    """What `mem_limit: 2g` is in bytes."""
    return int(limit[:-1]) * _UNITS[limit[-1]]


class MemoryGroup:
    """All processes of a service together may hold so many bytes; what needs more is killed."""

    def __init__(self, name: str, limit: str) -> None:
        self._path = _PARENT / name
        self._path.mkdir()
        self.limit = to_bytes(limit)
        (self._path / "memory.limit_in_bytes").write_text(str(self.limit))
        self.peak = 0

    def enter(self) -> str:
        """The shell command that takes its shell, and all that it starts, into the group."""
        return f"echo $$ >{shlex.quote(str(self._path / 'cgroup.procs'))}"

    def sample(self) -> None:
        """Look at what it holds now, without what the system would give away: copies of files."""
        fields = dict(line.split() for line in (self._path / "memory.stat").read_text().splitlines())
        self.peak = max(self.peak, int(fields["total_rss"]) + int(fields["total_shmem"]))

    @property
    def kills(self) -> int:
        """How many processes were killed for want of memory."""
        fields = dict(line.split() for line in (self._path / "memory.oom_control").read_text().splitlines())
        return int(fields["oom_kill"])

    def remove(self) -> None:
        """Take the group away, once its processes have ended."""
        with suppress(OSError):
            self._path.rmdir()
