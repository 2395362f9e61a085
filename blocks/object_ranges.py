"""An object as a file, of which little more is read than what is asked for."""

import io

from typing_extensions import Buffer

from blocks.object_store import ObjectHead, ObjectStore

# A tar's header, one with a long name too, and the block before it, which Python's tarfile looks at.
_AT_LEAST = 2 << 10


class ObjectRanges(io.RawIOBase):
    """One object, for random access. Reading raises `ObjectStoreError`, also when it is another object by now."""

    def __init__(self, store: ObjectStore, head: ObjectHead) -> None:
        self._store = store
        self._head = head
        self._position = 0
        self._held_from = 0
        self._held = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._head.size}[whence]
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._head.size)
        if stop <= self._position:
            return 0
        if not (self._held_from <= self._position and stop <= self._held_from + len(self._held)):
            upto = min(max(stop, self._position + _AT_LEAST), self._head.size)
            head = self._head
            self._held = b"".join(self._store.read_range(head.key, self._position, upto, head.etag))
            self._held_from = self._position
        first = self._position - self._held_from
        view[: stop - self._position] = self._held[first : first + stop - self._position]
        count = stop - self._position
        self._position = stop
        return count
