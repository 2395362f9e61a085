"""All that a share may hold, before a real event-ingester with real flow runs: each file has its one, exact outcome."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest

from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.messages import Ingested, Rejected
from blocks.settings import Settings
from flows import system_watch
from flows.watch import event_ingester
from tests.events import document
from tests.images import tiff
from tests.working import said, until, working

pytest_plugins = ["tests.prefect_server"]
pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

TAKEN_IN = ""
DEADLINE_SECONDS = 4.0


@pytest.fixture
def share(run_settings: Settings, tmp_path: Path) -> Iterator["Share"]:
    """The directory of a system, on a disk of its own that can be unmounted."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("a disk of its own needs root, and mkfs.ext4")
    place = cast(Path, run_settings.data_dir) / "prince"
    place.mkdir(parents=True)
    share = Share(place, tmp_path / "disk")
    with share.image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(share.image)], check=True)
    share.mount()
    (place / "events").mkdir()
    yield share
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


class Share:
    """A disk that comes and goes, and what a microscope does there."""

    def __init__(self, home: Path, image: Path) -> None:
        self.home = home
        self.image = image

    def mount(self) -> None:
        if subprocess.run(["mount", "-o", "loop", str(self.image), str(self.home)], capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.home)], capture_output=True, check=True)

    def images(self, directory: str, count: int = 2) -> Path:
        """Images in a directory; where they are."""
        place = self.home / directory / "Img"
        place.mkdir(parents=True)
        for number in range(count):
            (place / f"{number}.tif").write_bytes(tiff(os.urandom(500)))
        return place

    def event(self, **fields: Any) -> str:
        """The content of an event file whose images are there, if it does not name a directory."""
        if "img_dir" not in fields:
            fields["img_dir"] = f"t-{uuid4().hex}"
            self.images(fields["img_dir"])
        return json.dumps(document(**fields))

    def drop(self, name: str, content: str | bytes | None = None, **fields: Any) -> Path:
        path = self.home / "events" / name
        content = self.event(**fields) if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


def _linked(share: Share) -> dict[str, Any]:
    share.images("real")
    (share.home / "link").symlink_to("real")
    return {"img_dir": "link"}


def _linked_image(share: Share) -> dict[str, Any]:
    place = share.images("with a link")
    (place / "1.tif").unlink()
    (place / "1.tif").symlink_to("/etc/hostname")
    return {"img_dir": "with a link"}


def _images(share: Share, directory: str, change: Callable[[Path], object], count: int = 2) -> dict[str, Any]:
    change(share.images(directory, count))
    return {"img_dir": directory}


# What is announced, and with which words it is refused.
EVENTS: dict[str, tuple[Callable[[Share], dict[str, Any]], str]] = {
    "sound": (lambda share: {}, TAKEN_IN),
    "a \n'$(x)": (lambda share: {}, TAKEN_IN),
    "Zo\u00eb": (lambda share: {}, TAKEN_IN),
    "Zoe\u0308": (lambda share: {}, TAKEN_IN),
    "odd fields": (lambda share: {"x": {"$ref": "{{ 1 }}"}, "metadata": {"\0": [None, "\u2028"]}}, TAKEN_IN),
    "directory up": (lambda share: {"img_dir": "../aretha/t1"}, "must be a relative path"),
    "directory is a link": (_linked, "leads through a symbolic link"),
    "directory of events": (
        lambda share: {"img_dir": "events"},
        "img_dir: Value error, must not be inside the directory of the event files",
    ),
    "directory missing": (lambda share: {"img_dir": "nowhere"}, "can't be read: No such file"),
    "image is a link": (_linked_image, "'1.tif' is not a regular file"),
    "image is a device": (
        lambda share: _images(share, "device", lambda place: os.mknod(place / "2.tif", 0o20666, os.makedev(1, 5))),
        "'2.tif' is not a regular file",
    ),
    "too few": (
        lambda share: _images(share, "few", lambda place: (place / "1.tif").unlink()),
        "1 of 2 images are in few",
    ),
    "too many": (
        lambda share: _images(share, "many", lambda place: (place / "2.tif").write_bytes(tiff())),
        "it announces 2 images, but 3 are in many",
    ),
    "zero bytes": (
        lambda share: _images(share, "zero", lambda place: (place / "1.tif").write_bytes(b"")),
        "Img/1.tif is empty",
    ),
    "cut off": (
        lambda share: _images(share, "cut", lambda place: os.truncate(place / "1.tif", 100)),
        "Img/1.tif has 100 bytes, but its header says 538",
    ),
    "negative count": (lambda share: {"img_count": -2}, "img_count: Input should be greater than or equal to 1"),
    "year 1": (lambda share: {"timestamp": "0001-01-01T00:00:00"}, "year must be from 1970 to 2999"),
}

# What stands in the file instead of an event.
CONTENTS: dict[str, tuple[bytes, str]] = {
    "half": (b'{"timestep_id": "0f3a', "not valid JSON"),
    "10 MB": (b'{"x": "' + b"x" * 10_000_000 + b'"}', "more than 131072 bytes"),
    "deep": (b"[" * 60_000, "nested too deeply"),
    "NaN": (b'{"x": NaN}', "NaN is not JSON"),
    "a field twice": (b'{"x": 1, "x": 2}', "field 'x' stands there twice"),
}

