"""The bundle against GNU tar, Python's tarfile and sha256sum."""

import hashlib
import io
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.bundle import Bundle, BundleError, SourceChanged
from tests.images import alter, make_images

METADATA = b'{"system": "prince"}\n'

# Names with spaces, line breaks, backslashes, other alphabets, and more than the 100 bytes of a plain header.
names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..", "metadata.json", "manifest-sha256.txt") and len(name.encode()) < 200
)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
contents = st.binary(max_size=2000) | st.integers(0, 100_000).map(lambda size: random.Random(size).randbytes(size))
directories = st.dictionaries(paths, contents, max_size=8)


@contextmanager
def directory_of(files: dict[str, bytes]) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """Write what of the files can stand side by side (a file can't be a directory as well)."""
    with tempfile.TemporaryDirectory() as name:
        root, written = Path(name), {}
        for path, content in files.items():
            try:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(content)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                continue
            written[path] = content
        yield root, written


def read_whole(bundle: Bundle) -> bytes:
    return io.BufferedReader(bundle.reader()).read()


@settings(max_examples=60, deadline=None)
@given(directories)
def test_gnu_tar_and_tarfile_read_what_was_written(files: dict[str, bytes]) -> None:
    with directory_of(files) as (root, written), tempfile.TemporaryDirectory() as unpacked:
        content = read_whole(Bundle.of(root, METADATA))

        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = {member.name: tar.extractfile(member) for member in tar}
            read = {name: file.read() for name, file in members.items() if file}
        order = ["metadata.json", *sorted(written, key=str.encode), "manifest-sha256.txt"]
        assert list(read) == [f"./{name}" for name in order]
        assert read == {
            "./metadata.json": METADATA,
            **{f"./{name}": file for name, file in written.items()},
            "./manifest-sha256.txt": read["./manifest-sha256.txt"],
        }

        tar_run = subprocess.run(["tar", "-x", "-C", unpacked], input=content, capture_output=True, check=True)
        assert tar_run.stderr == b""
        for name, file in written.items():
            assert (Path(unpacked) / name).read_bytes() == file
        check = ["sha256sum", "--strict", "--quiet", "-c", "manifest-sha256.txt"]
        subprocess.run(check, cwd=unpacked, check=True, capture_output=True)


@settings(max_examples=60, deadline=None)
@given(directories, st.data())
def test_the_layout_is_known_beforehand_and_any_range_can_be_made_again(
    files: dict[str, bytes], data: st.DataObject
) -> None:
    with directory_of(files) as (root, written):
        bundle = Bundle.of(root, METADATA)
        reader = bundle.reader()
        content = io.BufferedReader(reader).read()

        assert len(content) == bundle.size
        assert reader.sha256 == hashlib.sha256(content).hexdigest()
        found = {image.name: content[image.offset : image.offset + image.size] for image in reader.images}
        assert found == written
        assert all(hashlib.sha256(found[image.name]).hexdigest() == image.sha256 for image in reader.images)

        again = Bundle.of(root, METADATA)
        assert again.layout_digest == bundle.layout_digest
        for _ in range(5):
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, bundle.size)] * 2)))
            assert b"".join(again.read_range(start, stop)) == content[start:stop]
        assert b"".join(again.read_range(0, bundle.size)) == content


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    original = make_images(tmp_path / "one", [100_000, 0, 12])
    copy = tmp_path / "two"
    shutil.copytree(original, copy)
    (copy / "Img" / "Img_r00_c00.tif").chmod(0o600)
    one, two = Bundle.of(original, METADATA), Bundle.of(copy, METADATA)
    assert one.layout_digest == two.layout_digest
    assert read_whole(one) == read_whole(two)


def test_the_layout_digest_tells_layouts_apart(tmp_path: Path) -> None:
    source = make_images(tmp_path / "source", [1000, 2000])
    image = source / "Img" / "Img_r00_c00.tif"
    digests = [Bundle.of(source, METADATA).layout_digest, Bundle.of(source, b"{}").layout_digest]
    os.utime(image, (1, 1))
    digests.append(Bundle.of(source, METADATA).layout_digest)
    image.write_bytes(b"x" * 1001)
    os.utime(image, (1, 1))
    digests.append(Bundle.of(source, METADATA).layout_digest)
    image.rename(image.with_name("renamed.tif"))
    digests.append(Bundle.of(source, METADATA).layout_digest)
    assert len(set(digests)) == 5


def test_headers_say_nothing_but_name_size_and_time(tmp_path: Path) -> None:
    source = make_images(tmp_path / "source", [10])
    os.utime(source / "Img" / "Img_r00_c00.tif", ns=(0, 1_700_000_000_900_000_000))
    content = read_whole(Bundle.of(source, METADATA))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            facts = (member.mtime, member.mode, member.uid, member.gid, member.uname, member.gname)
            assert facts == (1_700_000_000, 0o644, 0, 0, "", "")
            assert member.pax_headers == {}


