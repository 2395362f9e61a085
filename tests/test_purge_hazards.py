"""What is not proven is not deleted, whoever tampers with object and disk, and whatever is linked or mounted there."""

import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import pytest
from botocore.exceptions import ClientError
from sqlalchemy import delete, update
from sqlmodel import Session, select

from blocks import deletion, mounts, s3_object
from blocks.expiry import ExpiryRules
from blocks.imaging_system import ImagingSystem
from blocks.lease import Lease, LeaseLost
from blocks.messages import Ingested, LogEvent, SourcePurged
from blocks.purge_proof import Proven, prove_files
from blocks.purgeable import PurgeableTimesteps
from blocks.source_file import SourceFile, find_sources, settled_state_of, state_of
from blocks.tables import Timestep, TimestepEvent, TimestepImage
from flows.outcome import reject
from flows.purge import SourcePurge
from flows.reconcile import announcement
from flows.upload import upload
from tests.images import alter
from tests.purging import Lab, image_of, overwrite_object

pytest_plugins = ["tests.purging"]


# --- what stays


def _put(lab: Lab, timestep: Ingested, content: bytes = b"", said: dict[str, str] | None = None) -> None:
    """The object, written anew with something else about it."""
    found = lab.store.client.get_object(Bucket=lab.store.bucket_name, Key=timestep.event.key)
    said = found["Metadata"] if said is None else said and found["Metadata"] | said
    content = content or found["Body"].read()
    lab.store.client.put_object(Bucket=lab.store.bucket_name, Key=timestep.event.key, Body=content, Metadata=said)


def _delete_version(lab: Lab, timestep: Ingested) -> None:
    """The bucket keeps the bytes, behind a marker that says they are deleted."""
    where: Any = {"Bucket": lab.store.bucket_name}
    lab.store.client.put_bucket_versioning(**where, VersioningConfiguration={"Status": "Enabled"})
    lab.store.client.delete_object(**where, Key=timestep.event.key)


def _set(lab: Lab, **values: Any) -> None:
    with Session(lab.engine) as session, session.begin():
        session.execute(update(Timestep).values(**values))


def _forget_announcement(lab: Lab, _: Ingested) -> None:
    with Session(lab.engine) as session, session.begin():
        session.execute(delete(TimestepEvent).where(TimestepEvent.type == Ingested.type))  # type: ignore[arg-type]


def _forget_images(lab: Lab, _: Ingested) -> None:
    with Session(lab.engine) as session, session.begin():
        session.execute(delete(TimestepImage))


def _show_as(directory: Path, other: Path) -> None:
    """One directory by another name, too: as on a share that takes t1 and T1 for one."""
    other.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "--bind", str(directory), str(other)], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")


def _mount_within(lab: Lab, timestep: Ingested) -> None:
    """Somebody else's directory, which the image directory shows as its own."""
    place = image_of(lab, timestep).parent
    _show_as(place, place)


def _announce_as(lab: Lab, timestep: Ingested, change: Callable[[str], str], below: str = "") -> None:
    """By another event file, with the directory spelled otherwise."""
    other = change(timestep.event.img_dir)
    _show_as(lab.home / timestep.event.img_dir, lab.home / other)
    _announce_again(lab, timestep, f"{other}{below}")


def _announce_above_as(lab: Lab, timestep: Ingested, other: str) -> None:
    above = PurePosixPath(timestep.event.img_dir).parent
    _show_as(lab.home / above, lab.home / other)
    _announce_again(lab, timestep, other)


def _drop_as(lab: Lab, timestep: Ingested) -> None:
    other = timestep.event.img_dir.upper()
    _show_as(lab.home / timestep.event.img_dir, lab.home / other)
    _drop_in(lab, other)


