"""`archiver verify`: what is stored against what is recorded, over PostgreSQL and S3."""

import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine

from blocks.bundle import Bundle
from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.messages import Uploaded
from blocks.object_store import ObjectStore
from blocks.settings import Settings, get_settings
from flows.cli import main
from flows.stack.environment import shell_environment
from tests.events import announced, ingested
from tests.gateway import record
from tests.images import make_images

# Several of the chunks in which objects are read.
IMAGES = [2_500_000, 0, 12, 1_000_000]

Verify = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verify(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Verify]:
    """Run the command: its exit code, what it printed, and what it said to the operator."""
    for name, value in shell_environment(settings).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["archiver", "verify", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    get_settings.cache_clear()
    yield run
    get_settings.cache_clear()


@pytest.fixture
def upload(object_store: ObjectStore, engine: Engine, event_log: EventLog, tmp_path: Path) -> Callable[..., Uploaded]:
    """Upload a timestep of 3.5 MB and have it recorded."""

    def upload(event: ImagingEvent, system: str = "prince") -> Uploaded:
        bundle = Bundle.of(make_images(tmp_path / event.timestep_id.hex, IMAGES), b"{}")
        stored = object_store.upload(bundle, event.key, event.timestep_id)
        said = Uploaded(
            timestep_id=event.timestep_id,
            system=system,
            event=event,
            bucket=object_store.bucket_name,
            started_at=datetime.now(UTC),
            **dict(stored),
        )
        record(engine, event_log, said)
        return said

    return upload


def alter(store: ObjectStore, key: str, change: Callable[[bytearray], object]) -> None:
    """Change an object behind the archiver's back."""
    content = bytearray(store.client.get_object(Bucket=store.bucket_name, Key=key)["Body"].read())
    change(content)
    store.client.put_object(Bucket=store.bucket_name, Key=key, Body=bytes(content))


def test_all_is_well(verify: Verify, upload: Callable[..., Uploaded]) -> None:
    one, two = upload(announced()), upload(announced())
    total = f"{(one.size + two.size) / 1e6:.1f} MB"
    assert verify("--all") == (0, f"2 timesteps, {total}: all as recorded.\n", "")


def test_what_differs_is_listed(verify: Verify, upload: Callable[..., Uploaded], object_store: ObjectStore) -> None:
    good, flipped, short, gone = (upload(announced()) for _ in range(4))
    first, *_, last = flipped.images

    def flip(content: bytearray) -> None:
        content[first.offset + 1_500_000] ^= 1

    alter(object_store, flipped.key, flip)
    # Its headers and all other images stay as they are.
    alter(object_store, short.key, lambda content: content.__delitem__(slice(last.offset + 10, None)))
    object_store.client.delete_object(Bucket=object_store.bucket_name, Key=gone.key)

    code, printed, _ = verify("--all")

    assert code == 1
    for timestep in (flipped, short, gone):
        assert str(timestep.timestep_id) in printed
    assert good.key not in printed
    assert f"{first.name} has the SHA-256" in printed
    assert f"{last.name} is missing: the object ends at byte {last.offset + 10}" in printed
    assert f"there is no {gone.key}" in printed
    assert printed.endswith("3 differ.\n")
    assert printed.count(".tif") == 2


def test_a_byte_outside_the_images_counts_too(
    verify: Verify, upload: Callable[..., Uploaded], object_store: ObjectStore
) -> None:
    timestep = upload(announced())
    alter(object_store, timestep.key, lambda content: content.extend(b"more"))
    code, printed, _ = verify(str(timestep.timestep_id))
    assert code == 1
    assert f"stored is {timestep.sha256}" in printed


def test_only_what_is_named_is_read(
    verify: Verify, upload: Callable[..., Uploaded], object_store: ObjectStore, engine: Engine, event_log: EventLog
) -> None:
    one = upload(announced(experiment_id="one"))
    other = upload(announced(experiment_id="other"), "aretha")
    announcement = ingested(announced(experiment_id="one"))
    record(engine, event_log, announcement)
    object_store.client.delete_object(Bucket=object_store.bucket_name, Key=other.key)

    assert verify("--experiment", "one")[0] == 0
    assert verify("--system", "prince")[0] == 0
    assert verify(str(one.timestep_id))[0] == 0
    for arguments in (
        ["--experiment", "other"],
        ["--system", "aretha"],
        [str(one.timestep_id), str(other.timestep_id)],
    ):
        code, printed, _ = verify(*arguments)
        assert (code, other.key in printed, one.key in printed) == (1, True, False)
    code, printed, _ = verify(str(announcement.timestep_id))
    assert code == 1
    assert "not uploaded: its state is ingested" in printed


def test_misuse_is_told_apart_from_damage(verify: Verify, object_store: ObjectStore) -> None:
    unknown = str(uuid4())
    for arguments, complaint in (
        ([], "name timesteps"),
        ([unknown, "--all"], "name timesteps"),
        (["--system", "prince", "--all"], "name timesteps"),
        (["not-an-id"], "Invalid value"),
        ([unknown], f"no timestep has the id {unknown}"),
        (["--experiment", "typo", "--system", "prince"], "of experiment typo and system prince"),
        (["--all"], "no timestep is uploaded"),
    ):
        code, printed, said = verify(*arguments)
        assert (code, printed) == (2, "")
        assert complaint in said


def test_a_store_that_cannot_be_used_is_not_taken_for_damage(
    verify: Verify, upload: Callable[..., Uploaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(announced())
    monkeypatch.setenv("ARCHIVER_BUCKET", "another-bucket")
    code, printed, said = verify("--all")
    assert (code, printed) == (2, "")
    assert "another-bucket" in said
