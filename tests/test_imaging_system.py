"""A microscope's directory, with everything in it that a file system can hold."""

import errno
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blocks.discovery import discover_systems
from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.image_directory import SystemAway
from blocks.imaging_system import ImagesMissing, ImagingSystem
from tests.events import document
from tests.images import tiff

NOBODY = 65534


@pytest.fixture
def system(tmp_path: Path) -> Iterator[ImagingSystem]:
    mask = os.umask(0o022)
    (tmp_path / "prince" / "events").mkdir(parents=True)
    yield ImagingSystem(name="prince", root=tmp_path, time_zone="Europe/Amsterdam")
    os.umask(mask)


def announce(system: ImagingSystem, name: str = "1.json", **fields: object) -> ImagingEvent:
    """Write an event file, by default for two images in `t1`; gives back what it says."""
    known = {"timestamp": "2026-11-23T10:42:07", "img_dir": "t1"}
    (system.directory / "events" / name).write_text(json.dumps(document(**(known | fields))))
    return system.read_event(f"events/{name}")


def images(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_bytes(tiff())
    return directory


@contextmanager
def as_nobody(directory: Path) -> Iterator[None]:
    """Without root's right to read everything, but with the right to pass through the test's directories."""
    for parent in (directory, *directory.parents):
        if parent.stat().st_uid == os.geteuid() and parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)  # root's group stays
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


# --- the systems


def test_systems_are_the_directories_with_events(tmp_path: Path) -> None:
    for path in ("prince/events", "aretha/events", "archive", os.fsdecode(b"\xff/events")):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "notes").write_text("")
    (tmp_path / "twin").symlink_to(tmp_path / "prince")
    assert discover_systems(tmp_path) == ["aretha", "prince"]


def test_a_system_that_is_a_link_is_left_out_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere" / "events").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "prince").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        assert discover_systems(tmp_path / "root") == []
    (line,) = [record.message for record in caplog.records]
    assert "prince is left out, because it is a symbolic link" in line


def test_a_system_whose_events_are_a_link_is_left_out_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prince" / "events").mkdir(parents=True)
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "events").symlink_to(tmp_path / "prince" / "events")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "events").symlink_to("nowhere")
    assert discover_systems(tmp_path) == ["prince"]
    (line,) = [record.message for record in caplog.records]
    assert "twin is left out, because" in line


def test_a_root_that_is_not_mounted_has_no_systems(tmp_path: Path) -> None:
    assert discover_systems(tmp_path / "away") == []


def test_event_files_are_those_a_microscope_finished(system: ImagingSystem) -> None:
    events = system.directory / "events"
    for name in ("1.json", "2.JSON", ".3.json", "4.json.part", "json", os.fsdecode(b"\xff.json")):
        (events / name).write_text("{}")
    (events / "dir.json").mkdir()
    (events / "gone.json").symlink_to("nowhere")
    assert sorted(name for name, _ in system.event_files()) == [
        "events/1.json",
        "events/2.JSON",
        "events/dir.json",
        "events/gone.json",
    ]


# --- event files


def test_the_time_zone_of_the_system_counts(system: ImagingSystem) -> None:
    assert announce(system).timestamp == datetime(2026, 11, 23, 9, 42, 7, tzinfo=UTC)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the whole path may be too long for a socket
        server.bind(path.name)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory": (Path.mkdir, "not a regular file"),
    "fifo": (os.mkfifo, "not a regular file"),
    "socket": (listening, "can't be opened"),
    "link to a sound one": (lambda path: path.symlink_to("1.json"), "can't be opened"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "can't be opened"),
    "link to itself": (lambda path: path.symlink_to(path.name), "can't be opened"),
    "link to endless zeros": (lambda path: path.symlink_to("/dev/zero"), "can't be opened"),
}


@pytest.mark.parametrize(("make", "sentence"), NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_refused_at_once(
    system: ImagingSystem, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], sentence: str
) -> None:
    monkeypatch.chdir(system.directory)
    announce(system)
    make(system.directory / "events" / "2.json")
    with pytest.raises(InvalidEventFile, match=sentence):
        system.read_event("events/2.json")


def test_a_device_is_refused(system: ImagingSystem) -> None:
    with pytest.raises(InvalidEventFile, match="not a regular file"):
        system.read_event("/dev/zero")


def test_an_event_file_that_vanished_is_not_an_invalid_one(system: ImagingSystem) -> None:
    with pytest.raises(FileNotFoundError):
        system.read_event("events/1.json")


