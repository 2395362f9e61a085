"""Which images of a timestep are there, which are missing, and what is wrong with them."""

import asyncio
import random
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.event_file import InvalidEventFile
from blocks.image_survey import missing_names, surplus_names
from blocks.imaging_system import ImagesMissing, ImagingSystem
from flows import ingest
from flows.ingest import find_images
from flows.looks import take_look
from tests.events import announced
from tests.images import tiff

GRID = [f"Img/Img_r{row:02}_c{column:02}.tif" for row in range(1, 4) for column in range(1, 6)]


@pytest.fixture
def system(tmp_path: Path) -> ImagingSystem:
    (tmp_path / "prince" / "events").mkdir(parents=True)
    (tmp_path / "prince" / "t1" / "Img").mkdir(parents=True)
    return ImagingSystem(name="prince", root=tmp_path)


def put(system: ImagingSystem, content: bytes, *names: str) -> None:
    for name in names:
        (system.directory / "t1" / name).write_bytes(content)


def judged(system: ImagingSystem, count: int = len(GRID), *, in_time: bool = False) -> list[str]:
    return system.judge(system.survey(announced(img_count=count, img_dir="t1")), in_time=in_time)


def test_a_complete_timestep_is_taken_as_it_is(system: ImagingSystem) -> None:
    put(system, tiff(), *GRID)
    assert judged(system, in_time=True) == []


def test_what_is_missing_is_waited_for_and_then_named(system: ImagingSystem) -> None:
    put(system, tiff(), *set(GRID) - {GRID[1], GRID[7]})
    sentence = f"13 of 15 images are in t1; missing: {GRID[1]}, {GRID[7]}"
    with pytest.raises(ImagesMissing, match=sentence):
        judged(system, in_time=True)
    with pytest.raises(InvalidEventFile, match=sentence):
        judged(system)
    # Whatever the policy: nobody gets a timestep with fewer images than were announced.
    with pytest.raises(InvalidEventFile, match=sentence):
        judged(system.model_copy(update={"strictness": "accept"}))


def test_damaged_images_are_waited_for_named_and_accepted_only_by_policy(system: ImagingSystem) -> None:
    put(system, tiff(), *GRID)
    put(system, b"", GRID[0])
    put(system, tiff(bytes(100))[:-1], GRID[1])
    put(system, b"nothing", GRID[2])
    sentence = f"{GRID[0]} is empty, {GRID[1]} has 137 bytes, but its header says 138, {GRID[2]} is no TIFF"
    with pytest.raises(ImagesMissing, match=sentence):
        judged(system, in_time=True)
    with pytest.raises(InvalidEventFile, match=sentence):
        judged(system)
    assert judged(system.model_copy(update={"strictness": "accept"})) == [sentence]


def test_more_images_than_announced_are_refused_or_accepted_by_policy(system: ImagingSystem) -> None:
    put(system, tiff(), *GRID)
    # Of a grid, nobody can tell which are too many.
    sentence = f"it announces 14 images, but 15 are in t1; there: {', '.join(GRID)}"
    with pytest.raises(InvalidEventFile, match=sentence):
        judged(system, count=14, in_time=True)
    assert judged(system.model_copy(update={"strictness": "accept"}), count=14) == [sentence]


def test_a_rejection_names_all_that_is_missing_and_the_message_of_a_state_some(system: ImagingSystem) -> None:
    put(system, tiff(), *(f"{number:04}.tif" for number in range(700)))
    with pytest.raises(ImagesMissing) as waiting:
        judged(system, 1400, in_time=True)
    with pytest.raises(InvalidEventFile) as rejected:
        judged(system, 1400)
    assert str(waiting.value).endswith("0798.tif, 0799.tif, and 600 more")
    assert str(rejected.value).endswith("1398.tif, 1399.tif")
    with pytest.raises(InvalidEventFile, match=r", and \d+ more$") as rejected:
        judged(system, 9000)
    assert 30_000 < len(str(rejected.value)) < 33_000


@pytest.mark.parametrize(
    ("found", "count", "more"),
    [
        (["1.tif", "2.tif", "3.tif", "4.tif"], 2, ["3.tif", "4.tif"]),
        (["0.tif", "1.tif", "2.tif"], 2, ["2.tif"]),
        (["7.tif", "8.tif", "9.tif"], 2, []),
        (["1.tif", "2.tif", "thumb.tif"], 2, ["thumb.tif"]),
        (["Img/1.tif", "Img/2.tif", "old.tif", "older.tif"], 3, []),
        ([*GRID, "Img/Img_r01_c01 copy.tif"], len(GRID), ["Img/Img_r01_c01 copy.tif"]),
    ],
)
def test_what_is_too_many_is_named_where_it_can_be_told(found: list[str], count: int, more: list[str]) -> None:
    assert surplus_names(found, count) == more


