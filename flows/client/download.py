"""One object, fetched over HTTP: goes on where it was broken off, and is in its place only when it is proven."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from io import FileIO
from pathlib import Path

import httpx

from blocks.errors import ArchiverError
from blocks.object_errors import ObjectStoreError
from blocks.retry import Patience, Transient
from blocks.verification import find_differences
from flows.client.gateway import TIMEOUT, Gateway, GatewayAway, GatewayError, RemoteTimestep

_READ_BYTES = 1 << 20
_PATIENCE = Patience(give_up_after=60)
# 403: the URL is too old by now.
_PASSING = {403, 408, 425, 429, 500, 502, 503, 504}


class DownloadError(ArchiverError):
    """A timestep could not be fetched; the message says why."""


@dataclass(frozen=True)
class Downloader:
    """Fetches objects into a directory, each under its key. Threads may share it.

    Args:
        progress: called with the number of bytes, whenever more of an object are here; a negative one takes back
            what has to be fetched again.
    """

    gateway: Gateway
    directory: Path
    progress: Callable[[int], None] = lambda size: None
    patience: Patience = _PATIENCE

    def fetch(self, timestep: RemoteTimestep) -> bool:
        """Fetch one object; False where it was here already. What an interrupted try has fetched is used again.

        Raises:
            DownloadError: when it can't be fetched, or is not what it should be.
            OSError: when it can't be written.
        """
        path = self._place(timestep.key)
        if self._is_here(path, timestep):
            self.progress(timestep.size)
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        # Named after its content: what is there belongs to this object.
        name = timestep.sha256 or hashlib.sha256(timestep.etag.encode()).hexdigest()
        part = path.with_name(f".{path.name}.{name[:16]}.part")
        with _alone(part) as file:
            if self._is_here(path, timestep):  # by another command, while this one waited
                part.unlink()
                self.progress(timestep.size)
                return False
            with httpx.Client(timeout=TIMEOUT) as client:
                self._complete(file, client, timestep)
            self._prove(file, part, timestep)
            os.fsync(file.fileno())
            # The time stands for "this was proven": a later change of the file changes it.
            os.utime(part, ns=(_stamp(timestep), _stamp(timestep)))
            part.replace(path)
        return True

    def _place(self, key: str) -> Path:
        path = (self.directory / key).resolve()
        if not path.is_relative_to(self.directory.resolve()):
            raise DownloadError(f"{key}: the key leads out of {self.directory}")
        return path

    def _complete(self, file: FileIO, client: httpx.Client, timestep: RemoteTimestep) -> None:
        """Append what the part still lacks."""
        self.progress(_size(file))
        if _size(file) > timestep.size:
            self._begin_again(file)
        try:
            while _size(file) < timestep.size:
                self.patience.retry(f"fetching {timestep.key}", partial(self._read_on, file, client, timestep))
        except ObjectStoreError as error:
            raise DownloadError(str(error)) from error

    def _read_on(self, file: FileIO, client: httpx.Client, timestep: RemoteTimestep) -> None:
        """Append what one request gives.

        Raises:
            Transient: if that is nothing.
        """
        before = _size(file)
        cause = "the answer was empty"
        try:
            for chunk in _read_from(client, self.gateway.url_of(timestep), before, timestep):
                file.write(chunk)
                self.progress(len(chunk))
        except _NotThatPart:
            self._begin_again(file)
        except _Gone as error:
            raise DownloadError(f"{timestep.key} {self._where_it_went(timestep)}") from error
        except GatewayAway as error:
            raise Transient(str(error)) from error
        except httpx.TransportError as error:
            cause = str(error) or type(error).__name__
        if _size(file) == before:
            raise Transient(cause)

    def _where_it_went(self, timestep: RemoteTimestep) -> str:
        """As a lifecycle rule of the bucket deletes objects, once they are on tape."""
        try:
            archives = self.gateway.archives_of(timestep)
        except GatewayError as error:
            return f"is no longer in the bucket; whether it is on tape can't be told: {error}"
        if archives:
            return f"is no longer in the bucket; it is on tape in {', '.join(archives)}"
        return "is no longer in the bucket, and no tape has it; an operator must look"

    def _is_here(self, path: Path, timestep: RemoteTimestep) -> bool:
        """Whether the file was proven before, and has not been touched since or is the same all the same."""
        try:
            found = path.stat()
        except FileNotFoundError:
            return False
        if found.st_size != timestep.size:
            return False
        if found.st_mtime_ns == _stamp(timestep):
            return True
        with path.open("rb", buffering=0) as file:
            return not self._differences(file, timestep)

    def _prove(self, file: FileIO, part: Path, timestep: RemoteTimestep) -> None:
        if differences := self._differences(file, timestep):
            part.unlink()
            self.progress(-_size(file))
            raise DownloadError(f"{timestep.key} {'; '.join(differences[:3])}; fetch it again")

    def _differences(self, file: FileIO, timestep: RemoteTimestep) -> list[str]:
        """What is not as recorded: of the whole, or where its hash is not known, of each image in it."""
        file.seek(0)
        if timestep.sha256 is not None:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return [] if sha256 == timestep.sha256 else [f"has SHA-256 {sha256}, not {timestep.sha256}"]
        images = list(self.gateway.images(timestep))
        if not images:
            return ["can't be proven: neither its SHA-256 nor what is in it is recorded"]
        return find_differences(iter(partial(file.read, _READ_BYTES), b""), images, None, lambda size: None)

    def _begin_again(self, file: FileIO) -> None:
        self.progress(-_size(file))
        file.truncate(0)


@contextmanager
def _alone(part: Path) -> Iterator[FileIO]:
    """Open a part that nobody else works on; another command that does so is waited for."""
    while True:
        with part.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Who had it may have given it its name meanwhile, or thrown it away.
            if _is_named(file, part):
                yield file
                return


def _is_named(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class _NotThatPart(Exception):
    """The store did not give the part that was asked for."""


class _Gone(Exception):
    """The store has no such object."""


def _read_from(client: httpx.Client, url: str, start: int, timestep: RemoteTimestep) -> Iterator[bytes]:
    headers = {"Range": f"bytes={start}-", "If-Match": f'"{timestep.etag}"', "Accept-Encoding": "identity"}
    with client.stream("GET", url, headers=headers) as answer:
        status = answer.status_code
        if status == HTTPStatus.PRECONDITION_FAILED:
            raise DownloadError(f"{timestep.key} is another object than was recorded; an operator must look")
        if start and status in (HTTPStatus.OK, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
            raise _NotThatPart
        if status in _PASSING:
            raise Transient(f"the store answers {status}")
        if status == HTTPStatus.NOT_FOUND:
            raise _Gone
        if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            raise DownloadError(f"{timestep.key} can't be fetched: the store answers {status}")
        yield from answer.iter_raw()


def _stamp(timestep: RemoteTimestep) -> int:
    """The modification time of a proven file, in nanoseconds: when the images were taken, to the second."""
    return int(timestep.timestamp.timestamp()) * 1_000_000_000


def _size(file: FileIO) -> int:
    return file.seek(0, os.SEEK_END)