def test_files_over_8_gib(tmp_path: Path) -> None:
    source = make_images(tmp_path / "source", [10])
    size = (8 << 30) + 5
    with (source / "Img" / "a_big.tif").open("wb") as big:
        big.truncate(size)
        big.seek(size - 3)
        big.write(b"end")
    bundle = Bundle.of(source, METADATA)
    small_member, big_member = bundle.image_members
    header = b"".join(bundle.read_range(big_member.offset, big_member.data_offset))
    with tarfile.open(fileobj=io.BytesIO(header), mode="r|") as tar:
        member = tar.next()
        assert member
        assert (member.name, member.size) == ("./Img/a_big.tif", size)
    assert b"".join(bundle.read_range(big_member.data_offset + size - 3, big_member.end))[:3] == b"end"
    assert small_member.end == big_member.offset
    assert bundle.members[-1].offset == big_member.end


@pytest.mark.parametrize("name", ["metadata.json", "manifest-sha256.txt"])
def test_a_file_with_the_name_of_an_added_member_is_refused(tmp_path: Path, name: str) -> None:
    source = make_images(tmp_path / "source", [10])
    (source / name).write_text("mine")
    with pytest.raises(BundleError, match=f"{name} has the name of a member"):
        Bundle.of(source, METADATA)
    (source / name).rename(source / "Img" / name)
    assert f"Img/{name}" in [member.name for member in Bundle.of(source, METADATA).members]


def test_only_regular_files_are_bundled(tmp_path: Path) -> None:
    source = make_images(tmp_path / "source", [10])
    odd = source / "Img" / "odd.tif"
    odd.symlink_to("Img_r00_c00.tif")
    with pytest.raises(BundleError, match=r"odd\.tif is a symbolic link"):
        Bundle.of(source, METADATA)
    odd.unlink()
    odd.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(BundleError, match=r"odd\.tif is a symbolic link"):
        Bundle.of(source, METADATA)
    odd.unlink()
    os.mkfifo(odd)
    with pytest.raises(BundleError, match=r"odd\.tif is a named pipe"):
        Bundle.of(source, METADATA)
    odd.unlink()
    (source / os.fsdecode(b"\xff.tif")).touch()
    with pytest.raises(BundleError, match=r"xff\.tif' is not UTF-8"):
        Bundle.of(source, METADATA)
    with pytest.raises(BundleError, match=r"nowhere can't be read"):
        Bundle.of(tmp_path / "nowhere", METADATA)


def grow(image: Path) -> None:
    image.write_bytes(image.read_bytes() + b"more")


def shrink(image: Path) -> None:
    os.truncate(image, 10)


def touch(image: Path) -> None:
    os.utime(image, (1, 1))


def replace(image: Path) -> None:
    status = image.stat()
    other = image.with_suffix(".new")
    other.write_bytes(image.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(image)


def remove(image: Path) -> None:
    image.unlink()


def link(image: Path) -> None:
    image.rename(image.with_suffix(".moved"))
    image.symlink_to(image.with_suffix(".moved"))


@pytest.mark.parametrize("change", [grow, shrink, touch, replace, alter, remove])
@pytest.mark.parametrize("already_read", [0, 500_000, 999_999], ids=lambda size: f"{size} bytes read")
def test_a_file_that_changes_is_noticed(tmp_path: Path, change: Callable[[Path], None], already_read: int) -> None:
    image = make_images(tmp_path / "source", [1_000_000]) / "Img" / "Img_r00_c00.tif"
    bundle = Bundle.of(tmp_path / "source", METADATA)
    reader = bundle.reader()
    offset = bundle.image_members[0].data_offset
    read = 0
    while already_read and read < offset + already_read:
        read += len(reader.read(min(100_000, offset + already_read - read)) or b"")
    change(image)
    with reader, pytest.raises(SourceChanged, match=r"Img_r00_c00\.tif"):
        reader.readall()
    with pytest.raises(SourceChanged, match=r"Img_r00_c00\.tif"):
        b"".join(bundle.read_range(0, bundle.size))


def test_a_link_in_a_files_place_is_not_followed(tmp_path: Path) -> None:
    image = make_images(tmp_path / "source", [1000]) / "Img" / "Img_r00_c00.tif"
    bundle = Bundle.of(tmp_path / "source", METADATA)
    link(image)
    with pytest.raises(BundleError, match=r"Img_r00_c00\.tif"):
        read_whole(bundle)


def test_hashes_are_not_told_before_they_are_known(tmp_path: Path) -> None:
    reader = Bundle.of(make_images(tmp_path / "source", [1000]), METADATA).reader()
    reader.read(1000)
    with pytest.raises(ValueError, match="not read to its end"):
        _ = reader.sha256
    with pytest.raises(ValueError, match="not read to its end"):
        _ = reader.images