def test_an_unreadable_event_file_is_refused_and_looked_at_again_once_it_is_readable(system: ImagingSystem) -> None:
    announce(system)
    path = system.directory / "events" / "1.json"
    path.chmod(0o600)
    with as_nobody(path.parent):
        if os.geteuid() == NOBODY:
            with pytest.raises(InvalidEventFile, match="Permission denied"):
                system.read_event("events/1.json")
    before = system.fingerprint("events/1.json")
    path.chmod(0o644)
    assert system.fingerprint("events/1.json") != before
    with as_nobody(path.parent):
        system.read_event("events/1.json")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EHOSTDOWN, errno.EMFILE])
def test_a_mount_that_fails_is_nobodys_fault(
    system: ImagingSystem, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    event = announce(system)
    images(system.directory / "t1", "a.tif", "b.tif")

    def fails(*_args: object, **_options: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(OSError, match=os.strerror(number)):
        system.read_event("events/1.json")
    for call in ("lstat", "scandir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            with pytest.raises(OSError, match=os.strerror(number)):
                system.check_images(event)
    assert system.check_images(event) == system.directory / "t1"


# --- image directories


@pytest.mark.parametrize(
    "places",
    [
        ["t1/a.tif", "t1/b.tif"],
        ["t1/Img/a.tif", "t1/Img/b.tif"],
        ["t1/a.tif", "t1/Img/a.tif"],
        ["t1/a.TIF", "t1/a.tif"],
        ["t1/Img/a.TIFF", "t1/Img/b.tIf", "t1/Img/notes.txt", "t1/thumbs/c.tif", "t1/img/d.tif", "t1/.tif"],
    ],
)
def test_the_announced_images_are_found(system: ImagingSystem, places: list[str]) -> None:
    event = announce(system)
    for place in places:
        images((system.directory / place).parent, Path(place).name)
    assert system.check_images(event) == system.directory / "t1"


def test_images_may_lie_deep_in_a_directory_with_an_odd_name(system: ImagingSystem) -> None:
    event = announce(system, img_dir="./2026//Zoë's \\ {plate}\n %s/ t1 /")
    images(system.directory / "2026" / "Zoë's \\ {plate}\n %s" / " t1 ", "a.tif", "b.tif")
    assert system.check_images(event) == system.directory / event.img_dir


def test_too_few_images_are_waited_for_and_too_many_refused(system: ImagingSystem) -> None:
    event = announce(system)
    directory = images(system.directory / "t1")
    with pytest.raises(ImagesMissing, match="0 of 2 images are in t1"):
        system.check_images(event)
    images(directory / "Img", "a.tif")
    with pytest.raises(ImagesMissing, match="1 of 2"):
        system.check_images(event)
    images(directory, "b.tif")
    system.check_images(event)
    images(directory, "c.tif")
    with pytest.raises(InvalidEventFile, match="announces 2 images, but 3 are in t1"):
        system.check_images(event)


def test_an_empty_img_beside_the_images_does_no_harm(system: ImagingSystem) -> None:
    event = announce(system)
    images(images(system.directory / "t1", "a.tif", "b.tif") / "Img")
    system.check_images(event)


def link(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


NO_IMAGE_DIRECTORIES: dict[str, tuple[str, Callable[[Path, Path], object], str]] = {
    "missing": ("t1", lambda home, outside: None, "No such file"),
    "missing with a Windows path": (r"..\aretha\t1", lambda home, outside: None, "No such file"),
    "a file": ("t1", lambda home, outside: (home / "t1").write_text(""), "not a directory"),
    "below a file": ("t1/t2", lambda home, outside: (home / "t1").write_text(""), "Not a directory"),
    "a fifo": ("t1", lambda home, outside: os.mkfifo(home / "t1"), "not a directory"),
    "a socket": ("t1", lambda home, outside: listening(home / "t1"), "not a directory"),
    "a name too long": ("x" * 300, lambda home, outside: None, "File name too long"),
    "the events": ("events", lambda home, outside: images(home / "events", "a.tif", "b.tif"), "event files"),
    "below the events": (
        "events/t1",
        lambda home, outside: images(home / "events/t1", "a.tif", "b.tif"),
        "event files",
    ),
    "a link out": ("t1", lambda home, outside: link(home / "t1", outside), "symbolic link"),
    "a link above": ("a/t1", lambda home, outside: link(home / "a", outside.parent), "symbolic link"),
    "a link within": ("t1", lambda home, outside: link(home / "t1", images(home / "t2", "a.tif")), "symbolic link"),
    "a link to itself": ("t1", lambda home, outside: link(home / "t1", home / "t1"), "symbolic links"),
    "a broken link": ("t1", lambda home, outside: link(home / "t1", home / "t2"), "No such file"),
    "Img is a link": ("t1", lambda home, outside: link(home / "t1/Img", outside), "symbolic link"),
    "an image is a link": ("t1", lambda home, outside: link(home / "t1/a.tif", outside / "a.tif"), "regular file"),
    "an image is a directory": ("t1", lambda home, outside: images(home / "t1" / "a.tif"), "regular file"),
    "an image is a fifo": ("t1", lambda home, outside: os.mkfifo(images(home / "t1") / "a.tif"), "regular file"),
}


@pytest.mark.parametrize(("img_dir", "make", "sentence"), NO_IMAGE_DIRECTORIES.values(), ids=NO_IMAGE_DIRECTORIES)
def test_an_image_directory_that_leads_elsewhere_is_refused(
    system: ImagingSystem,
    monkeypatch: pytest.MonkeyPatch,
    img_dir: str,
    make: Callable[[Path, Path], object],
    sentence: str,
) -> None:
    monkeypatch.chdir(system.directory)
    outside = images(system.root / "aretha" / "t1", "a.tif", "b.tif")
    make(system.directory, outside)
    with pytest.raises(InvalidEventFile, match=sentence) as refused:
        system.check_images(announce(system, img_dir=img_dir))
    str(refused.value).encode()


def test_the_directory_of_the_event_files_is_no_image_directory_by_another_name_either(system: ImagingSystem) -> None:
    """As on a share that takes Events and events for one."""
    events, other = images(system.directory / "events", "a.tif", "b.tif"), system.directory / "Events"
    other.mkdir()
    if subprocess.run(["mount", "--bind", str(events), str(other)], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(InvalidEventFile, match="is the directory of the event files"):
            system.check_images(announce(system, img_dir="Events"))
    finally:
        subprocess.run(["umount", "-l", str(other)], capture_output=True, check=False)


def test_a_system_that_is_away_is_not_its_events_fault(system: ImagingSystem) -> None:
    event = announce(system, img_dir="t1")
    images(system.directory / "t1", "a.tif", "b.tif")
    (system.directory / "events").rename(system.directory / "elsewhere")
    with pytest.raises(SystemAway, match="is the share of prince mounted"):
        system.check_images(event)


def test_a_root_behind_a_link_is_fine(system: ImagingSystem, tmp_path: Path) -> None:
    event = announce(system)
    images(system.directory / "t1", "a.tif", "b.tif")
    (tmp_path / "mount").symlink_to(tmp_path)
    moved = ImagingSystem(name="prince", root=tmp_path / "mount")
    assert moved.check_images(event) == tmp_path / "mount" / "prince" / "t1"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory that another user can't read")
@pytest.mark.parametrize("closed", ["t1", "t1/Img"])
def test_a_closed_directory_is_refused_until_it_is_opened(system: ImagingSystem, closed: str) -> None:
    event = announce(system)
    images(system.directory / "t1" / "Img", "a.tif", "b.tif")
    (system.directory / closed).chmod(0)
    with as_nobody(system.directory):
        with pytest.raises(InvalidEventFile, match="Permission denied"):
            system.check_images(event)
        seen = system.fingerprint("events/1.json", "t1")
    (system.directory / closed).chmod(0o755)
    with as_nobody(system.directory):
        assert system.fingerprint("events/1.json", "t1") != seen
        system.check_images(event)


# --- fingerprints

CHANGES: dict[str, Callable[[Path], object]] = {
    "event file rewritten": lambda home: (home / "events/1.json").write_text("{}"),
    "event file of the same size and time": lambda home: replaced(home / "events/1.json"),
    "event file made readable": lambda home: (home / "events/1.json").chmod(0o604),
    "image added": lambda home: images(home / "t1", "c.tif"),
    "image removed": lambda home: (home / "t1" / "a.tif").unlink(),
    "image renamed": lambda home: (home / "t1" / "a.tif").rename(home / "t1" / "z.tif"),
    "Img added": lambda home: images(home / "t1" / "Img"),
    "image directory gone": lambda home: shutil.rmtree(home / "t1"),
    "image directory replaced": lambda home: (home / "t1").rename(home / "t2") and images(home / "t1"),
}


def replaced(path: Path) -> None:
    before = path.stat()
    copy = path.with_suffix(".new")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.replace(path)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_that_may_matter_changes_the_fingerprint(
    system: ImagingSystem, change: Callable[[Path], object]
) -> None:
    announce(system)
    images(system.directory / "t1", "a.tif", "b.tif")
    before = system.fingerprint("events/1.json", "t1")
    assert system.fingerprint("events/1.json", "t1") == before
    change(system.directory)
    assert system.fingerprint("events/1.json", "t1") != before


def test_the_fingerprint_of_a_missing_directory_changes_when_it_comes(system: ImagingSystem) -> None:
    announce(system)
    before = system.fingerprint("events/1.json", "t1")
    images(system.directory / "t1")
    assert system.fingerprint("events/1.json", "t1") != before


def test_the_fingerprint_of_a_vanished_event_file_says_so(system: ImagingSystem) -> None:
    with pytest.raises(FileNotFoundError):
        system.fingerprint("events/1.json", "t1")
