"""A demonstration must not pass when an image is lost or altered."""

import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from blocks.bundle import Bundle
from blocks.object_store import ObjectStore
from flows.stack.demo import Lost, verify
from flows.stack.mock_microscope import Dropped, Plan, drop_timestep, drop_timesteps

ROOT = Path(__file__).parent.parent
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture
def dropped(tmp_path: Path) -> Dropped:
    return drop_timestep(tmp_path, "prince", images=3, image_bytes=20_000, timestamp=NOON)


def store(object_store: ObjectStore, dropped: Dropped, key: str = "images/demo.tar") -> str:
    object_store.upload(Bundle.of(dropped.image_dir, b"{}"), key, dropped.timestep_id)
    return object_store.presigned_url(key)


def test_an_object_with_every_image_is_accepted(object_store: ObjectStore, dropped: Dropped) -> None:
    verify(store(object_store, dropped), dropped)


def remove_one(image: Path) -> None:
    image.unlink()


def flip_a_bit(image: Path) -> None:
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)


@pytest.mark.parametrize("harm", [remove_one, flip_a_bit])
def test_a_lost_or_altered_image_is_noticed(
    object_store: ObjectStore, dropped: Dropped, harm: Callable[[Path], None]
) -> None:
    image = next(dropped.image_dir.rglob("*.tif"))
    original = image.read_bytes()
    harm(image)
    url = store(object_store, dropped)
    image.write_bytes(original)
    with pytest.raises(Lost, match=image.name):
        verify(url, dropped)


def test_an_object_that_differs_from_its_manifest_is_noticed(object_store: ObjectStore, dropped: Dropped) -> None:
    store(object_store, dropped)
    content = b"".join(object_store.read_range("images/demo.tar", 0, object_store.head("images/demo.tar").size))  # type: ignore[union-attr]
    image = next(dropped.image_dir.rglob("*.tif")).read_bytes()
    at = content.index(image) + len(image) // 2
    altered = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    object_store.client.put_object(Bucket=object_store.bucket_name, Key="images/altered.tar", Body=altered)
    with pytest.raises(Lost, match="manifest"):
        verify(object_store.presigned_url("images/altered.tar"), dropped)


def test_the_mock_drops_what_a_microscope_would(tmp_path: Path) -> None:
    plan = Plan(["prince", "aretha"], timesteps=3, images=4, image_bytes=900)
    drops = list(drop_timesteps(tmp_path, plan))
    assert [dropped.system for dropped in drops] == ["prince", "aretha", "prince"]
    assert len({UUID(str(dropped.timestep_id)) for dropped in drops}) == 3
    for dropped in drops:
        names = sorted(path.name for path in (dropped.image_dir / "Img").iterdir())
        assert names == [f"Img_r{row:02d}_c{column:02d}.tif" for row in (1, 2) for column in (1, 2)]
        assert sum(path.stat().st_size for path in (dropped.image_dir / "Img").iterdir()) == dropped.bytes


@pytest.mark.soak
def test_the_one_command_of_the_readme_shows_that_every_image_arrives(tmp_path: Path) -> None:
    assert "\n./scripts/demo.sh\n" in (ROOT / "README.md").read_text()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ARCHIVER_", "AWS_", "PREFECT_"))}
    env["ARCHIVER_HOME"] = str(tmp_path / "home")
    done = subprocess.run(ROOT / "scripts" / "demo.sh", env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All 4 timesteps are in object storage, verified, and archived." in done.stdout