def test_a_change_of_an_image_is_a_change_of_the_fingerprint(system: ImagingSystem) -> None:
    (system.directory / "events" / "1.json").write_text("{}")
    put(system, tiff(bytes(100))[:-1], *GRID)
    before = system.fingerprint("events/1.json", "t1", content=True)
    assert system.is_as(before, "events/1.json")
    with (system.directory / "t1" / GRID[3]).open("ab") as image:
        image.write(b"!")
    assert not system.is_as(before, "events/1.json")


@given(
    rows=st.integers(2, 12),
    columns=st.integers(2, 12),
    start=st.integers(0, 1),
    width=st.integers(1, 3),
    seed=st.integers(),
    data=st.data(),
)
def test_what_is_missing_of_a_grid_is_known_exactly(
    rows: int, columns: int, start: int, width: int, seed: int, data: st.DataObject
) -> None:
    names = [
        f"Img/p4_r{row:0{width}}_c{column:0{width}}.tif"
        for row in range(start, start + rows)
        for column in range(start, start + columns)
    ]
    gone = set(random.Random(seed).sample(names, data.draw(st.integers(1, len(names) - 1))))
    told = missing_names([name for name in names if name not in gone], len(names))
    assert told == [] or set(told) == gone
    corners = {names[0], names[-1]}
    if width == 3 and not gone & corners:
        assert set(told) == gone


@pytest.mark.parametrize(
    ("found", "count", "missing"),
    [
        (["1.tif", "3.tif"], 4, ["2.tif", "4.tif"]),
        (["img_008.tif", "img_010.tif"], 3, ["img_009.tif"]),
        (["img_008.tif", "img_010.tif"], 5, []),
        (["a.tif"], 2, []),
        (["a1.tif", "b2.tif"], 3, []),
        ([], 3, []),
        (["1.tif", "99999999999.tif"], 3, []),
        (["1.tif", "2.tif"], 2**31 - 1, []),
    ],
)
def test_what_is_missing_of_numbered_names(found: list[str], count: int, missing: list[str]) -> None:
    assert missing_names(found, count) == missing


@pytest.mark.parametrize("changed", ["never", "before the run", "during its pause"])
def test_a_look_that_was_taken_before_the_run_makes_its_pause_shorter(
    system: ImagingSystem, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    put(system, tiff(), *GRID)
    event = announced(img_count=len(GRID), img_dir="t1")
    clock = [1000.0]
    pauses: list[float] = []

    async def meanwhile(seconds: float) -> None:
        pauses.append(round(seconds, 3))
        if changed == "during its pause":
            put(system, tiff(b"others"), GRID[3])

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(asyncio, "sleep", meanwhile)
    take_look(system, event)
    clock[0] += 0.15
    if changed == "before the run":
        put(system, tiff(b"others"), GRID[3])
    with pytest.raises(ImagesMissing, match="still being written") if changed == "during its pause" else nullcontext():
        asyncio.run(find_images(system, event, in_time=True))
    assert pauses == [0.2 if changed == "before the run" else 0.05]
    # It counts for one run only.
    pauses.clear()
    with suppress(ImagesMissing):
        asyncio.run(find_images(system, event, in_time=True))
    assert pauses == [0.2]


@pytest.mark.parametrize("clock", [0.0, 3600.0, -3600.0])
def test_images_that_are_being_written_are_noticed_whatever_the_clock_of_their_server_says(
    system: ImagingSystem, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    put(system, tiff(), *GRID)
    event = announced(img_count=len(GRID), img_dir="t1")
    now, sleep, looks = time.time, asyncio.sleep, iter((True, False))

    async def meanwhile(seconds: float) -> None:
        await sleep(0)
        if next(looks):  # a writer who has made room for the whole file before
            put(system, tiff(b"others"), GRID[3])

    monkeypatch.setattr(time, "time", lambda: now() + clock)
    monkeypatch.setattr(asyncio, "sleep", meanwhile)
    with pytest.raises(ImagesMissing, match="images in t1 are still being written"):
        asyncio.run(find_images(system, event, in_time=True))
    assert asyncio.run(find_images(system, event, in_time=True)) == []
    # A backlog of old ones is looked at once.
    monkeypatch.setattr(time, "time", lambda: now() + 2 * ingest.CLOCKS_DIFFER_SECONDS)
    assert asyncio.run(find_images(system, event, in_time=True)) == []
    assert next(looks, None) is None
