"""Compare bytes that were read back with what was recorded of them, while they pass by."""

import hashlib
from collections.abc import Callable, Iterable

from blocks.proven_object import Image


def find_differences(
    chunks: Iterable[bytes], images: Iterable[Image], sha256: str | None, progress: Callable[[int], None]
) -> list[str]:
    """Hash a tar and every image in it as it passes by.

    Args:
        chunks: the tar from its first byte to its last.
        images: what it must contain.
        sha256: the hash it must have; None if that isn't known.
        progress: called with the bytes of each chunk.

    Returns:
        A sentence for every image that differs, and for the whole; nothing if all is as it should be.
    """
    whole = hashlib.sha256()
    differences = []
    waiting = sorted(images, key=lambda image: image.offset, reverse=True)
    image_hash = hashlib.sha256()
    position = 0
    for chunk in chunks:
        whole.update(chunk)
        end = position + len(chunk)
        while waiting and waiting[-1].offset < end:
            image = waiting[-1]
            image_end = image.offset + image.size
            image_hash.update(chunk[max(image.offset - position, 0) : image_end - position])
            if image_end > end:
                break
            differences += _difference(waiting.pop(), image_hash.hexdigest())
            image_hash = hashlib.sha256()
        position = end
        progress(len(chunk))
    differences += [f"{image.name} is missing: the object ends at byte {position}" for image in reversed(waiting)]
    if sha256 not in (None, whole.hexdigest()):
        differences.append(f"the whole has the SHA-256 {whole.hexdigest()}, stored is {sha256}")
    return differences


def _difference(image: Image, found: str) -> list[str]:
    return [] if found == image.sha256 else [f"{image.name} has the SHA-256 {found}, stored is {image.sha256}"]
