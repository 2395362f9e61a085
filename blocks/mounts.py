"""What a directory is mounted from, as Linux tells."""

import re
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")

# Changes that other machines make there are not seen by inotify, nor those behind a FUSE file system (but for
# `fuseblk`, which is on a disk of this machine).
_NETWORK = {
    *("9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs"),
    *("nfs", "nfs4", "ocfs2", "orangefs", "panfs", "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs"),
}
# Here the kernel or a server keeps a time of change that follows whatever is done to a file. Elsewhere it may not:
# those behind FUSE often make one of the modification time, which can be set, FAT has none, and a host's directory
# (virtiofs, 9p) may lie on any of these.
_CHANGE_TIMES = {
    *("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"),
    *("ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "smb3"),
}
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One mounted file system."""

    point: Path
    kind: str
    """Its type: `ext4`, `cifs`, `fuse.sshfs`."""
    options: frozenset[str]

    @property
    def is_network(self) -> bool:
        """Whether other machines write there too."""
        return self.kind in _NETWORK or self.kind.startswith("fuse.")

    @property
    def has_change_times(self) -> bool:
        """Whether it is certain that whatever is done to a file changes a time of it."""
        return self.kind in _CHANGE_TIMES

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be changed there."""
        return "ro" in self.options


def mount_of(path: Path) -> Mount:
    """The mounted file system that a path lies on, whether or not the path exists."""
    place = path.resolve()
    # Of several on one another, the last one counts.
    return max(
        enumerate(mount for mount in _mounts() if place.is_relative_to(mount.point)),
        key=lambda numbered: (len(numbered[1].point.parts), numbered[0]),
    )[1]


def mount_id(path: Path) -> int | None:
    """Which mount a path lies on: a number that a new mount at the same point does not have. Asks no share."""
    found: tuple[int, int | None] = (0, None)
    place = path.absolute()  # not resolved: that would look at the share
    for line in _lines():
        point = _parse(line).point
        # Of several on one another, the last one counts.
        if place.is_relative_to(point) and len(point.parts) >= found[0]:
            found = len(point.parts), int(line.split(" ", 1)[0])
    return found[1]


def mounts_within(path: Path) -> list[Path]:
    """Where something is mounted at a path or below it, so that its files belong elsewhere."""
    place = path.resolve()
    return [mount.point for mount in _mounts() if mount.point.is_relative_to(place)]


def _mounts() -> list[Mount]:
    return [_parse(line) for line in _lines()]


def _lines() -> list[str]:
    return MOUNTS.read_text(errors="surrogateescape").splitlines()


def _parse(line: str) -> Mount:
    """One line of mountinfo: `36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/sda rw,errors=continue`."""
    before, _, after = line.partition(" - ")
    point, options = before.split(" ")[4:6]
    kind, _source, *more = after.split(" ")
    path = Path(_OCTAL.sub(lambda code: chr(int(code[1], 8)), point))
    return Mount(path, kind, frozenset(options.split(",") + (more[0].split(",") if more else [])))