# What stands in the place of the file.
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (Path.mkdir, "not a regular file"),
    "a fifo": (os.mkfifo, "not a regular file"),
    "a device": (lambda path: os.mknod(path, 0o20666, os.makedev(1, 5)), "not a regular file"),
    "a link": (lambda path: path.symlink_to("sound.json"), "can't be opened"),
}

LATE = "images that come later.json"
LEFT_ALONE = (".hidden.json", "notes.txt", "part.json.tmp")


def test_each_event_file_has_its_one_outcome(
    share: Share, run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 1.0)
    ImagingSystem(settle_seconds=1.0, image_deadline_seconds=DEADLINE_SECONDS).save("prince", overwrite=True)
    expected: dict[str, str] = {}
    for name, (make, outcome) in EVENTS.items():
        share.drop(f"{name}.json", **make(share))
        expected[f"{name}.json"] = outcome
    for name, (content, outcome) in CONTENTS.items():
        share.drop(f"{name}.json", content)
        expected[f"{name}.json"] = outcome
    for name, (put, outcome) in PLACES.items():
        put(share.home / "events" / f"{name}.json")
        expected[f"{name}.json"] = outcome
    for name in LEFT_ALONE:
        share.drop(name)
    # The same timestep in another file, and another one under its id.
    sound = json.loads((share.home / "events" / "sound.json").read_text())
    conflict = share.drop("other under the same id.json", json.dumps(sound | {"position": 8}))

    async def test() -> None:
        async with working(event_ingester, settings=run_settings):
            await come_while_it_is_watched(share, tmp_path, expected)
            await until(lambda: set(outcomes(event_log)) >= {*expected, conflict.name}, "an outcome for each")
            share.unmount()
            (share.home / "events").mkdir()
            share.drop("beneath.json", "{")
            await asyncio.sleep(1.5)  # a rescan of what lies beneath
            (share.home / "events" / "beneath.json").unlink()
            share.mount()
            share.drop("after it was away.json")
            expected["after it was away.json"] = TAKEN_IN
            await until(lambda: "after it was away.json" in outcomes(event_log), "taking it in")
        share.drop("downtime.json")
        (share.home / "events" / "odd fields.json").rename(share.home / "events" / "known by another name.json")
        expected["downtime.json"] = TAKEN_IN
        async with working(event_ingester, settings=run_settings):
            await until(lambda: "downtime.json" in outcomes(event_log), "taking it in")
            await asyncio.sleep(2.5)  # rescans

    asyncio.run(test())
    found = outcomes(event_log)
    beneath = found.pop("beneath.json", [])
    assert len(beneath) <= 1
    # Of two that claim one id, the first that is looked at has it.
    claims = {name: found.pop(name) for name in ("sound.json", conflict.name)}
    del expected["sound.json"]
    assert sorted(map(len, claims.values())) == [1, 1]
    assert sum(reasons == [TAKEN_IN] for reasons in claims.values()) == 1
    assert sum("was announced before with other content" in reasons[0] for reasons in claims.values()) == 1
    # Rejected before they came, if it was looked at by then.
    assert found.pop(LATE)[-1] == expected.pop(LATE)
    assert {name: len(reasons) for name, reasons in found.items()} == dict.fromkeys(expected, 1)
    for name, outcome in expected.items():
        assert (outcome in found[name][0]) if outcome else (found[name][0] == TAKEN_IN), (name, found[name])


async def come_while_it_is_watched(share: Share, tmp_path: Path, expected: dict[str, str]) -> None:
    """Files that are renamed, written slowly, overwritten, left half-way; images that come later, or grow."""
    events = share.home / "events"
    share.drop(".renamed.part").rename(events / "renamed.json")
    (tmp_path / "other").write_text(share.event())
    shutil.move(tmp_path / "other", events / "moved in.json")
    late = share.drop(LATE, img_dir="late")
    growing = share.images("growing")
    image = (growing / "1.tif").read_bytes()
    (growing / "1.tif").write_bytes(image[:100])
    share.drop("images that grow.json", img_dir="growing")
    path = events / "left half-way.json"
    write = f"import os; f = open({str(path)!r}, 'w'); f.write('{{'); f.flush(); os.kill(os.getpid(), 9)"
    writer = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", write], check=False)
    assert writer.returncode == -signal.SIGKILL
    content = share.event()
    with (events / "written slowly.json").open("w") as slow, (growing / "1.tif").open("ab") as file:
        for number in range(5):
            slow.write(content[number * len(content) // 5 : (number + 1) * len(content) // 5])
            slow.flush()
            file.write(image[100 + number * 80 : 100 + (number + 1) * 80])
            file.flush()
            await asyncio.sleep(0.5)
        file.write(image[500:])
    share.images("late")
    share.drop("overwritten.json", "{")
    await asyncio.sleep(0.3)
    share.drop("overwritten.json")
    names = (
        late.name,
        "renamed.json",
        "moved in.json",
        "images that grow.json",
        "written slowly.json",
        "overwritten.json",
    )
    expected |= dict.fromkeys(names, TAKEN_IN) | {path.name: "not valid JSON"}


def outcomes(log: EventLog) -> dict[str, list[str]]:
    """What became of each event file: the reasons for which it was rejected, or nothing for having been taken in."""
    found: dict[str, list[str]] = {}
    for one in said(log, Ingested, Rejected):
        reason = one.reason if isinstance(one, Rejected) else TAKEN_IN
        found.setdefault(one.event_file.removeprefix("events/"), []).append(reason)
    return found