def _punch(image: Path) -> None:
    """The file keeps its size, but its end was never written."""
    before = image.stat()
    os.truncate(image, before.st_size - 500)
    os.truncate(image, before.st_size)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(image: Path) -> None:
    before = image.stat()
    other = image.with_name("other")
    other.write_bytes(os.urandom(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(image)


def _remove_all(lab: Lab, timestep: Ingested) -> None:
    shutil.rmtree(lab.home / timestep.event.img_dir)
    (lab.home / timestep.event_file).unlink()


def _link_above(lab: Lab, timestep: Ingested) -> None:
    above = (lab.home / timestep.event.img_dir).parent
    above.rename(lab.home / "elsewhere")
    above.symlink_to("elsewhere")


def _link_away(lab: Lab, timestep: Ingested) -> None:
    directory = lab.home / timestep.event.img_dir
    directory.rename(lab.home / "elsewhere")
    directory.symlink_to(lab.home / "elsewhere")


def _link_image(lab: Lab, image: Path) -> None:
    image.rename(lab.home / "moved")
    image.symlink_to(lab.home / "moved")


def _drop_in(lab: Lab, img_dir: str) -> None:
    lab.drop(img_dir=img_dir)
    lab.record()


def _announce_again(lab: Lab, timestep: Ingested, img_dir: str = "") -> None:
    event = json.loads((lab.home / timestep.event_file).read_text())
    event |= {"timestep_id": str(uuid4()), "img_dir": img_dir or timestep.event.img_dir}
    (lab.home / "events" / "another.json").write_text(json.dumps(event))


def _announce_with(lab: Lab, content: str) -> None:
    (lab.home / "events" / "another.json").write_text(content)


def _announce_anew(lab: Lab, timestep: Ingested) -> None:
    """By a file that was taken in as something else before."""
    lab.drop(name="another")
    _announce_again(lab, timestep)


def _announce_in_vain(lab: Lab, timestep: Ingested) -> None:
    """By a file that was rejected, and is read again as soon as somebody asks for it."""
    _announce_again(lab, timestep)
    seen = lab.system.fingerprint("events/another.json")
    reject(lab.system, "events/another.json", None, "it rained", seen, lab.log)


def _rebuild(lab: Lab, timestep: Ingested) -> None:
    """As if the database had been lost, and the timestep had been announced again since."""
    with Session(lab.engine) as session, session.begin():
        session.execute(update(Timestep).values(sha256=None))


STAYS: dict[str, tuple[Callable[[Lab, Ingested], object], str]] = {
    "no object": (
        lambda lab, it: lab.store.client.delete_object(Bucket=lab.store.bucket_name, Key=it.event.key),
        "is gone from the bucket",
    ),
    "another object": (overwrite_object, "ETag is"),
    "an object that is shorter": (lambda lab, it: _put(lab, it, content=b"short"), "size is 5, was"),
    "an object of another timestep": (
        lambda lab, it: _put(lab, it, said={"timestep-id": str(uuid4())}),
        "timestep-id is",
    ),
    "an object laid out otherwise": (
        lambda lab, it: _put(lab, it, said={"layout-digest": "0" * 64}),
        "layout-digest is",
    ),
    "an object without metadata": (lambda lab, it: _put(lab, it, said={}), "timestep-id is None"),
    "a versioned object that was deleted": (_delete_version, "is gone from the bucket"),
    "another bucket recorded": (lambda lab, it: _set(lab, bucket=f"{lab.store.bucket_name}-old"), "bucket"),
    "an upload without a proof": (lambda lab, it: _set(lab, checks=[]), "was not proven"),
    "a history without its event file": (_forget_announcement, "does not tell its event file"),
    "images that are not known": (_forget_images, "not known what is in its object"),
    "a file system mounted in it": (lambda lab, it: _mount_within(lab, it), "something is mounted at"),
    "image cut off": (lambda lab, it: os.truncate(image_of(lab, it), 1000), "has 1000 bytes, uploaded were"),
    "image with a hole": (lambda lab, it: _punch(image_of(lab, it)), "another content"),
    "image replaced by one of the same times": (lambda lab, it: _replace(image_of(lab, it)), "another content"),
    "all of it gone already": (_remove_all, "not by a purge of ours"),
    "its Img is a link": (lambda lab, it: _link_image(lab, image_of(lab, it).parent), "a symbolic link"),
    "a directory above is a link": (lambda lab, it: _link_above(lab, it), "symbolic link"),
    "event file is a link": (lambda lab, it: _link_image(lab, lab.home / it.event_file), "not the event file any more"),
    "image altered in place": (lambda lab, it: alter(image_of(lab, it)), "another content"),
    "image of another size": (lambda lab, it: image_of(lab, it).write_bytes(b"short"), "has 5 bytes, uploaded were"),
    "a file more": (lambda lab, it: (image_of(lab, it).parent / "notes.txt").touch(), "holds what was not uploaded"),
    "an image is a link": (
        lambda lab, it: _link_image(lab, image_of(lab, it)),
        "a symbolic link",
    ),
    "its directory is a link": (_link_away, "symbolic link"),
    "event file rewritten": (
        lambda lab, it: (lab.home / it.event_file).write_text("{}"),
        "is not the event file any more",
    ),
    "event file of another timestep": (
        lambda lab, it: (lab.home / lab.drop(name="later").event_file).rename(lab.home / it.event_file),
        "announces something else by now",
    ),
    "announced by another file": (_announce_again, "events/another.json announces"),
    "announced above by another file": (
        lambda lab, it: _announce_again(lab, it, "20261101_004"),
        "events/another.json announces",
    ),
    "announced below by another file": (
        lambda lab, it: _announce_again(lab, it, f"{it.event.img_dir}/Img"),
        "events/another.json announces",
    ),
    "announced by a file that said something else": (_announce_anew, "events/another.json announces"),
    "announced by a rejected file": (_announce_in_vain, "events/another.json announces"),
    "announced by a file with a wrong field": (
        lambda lab, it: _announce_with(lab, f'{{"img_count": -2, "img_dir": "./{it.event.img_dir}/"}}'),
        "events/another.json announces",
    ),
    "announced by a file that names two": (
        lambda lab, it: _announce_with(lab, f'{{"path": "{it.event.img_dir}", "path": "t2"}}'),
        "events/another.json announces",
    ),
    "announced by a file half-written": (
        lambda lab, it: _announce_with(lab, f'{{"img_dir" : "{it.event.img_dir}", "img_co'),
        "events/another.json announces",
    ),
    "announced by a file too large": (
        lambda lab, it: _announce_with(lab, f'{{"x": "{"x" * 200_000}", "img_dir": "{it.event.img_dir}"}}'),
        "events/another.json announces",
    ),
    "announced by another case": (
        lambda lab, it: _announce_as(lab, it, str.upper),
        "on this share,",
    ),
    "announced below by another case": (
        lambda lab, it: _announce_as(lab, it, str.upper, "/Img"),
        "on this share,",
    ),
    "announced by another accent": (
        lambda lab, it: _announce_as(lab, it, lambda img_dir: f"{img_dir}\u0301"),
        "on this share,",
    ),
    "announced above with a dot": (
        lambda lab, it: _announce_above_as(lab, it, "20261101_004."),
        "on this share, 20261101_004 is 20261101_004.,",
    ),
    "another timestep by another case": (_drop_as, "on this share,"),
    "another timestep in it": (
        lambda lab, it: _drop_in(lab, f"{it.event.img_dir}/inner"),
        "has its images in",
    ),
    "another timestep above": (lambda lab, it: _drop_in(lab, "20261101_004"), "has its images in"),
    "found in the bucket, and not read": (_rebuild, "not read since"),
    "an upload under way": (
        lambda lab, it: lab.log.redis.set(f"{lab.log.stream}:lease:{it.event.key}", "somebody", ex=60),
        "held by another process",
    ),
}


def _unmount(lab: Lab) -> None:
    for place in mounts.mounts_within(lab.home):
        subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize(("change", "reason"), STAYS.values(), ids=STAYS)
def test_what_is_not_proven_stays_with_its_reason(
    lab: Lab, change: Callable[[Lab, Ingested], object], reason: str
) -> None:
    timestep = lab.arrived()
    change(lab, timestep)
    before = lab.files()
    try:
        (outcome,) = lab.purge()
        assert reason in outcome.kept
        assert str(outcome).endswith(f": kept, {outcome.kept}")
        assert lab.files() == before
    finally:
        _unmount(lab)


@pytest.mark.parametrize("order", [1, -1])
def test_each_event_file_about_a_directory_counts_in_whatever_order_they_are_listed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    timestep = lab.arrived()
    lab.log.register.forget(lab.system.name, timestep.event_file)
    _announce_again(lab, timestep)
    listed = sorted(lab.system.event_files())[::order]
    monkeypatch.setattr(ImagingSystem, "event_files", lambda _: iter(listed))
    (outcome,) = lab.purge()
    assert "events/another.json announces" in outcome.kept


def test_an_event_file_that_we_may_not_read_may_announce_anything(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        lab.arrived()
    before = lab.files()
    _announce_with(lab, "{}")
    os_open = os.open

    def refuse(path: Any, *rest: Any, **options: Any) -> int:
        if str(path).endswith("another.json"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return os_open(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        outcomes = lab.purge()
    assert ["events/another.json may announce its images too" in one.kept for one in outcomes] == [True, True]
    assert {name: content for name, content in lab.files().items() if "another" not in name} == before
    assert [one.kept for one in lab.purge()] == ["", ""]


def test_names_that_are_alike_may_be_of_two_directories(lab: Lab) -> None:
    for img_dir in ("t1", "T1", "both/t2"):
        lab.arrived(img_dir=img_dir)
    try:
        _show_as(lab.home / "both", lab.home / "Both")
        lab.arrived(img_dir="Both/t3")
        assert [outcome.kept for outcome in lab.purge()] == [""] * 4
    finally:
        _unmount(lab)


def test_an_object_that_goes_while_the_files_are_compared_keeps_them(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    timestep = lab.drop()
    copy = lab.stage(timestep)
    lab.upload(timestep)
    before = lab.files()
    for where, do in (("flows.purge", lab.purge), ("flows.purge_staging", lab.purge_staging)):

        def meanwhile(*args: Any) -> Proven:
            overwrite_object(lab, timestep)
            return prove_files(*args)

        monkeypatch.setattr(f"{where}.prove_files", meanwhile)
        (outcome,) = do()
        assert "ETag is" in outcome.kept
        overwrite_object(lab, timestep)
    assert lab.files() == before
    assert len(find_sources(copy)) == 3


def test_times_in_whole_seconds_say_nothing_of_a_change_in_the_same_second() -> None:
    file = SourceFile(Path("a.tif"), 1000, 10**18, 10**18, 1)
    assert settled_state_of({"a.tif": file}) is None
    files = {"a.tif": file, "b.tif": replace(file, ctime_ns=10**18 + 1)}
    assert settled_state_of(files) == state_of(files)


def test_no_clock_decides_whether_a_file_is_still_what_was_uploaded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    timestep = lab.drop()
    time.sleep(1.2)
    lab.upload(timestep)
    alter(image_of(lab, timestep))
    # As if the file server's clock were a day behind: to us, all was written long before the upload.
    _set(lab, upload_started_at=datetime.now(UTC) + timedelta(days=1))
    (outcome,) = lab.purge()
    assert "another content" in outcome.kept


def test_where_policy_says_content_it_is_read_though_nothing_seems_to_have_changed(lab: Lab) -> None:
    timestep = lab.drop()
    time.sleep(1.2)
    lab.upload(timestep)
    # As if a disk had turned a bit, which changes no time.
    with Session(lab.engine) as session, session.begin():
        session.execute(update(TimestepImage).values(sha256="0" * 64))
    (outcome,) = lab.purge(purge_compares="content")
    assert "another content" in outcome.kept
    (outcome,) = lab.purge(purge_compares="state")
    assert outcome.kept == ""


def test_who_lost_the_lease_deletes_nothing_more(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.arrived()
    left = iter(range(2))

    def lost(_: Lease) -> None:
        if next(left, None) is None:
            raise LeaseLost("another process may have it")

    with monkeypatch.context() as patch:
        patch.setattr(Lease, "check", lost)
        (outcome,) = lab.purge()
    assert "another process may have it" in outcome.kept
    assert len(lab.files()) == 2
    (outcome,) = lab.purge()
    assert (outcome.files, outcome.kept) == (4, "")


def test_a_directory_that_becomes_a_link_leads_no_deletion_away(tmp_path: Path) -> None:
    home, outside = tmp_path / "prince", tmp_path / "outside"
    for directory in (home / "t1" / "Img", outside / "Img" / "empty"):
        directory.mkdir(parents=True)
    (home / "t1" / "Img" / "a.tif").write_bytes(b"a")
    files = find_sources(home / "t1")
    # The very same file, by another way.
    (home / "t1" / "Img" / "a.tif").rename(outside / "Img" / "a.tif")
    moved = find_sources(outside)
    (home / "t1" / "Img").rmdir()
    (home / "t1" / "Img").symlink_to(outside / "Img")
    for known in (files, moved):
        with pytest.raises(deletion.NotDeleted, match="through a link"):
            deletion.delete_files(home, "t1", known)
    with pytest.raises(deletion.NotDeleted, match="through a link"):
        deletion.delete_empty_directories(home, "t1", ["Img/empty/b.tif"])
    assert (outside / "Img" / "a.tif").exists()
    assert (outside / "Img" / "empty").exists()


def test_what_was_altered_between_its_copy_and_its_upload_stays(lab: Lab) -> None:
    """The object holds what was copied. The state of the source at the time of the upload proves nothing."""
    timestep, other = lab.drop(), lab.drop()
    time.sleep(1.2)
    for one in (timestep, other):
        lab.stage(one)
    alter(image_of(lab, timestep))
    time.sleep(1.2)
    for one in (timestep, other):
        lab.upload(one)
    kept, gone = sorted(lab.purge(), key=lambda outcome: not outcome.kept)
    assert "another content" in kept.kept
    assert gone.kept == ""
    assert (lab.home / timestep.event_file).exists()
    assert not (lab.home / other.event_file).exists()
    # The source did not have to be read: it is as it was when it was copied.
    with Session(lab.engine) as session:
        (said,) = session.exec(select(TimestepEvent.data).where(TimestepEvent.type == SourcePurged.type)).all()
    assert "all times they had" in said["proof"]["checks"][-1]


def test_where_a_file_system_keeps_no_time_of_change_content_decides(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timestep = lab.drop()
    time.sleep(1.2)
    lab.upload(timestep)
    below = lab.home / PurePosixPath(timestep.event.img_dir).parts[0]
    (tmp_path / "mountinfo").write_text(f"1 0 0:1 / / rw - ext4 - rw\n2 0 0:2 / {below} rw - fuse.sshfs host:/ rw\n")
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")
    (outcome,) = lab.purge()
    assert outcome.kept == ""
    with Session(lab.engine) as session:
        (said,) = session.exec(select(TimestepEvent.data).where(TimestepEvent.type == SourcePurged.type)).all()
    assert "has the SHA-256" in said["proof"]["checks"][-1]


def test_names_of_one_file_go_together_and_names_elsewhere_keep_it(lab: Lab) -> None:
    timestep = lab.drop()
    image = image_of(lab, timestep, 0)
    image_of(lab, timestep, 1).unlink()
    os.link(image, image_of(lab, timestep, 1))
    os.link(image, lab.home / "kept.tif")
    content = image.read_bytes()
    time.sleep(1.2)
    lab.upload(timestep)
    (outcome,) = lab.purge()
    assert outcome.kept == ""
    assert lab.files() == {"kept.tif": content}


def test_two_purges_at_once_delete_each_timestep_once(lab: Lab) -> None:
    for _ in range(4):
        lab.arrived()
    with ThreadPoolExecutor(3) as threads:
        outcomes = [one for said in threads.map(lambda _: lab.purge(run_id=uuid4()), range(3)) for one in said]
    assert lab.files() == {}
    purges = [outcome for outcome in outcomes if not outcome.kept]
    assert len({outcome.title for outcome in purges}) == 1  # all four were taken at the same second
    with Session(lab.engine) as session:
        said = session.exec(select(TimestepEvent.data).where(TimestepEvent.type == SourcePurged.type)).all()
    assert {one["files"] for one in said} == {4}
    assert len({one["timestep_id"] for one in said}) == 4


def test_what_is_not_on_tape_stays_where_policy_says_so(lab: Lab) -> None:
    timestep = lab.drop()
    lab.upload(timestep, archive=False)
    (outcome,) = lab.purge()
    assert "not known to be on tape" in outcome.kept
    (outcome,) = lab.purge(purge_needs_tape=False)
    assert outcome.kept == ""
    assert lab.files() == {}


def test_a_notice_that_may_be_about_the_object_before_this_one_is_no_tape_copy(lab: Lab) -> None:
    timestep = lab.drop()
    sent = upload(timestep, lab.settings, lab.store, lab.log)
    before = sent.model_copy(update={"sha256": "0" * 64, "etag": "another"})
    for said in (before, sent):
        lab.log.append(LogEvent.of(said, "test"))
    lab.archive(timestep)
    lab.record()
    # As an older release may have recorded it, too.
    for archived_at in (None, sent.started_at):
        _set(lab, archived_at=archived_at)
        assert [outcome.kept for outcome in lab.purge(purge_trusts_tags=True)] == ["it is not known to be on tape"]
    _set(lab, archived_at=None)
    lab.log.append(LogEvent.of(announcement(sent.key, timestep.timestep_id, sent.etag), "reconcile-archive"))
    lab.record()
    (outcome,) = lab.purge()
    assert "known from its tag alone" in outcome.kept
    assert [outcome.files for outcome in lab.purge(purge_trusts_tags=True)] == [4]


def _expire(lab: Lab, expiration: dict[str, Any], chosen: dict[str, Any]) -> None:
    rule: Any = {"ID": "old", "Status": "Enabled", "Filter": chosen, "Expiration": expiration}
    lab.store.client.put_bucket_lifecycle_configuration(
        Bucket=lab.store.bucket_name, LifecycleConfiguration={"Rules": [rule]}
    )


def test_what_the_bucket_itself_deletes_soon_stays_until_it_is_on_tape(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    timestep = lab.drop()
    lab.upload(timestep, archive=False)
    images, tagged = {"Prefix": "images/"}, {"Tag": {"Key": "archived", "Value": "true"}}

    def kept(*, do_it: bool = False) -> str:
        return lab.purge(do_it=do_it, purge_needs_tape=False)[0].kept

    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    soon, late = midnight + timedelta(days=2), midnight + timedelta(days=30)
    for expiration, chosen in (({"Days": 10}, images), ({"Days": 1}, tagged), ({"Date": late}, images)):
        _expire(lab, expiration, chosen)
        assert kept() == ""
    _expire(lab, {"Date": soon}, images)
    assert "and the bucket deletes its object in " in kept(do_it=True)
    _expire(lab, {"Days": 10}, images)
    _set(lab, uploaded_at=datetime.now(UTC) - timedelta(days=4))
    assert kept(do_it=True) == "it is not known to be on tape, and the bucket deletes its object in 6 days"
    # It may have been stored long before it was found in the bucket.
    _set(lab, uploaded_at=datetime.now(UTC))
    assert kept() == ""
    real = s3_object.head

    def long_stored(*which: Any) -> s3_object.ObjectHead | None:
        head = real(*which)
        return head and replace(head, modified_at=head.modified_at - timedelta(days=7))

    with monkeypatch.context() as patch:
        patch.setattr(s3_object, "head", long_stored)
        assert kept(do_it=True).endswith("deletes its object in 3 days")
    # With nothing but the tag, it is as good as not on tape; and the tag lets it expire.
    _expire(lab, {"Days": 5}, tagged)
    head = lab.store.head(timestep.event.key)
    assert head is not None
    lab.log.append(LogEvent.of(announcement(head.key, timestep.timestep_id, head.etag), "reconcile-archive"))
    lab.record()
    assert kept(do_it=True).endswith("deletes its object in 5 days")
    lab.archive(timestep)
    lab.record()
    assert kept(do_it=True) == ""


def test_where_it_can_not_be_told_what_the_bucket_deletes_files_stay(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.upload(lab.drop(), archive=False)

    def refusing(code: str) -> Callable[..., object]:
        def refuse(**_bucket: str) -> object:
            raise ClientError({"Error": {"Code": code}}, "GetBucketLifecycleConfiguration")

        return refuse

    for code in ("AccessDenied", "501"):
        monkeypatch.setattr(lab.store.client, "get_bucket_lifecycle_configuration", refusing(code))
        (outcome,) = lab.purge(purge_needs_tape=False)
        assert f"the lifecycle rules of bucket {lab.store.bucket_name} can't be read" in outcome.kept
        assert ExpiryRules(lab.store).read() == []
    # Who knows no such rules has none.
    monkeypatch.setattr(lab.store.client, "get_bucket_lifecycle_configuration", refusing("NotImplemented"))
    (outcome,) = lab.purge(purge_needs_tape=False)
    assert outcome.kept == ""


def test_an_event_file_that_comes_during_a_long_pass_counts(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.claims._REMEMBER_SECONDS", -1.0)
    timesteps = [lab.arrived() for _ in range(2)]
    system = lab.system
    outcomes = SourcePurge(system, PurgeableTimesteps(lab.engine), lab.store, lab.log, do_it=True).run()
    assert next(outcomes).kept == ""
    (left,) = [one for one in timesteps if (lab.home / one.event.img_dir).exists()]
    _announce_again(lab, left)
    assert "events/another.json announces" in next(outcomes).kept
    assert image_of(lab, left).exists()


def test_what_another_machine_alters_counts_though_the_mount_remembers_how_it_was(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "events").mkdir(parents=True)
    (lab.home / "events").rmdir()
    remembering = ["bindfs", "-o", "attr_timeout=60,entry_timeout=60", str(elsewhere), str(lab.home)]
    if not shutil.which("bindfs") or subprocess.run(remembering, capture_output=True, check=False).returncode:
        pytest.skip("bindfs is not there, or may not mount")
    try:
        before, meanwhile = lab.drop(), lab.drop()
        time.sleep(1.2)
        lab.upload(before)
        lab.upload(meanwhile)
        real = deletion.delete_files

        def alter_elsewhere(timestep: Ingested) -> None:
            image = image_of(lab, timestep)
            remembered = image.lstat()
            alter(elsewhere / image.relative_to(lab.home))
            assert image.lstat().st_ctime_ns == remembered.st_ctime_ns

        def delete(*args: Any) -> None:
            alter_elsewhere(meanwhile)
            real(*args)

        monkeypatch.setattr("flows.purge.delete_files", delete)
        alter_elsewhere(before)
        first, second = lab.purge()
        assert "another content" in first.kept
        assert "is not the file any more that was compared" in second.kept
        seen = lab.system.survey(before.event)
        alter_elsewhere(before)
        assert lab.system.survey(before.event, headers=False).found != seen.found
    finally:
        _unmount(lab)


@pytest.mark.parametrize("what", ["another file", "a link"])
def test_what_takes_an_images_place_meanwhile_is_not_deleted(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    timestep = lab.arrived()
    image = image_of(lab, timestep, 2)
    real = deletion.delete_files

    def swap(home: Path, directory: str, *rest: Any) -> None:
        (lab.home / "new").write_bytes(b"new")
        image.unlink()
        if what == "a link":
            image.symlink_to(lab.home / "new")
        else:
            (lab.home / "new").rename(image)
        real(home, directory, *rest)

    monkeypatch.setattr("flows.purge.delete_files", swap)
    (outcome,) = lab.purge()
    assert "is not the file any more that was compared" in outcome.kept
    assert image.read_bytes() == b"new"
    assert (lab.home / timestep.event_file).exists()


def test_that_a_mount_refuses_to_delete_a_directory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(OSError, match="Read-only"):
        deletion.delete_empty_directories(tmp_path, "t1", [])


@pytest.mark.parametrize("outside", ["{other}", "../other"])
def test_nothing_outside_of_the_system_is_ever_deleted(tmp_path: Path, outside: str) -> None:
    home, other = tmp_path / "prince", tmp_path / "other"
    (home / "inside").mkdir(parents=True)
    other.mkdir()
    (other / "mine").write_bytes(b"mine")
    mine = find_sources(other)
    directory = outside.format(other=other)
    with pytest.raises(deletion.NotDeleted, match="leads out of"):
        deletion.delete_files(home, directory, mine)
    with pytest.raises(deletion.NotDeleted, match="leads out of"):
        deletion.delete_files(home, "inside", {f"{directory}/mine": mine["mine"], f"../{directory}": mine["mine"]})
    (other / "mine").rename(tmp_path / "mine")
    with pytest.raises(deletion.NotDeleted, match="leads out of"):
        deletion.delete_empty_directories(home, directory, [])
    assert other.is_dir()


@pytest.fixture
def tmpfs(lab: Lab) -> Iterator[Callable[..., None]]:
    """Mounts a file system of its own in place of the system's directory."""

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", *options, "archiver-test", str(lab.home)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")

    yield mount
    subprocess.run(["umount", "-l", str(lab.home)], capture_output=True, check=False)


def test_a_read_only_mount_is_left_alone_with_one_line(
    lab: Lab, tmpfs: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    tmpfs()
    for _ in range(3):
        lab.arrived()
    before = lab.files()
    tmpfs("-o", "remount,ro")
    assert lab.purge() == []
    assert [record.message for record in caplog.records if "read-only" in record.message] == [
        f"Nothing of {lab.system.name} is deleted: {lab.home} is mounted read-only"
    ]
    assert lab.files() == before
    assert len(lab.purge(do_it=False)) == 3
