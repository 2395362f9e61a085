"""Shares: file systems on which others write, so that inotify sees nothing of what they do."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks import mounts
from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.mounts import mount_id, mount_of
from flows import system_watch
from tests.watching import Ingest, Microscope, said, taken_in, until, watching

MOUNTINFO = r"""22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:40 / /data/prince rw,relatime - cifs //microscope/prince rw,vers=3.0
31 22 0:41 / /data/aretha\040f ro,relatime - nfs4 server:/aretha rw
32 22 0:42 / /data/nina rw - fuse.sshfs nina@host:/ rw,user_id=0
33 22 0:43 / /data/ella rw - fuse /srv/ella rw,user_id=0
34 22 8:2 / /data/miles rw - fuseblk /dev/sdb1 rw
35 22 0:44 / /data/bowie rw - virtiofs bowie rw
36 22 0:45 / /data/simone rw - cifs //old/simone rw
37 36 8:3 / /data/simone rw - xfs /dev/sdc1 rw
38 22 0:46 / /data/prince/events rw - tmpfs tmpfs rw
39 22 0:47 / /data/joni rw - fuse.rclone remote: rw
40 22 0:48 / /data/nico rw - vfat /dev/sdd1 rw
41 22 0:49 / /data/cher/events rw - nfs4 server:/cher rw
"""


@pytest.mark.parametrize(
    ("name", "observation"),
    [
        ("prince/t1", "polling"),
        ("prince", "native"),  # its events lie elsewhere
        ("cher", "polling"),
        ("aretha f", "polling"),
        ("nina", "polling"),
        ("ella", "polling"),
        ("bowie", "polling"),
        ("miles", "native"),
        ("odetta", "native"),
        ("simone", "native"),  # the last of two on one another
    ],
)
def test_the_type_of_the_mount_decides_how_a_system_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, observation: str
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTINFO)
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")
    system = ImagingSystem(name=name, root=Path("/data"))
    assert system.observation == observation
    assert system.model_copy(update={"watching": "polling"}).observation == "polling"
    assert system.model_copy(update={"watching": "native"}).observation == "native"
    assert mount_of(system.directory).is_read_only == (name == "aretha f")


def test_only_where_changes_are_certain_to_be_seen_files_are_told_by_their_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTINFO)
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")
    names = ("prince", "aretha f", "odetta", "simone", "joni", "nina", "nico", "miles", "bowie")
    certain = {name for name in names if mount_of(Path("/data", name, "t1")).has_change_times}
    assert certain == {"prince", "aretha f", "odetta", "simone"}


def test_a_mount_is_known_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTINFO)
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")
    names = ("prince", "prince/events/1.json", "aretha f/t1", "simone", "odetta")
    assert [mount_id(Path("/data", name)) for name in names] == [30, 38, 31, 37, 22]


class Share:
    """A FUSE mount of a server's directory: what is done on the server, inotify on the mount does not see."""

    def __init__(self, server: Path, mount: Path) -> None:
        self.server = server
        self._mount = mount

    def mount(self) -> None:
        # Attributes as on the server at once: a share of the network would show them within a second or more.
        command = ["bindfs", "-o", "attr_timeout=0,entry_timeout=0", str(self.server), str(self._mount)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a FUSE mount is not possible here: {done.stderr}")

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self._mount)], capture_output=True, check=True)


@pytest.fixture
def share(root: Path, tmp_path: Path) -> Iterator[Share]:
    """`root/prince`, as a share."""
    if os.geteuid() != 0 or not shutil.which("bindfs"):
        pytest.skip("a FUSE mount needs root, and the program bindfs")
    (root / "prince").mkdir()
    (tmp_path / "server").mkdir()
    share = Share(tmp_path / "server" / "prince", root / "prince")
    yield share
    subprocess.run(["umount", "-l", str(root / "prince")], capture_output=True, check=False)


def test_what_others_write_on_a_share_is_taken_in_though_no_hint_comes(
    root: Path, event_log: EventLog, ingest: Ingest, share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest.watching = "native"
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 2.0)
    server = Microscope(share.server.parent)
    share.mount()
    server.drop("before.json")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "before.json"), "taking it in")
            monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 3600.0)
            await asyncio.sleep(2.5)
            server.drop("unseen.json")
            await asyncio.sleep(1)
            assert ("ingested", "events/unseen.json") not in said(event_log), "inotify has seen it"
        # By the type of its mount, and then it is polled.
        ingest.watching = "auto"
        monkeypatch.setattr(system_watch, "POLL_SECONDS", 0.5)
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "unseen.json"), "taking in what was missed")
            server.drop("created.json")
            temporary = server.events / ".renamed.json.part"
            temporary.write_text(server.event())
            temporary.rename(server.events / "renamed.json")
            (server.events / "overwritten.json").write_text("{")
            await until(taken_in(event_log, "created.json", "renamed.json"), "taking both in")
            (server.events / "overwritten.json").write_text(server.event())
            await until(taken_in(event_log, "overwritten.json"), "taking in what is whole now")
            share.unmount()
            server.drop("between.json")
            await asyncio.sleep(1)
            share.mount()
            await until(taken_in(event_log, "between.json"), "taking in what came while it was away")
            server.drop("after.json")
            await until(taken_in(event_log, "after.json"), "taking in what came after it")

    asyncio.run(test())
    names = ("after", "before", "between", "created", "overwritten", "renamed", "unseen")
    assert sorted(said(event_log)) == [("ingested", f"events/{name}.json") for name in names]
    assert set(ingest.runs.values()) == {1}
