"""What has to be true before a timestep's files may be deleted, found out at this moment.

The database only says which timesteps to look at: it follows the log with a delay, and proves nothing.
The proof comes from the object itself, asked now, and from the files, compared now.
"""

import hashlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

from blocks.event_file import InvalidEventFile
from blocks.expiry import ExpiryRules, RulesUnknown, days_left
from blocks.fresh_stat import fresh_stat
from blocks.imaging_system import ImagingSystem
from blocks.object_store import ObjectStore
from blocks.proven_object import Proof
from blocks.purgeable import NotProven, Purgeable
from blocks.recorded_object import find_difference
from blocks.source_file import BundleError, SourceFile, find_sources, state_of

# An object that the bucket deletes sooner (days) is no place for the only copy: somebody has to have time to act.
_LASTS_DAYS = 7.0


@dataclass(frozen=True)
class Proven:
    """What is left of the files, each as it was when it was compared, and why none of them is needed any more."""

    files: dict[str, SourceFile]
    checks: list[str]

    @property
    def bytes(self) -> int:
        """What deleting them frees."""
        return sum(file.size for file in self.files.values())

    def proof(self, *checks: str) -> Proof:
        """For the log, with what else was checked."""
        return Proof(verified_at=datetime.now(UTC), checks=[*checks, *self.checks])


def prove_object(
    timestep: Purgeable,
    store: ObjectStore,
    *,
    needs_tape: bool,
    trusts_tags: bool = False,
    rules: ExpiryRules | None = None,
) -> list[str]:
    """Make sure that the object was proven at its upload and is still there as it was.

    Args:
        needs_tape: a tape copy has to be known.
        trusts_tags: known from the object's tag alone, too.
        rules: by which the bucket deletes objects, where that matters. One that is not on tape has to last for some
            time.

    Raises:
        NotProven: when it is not, or the tape copy is needed and not known.
        ObjectStoreError: when the storage can't be asked.
    """
    row = timestep.row
    if row.key is None or row.bucket is None or row.uploaded_at is None:
        raise NotProven("it is not uploaded")
    if row.verified_at is None or not row.checks:
        raise NotProven("its upload was not proven")
    if row.sha256 is None:
        raise NotProven("it was found in the bucket, and not read since; run `archiver rebuild --read-whole`")
    is_announced = any(notice.etag is None for notice in timestep.notices)
    is_on_tape = bool(timestep.notices) and (is_announced or trusts_tags)
    if needs_tape and not timestep.notices:
        raise NotProven("it is not known to be on tape")
    if needs_tape and not is_on_tape:
        raise NotProven(
            "that it is on tape is known from its tag alone, and surf-archiver leaves that behind where it takes an "
            "archive back; have archives announced by the webhook, or set purge_trusts_tags"
        )
    prove_stored(timestep, store)
    if rules is not None and not is_on_tape:
        _prove_lasting(timestep, store, rules)
    checks = [
        f"It was proven when it was uploaded, {row.verified_at:%Y-%m-%d %H:%M:%S} UTC.",
        f"Asked now, the object has the {row.size} bytes, the ETag, the identity and the layout digest it had then.",
    ]
    if needs_tape:
        checks.append(f"It is on tape since {row.archived_at:%Y-%m-%d %H:%M:%S} UTC.")
    return checks


def prove_stored(timestep: Purgeable, store: ObjectStore) -> None:
    """Make sure that the object is there now, as it was recorded.

    Raises:
        NotProven: when it is not.
        ObjectStoreError: when the storage can't be asked.
    """
    if difference := find_difference(timestep.row, store):
        raise NotProven(difference)


def _prove_lasting(timestep: Purgeable, store: ObjectStore, rules: ExpiryRules) -> None:
    row = timestep.row
    key, bucket, uploaded_at = cast(str, row.key), cast(str, row.bucket), cast(datetime, row.uploaded_at)
    try:
        # It has the tag of what is on tape, if that is how we know.
        matter = [rule for rule in rules.ask(bucket) if timestep.notices or not rule.is_for_tagged]
    except RulesUnknown as error:
        raise NotProven(f"it is not known to be on tape, and {error}") from error
    if not matter:
        return
    head = store.of_bucket(bucket).head(key)
    # What was found in the bucket may have been stored long before anybody said so.
    stored_at = min(uploaded_at, head.modified_at) if head else uploaded_at
    left = days_left(matter, key, stored_at, datetime.now(UTC))
    if left is not None and left < _LASTS_DAYS:
        raise NotProven(f"it is not known to be on tape, and the bucket deletes its object in {left:g} days")


def prove_files(
    timestep: Purgeable, directory: Path, uploaded_state: str | None, compare: Literal["state", "content"]
) -> Proven:
    """Make sure that every file below a directory is in the object.

    Args:
        directory: the image directory, or a copy of it; it may be gone.
        uploaded_state: of the files when they were read for the upload.
        compare: by their state, or by their content. Content decides in any case where the state is another one,
            is not known, or where some files are gone.

    Raises:
        NotProven: when a file is there that was not uploaded, or is not what was uploaded.
        OSError: when they can't be read.
    """
    try:
        files = find_sources(directory) if os.path.lexists(directory) else {}
    except BundleError as error:
        raise NotProven(str(error)) from error
    if unknown := [name for name in files if name not in timestep.images]:
        raise NotProven(f"{directory} holds what was not uploaded: {', '.join(map(ascii, unknown[:5]))}")
    for name, file in files.items():
        if file.size != timestep.images[name].size:
            raise NotProven(f"{file.path} has {file.size} bytes, uploaded were {timestep.images[name].size}")
    if not files:
        return Proven({}, ["None of its files is there any more."])
    if compare == "state" and uploaded_state == state_of(files):
        sentence = f"Its {len(files)} files have the names, sizes, inodes and all times they had before the upload."
        return Proven(files, [sentence])
    for name, file in files.items():
        if _hash(file) != timestep.images[name].sha256:
            raise NotProven(f"{file.path} has another content than what was uploaded")
    return Proven(files, [f"Each of its {len(files)} files was read and has the SHA-256 of its image in the object."])


def _hash(file: SourceFile) -> str:
    try:
        with file.open() as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except BundleError as error:
        raise NotProven(str(error)) from error


def prove_event_file(timestep: Purgeable, system: ImagingSystem) -> SourceFile | None:
    """The timestep's event file, if it is still there and announces what it did.

    Raises:
        NotProven: when it says something else by now, which may be about the same images.
        OSError: when it can't be read.
    """
    path = system.directory / timestep.ingested.event_file
    try:
        file = SourceFile.of(path, fresh_stat(path))
        event = system.read_event(timestep.ingested.event_file)
    except FileNotFoundError:
        return None
    except (InvalidEventFile, BundleError) as error:
        raise NotProven(f"{path} is not the event file any more: {error}") from error
    now = timestep.ingested.model_copy(update={"event": event})
    if now.digest != timestep.ingested.digest:
        raise NotProven(f"{path} announces something else by now")
    return file
