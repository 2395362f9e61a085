"""How fast and how small an upload is, compared with s5cmd and with the classic way.

Starts a RADOS Gateway, or uses the S3 server that AWS_ENDPOINT_URL names. Prints a table and, as its last
line, one JSON object. A ratio to another way is of throughputs: above 1 means faster than the other.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID, uuid4

import redis
import s3fs  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from bench.surroundings import NoServer, make_images, redis_server, s3_server
from blocks.bundle import Bundle
from blocks.object_store import ObjectStore
from blocks.upload_journal import RedisJournal

MB = 1_000_000
MIB = 1 << 20

Way = Callable[[Path], object]


class Ways:
    """The ways to upload a directory that are compared."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        # Ceph does not take the newer checksums.
        config = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        self._s3fs = s3fs.S3FileSystem(endpoint_url=store.client.meta.endpoint_url, config_kwargs=config)

    def ours(self, source: Path) -> None:
        """Lay out, stream, hash on the way, look up and compare."""
        timestep_id = uuid4()
        self._store.upload(Bundle.of(source, b"{}\n"), f"ours/{timestep_id}.tar", timestep_id)

    def classic(self, source: Path) -> None:
        """Write a tar to a temporary file, upload it, then hash it."""
        with TemporaryDirectory() as directory:
            path = Path(directory) / "timestep.tar"
            write_tar(source, path)
            self._s3fs.put(str(path), f"{self._store.bucket_name}/classic/{uuid4()}.tar")
            with path.open("rb") as content:
                hashlib.file_digest(content, "sha256")

    def s5cmd(self, tar: Path) -> None:
        """Upload a tar that exists already, without hashing or looking it up."""
        program = str(Path(sys.executable).with_name("s5cmd"))
        endpoint = ["--endpoint-url", self._store.client.meta.endpoint_url]
        command = [program, *endpoint, "cp", str(tar), f"s3://{self._store.bucket_name}/s5cmd/{uuid4()}.tar"]
        subprocess.run(command, check=True, capture_output=True)


def write_tar(source: Path, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for image in sorted(source.rglob("*.tif")):
            tar.add(image, arcname=f"./{image.relative_to(source)}")


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def forget(files: Iterable[Path]) -> None:
    """Take files out of this machine's memory: what a microscope wrote to a share is not there."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def medians(
    rounds: int, before: Callable[[], None] = lambda: None, **actions: Callable[[], object]
) -> dict[str, float]:
    """Median seconds of each action. They take turns, so that whatever disturbs the machine disturbs all.

    Args:
        before: is done before each of them, and not measured.
    """
    measured: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            before()
            measured[name].append(seconds(action))
            print(f"{name}: {measured[name][-1]:.2f} s", file=sys.stderr)
    return {name: statistics.median(values) for name, values in measured.items()}


def in_parallel(way: Way, sources: Iterable[Path], workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(way, sources))


def measure_large(ways: Ways, home: Path, images: int, image_bytes: int, rounds: int) -> dict[str, float]:
    """One large timestep, read from disk: against s5cmd with a ready-made tar, and against the classic way."""
    source = make_images(home / "large", images, image_bytes)
    tar = home / "large.tar"
    write_tar(source, tar)
    ways.s5cmd(tar)  # not measured: the first large object takes a fresh gateway several times as long
    took = medians(
        rounds,
        before=lambda: forget([tar, *source.rglob("*.tif")]),
        s5cmd=lambda: ways.s5cmd(tar),
        ours=lambda: ways.ours(source),
        classic=lambda: ways.classic(source),
    )
    return {
        "large_mb": images * image_bytes / MB,
        "large_seconds": took["ours"],
        "large_s5cmd_seconds": took["s5cmd"],
        "large_classic_seconds": took["classic"],
        "large_ratio_to_s5cmd": took["s5cmd"] / took["ours"],
        "large_ratio_to_classic": took["classic"] / took["ours"],
    }


def measure_small(ways: Ways, home: Path, timesteps: int, rounds: int, workers: int = 4) -> dict[str, float]:
    """Many small timesteps, four at a time."""
    sources = [make_images(home / "small" / str(number), 10, 20_000) for number in range(timesteps)]
    took = medians(
        rounds,
        ours=lambda: in_parallel(ways.ours, sources, workers),
        classic=lambda: in_parallel(ways.classic, sources, workers),
    )
    return {
        "small_timesteps": timesteps,
        "small_seconds": took["ours"],
        "small_classic_seconds": took["classic"],
        "small_ratio_to_classic": took["classic"] / took["ours"],
    }


def one_upload(source: Path, key: str, timestep_id: UUID, redis_url: str) -> subprocess.Popen[bytes]:
    program = str(Path(__file__).with_name("one_upload.py"))
    return subprocess.Popen([sys.executable, program, str(source), key, str(timestep_id), redis_url], stdout=-1)


def finish(process: subprocess.Popen[bytes]) -> dict[str, int]:
    output, _ = process.communicate(timeout=900)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    figures: dict[str, int] = json.loads(output)
    return figures


def measure_memory(home: Path, redis_url: str, megabytes: list[int]) -> dict[str, float]:
    """Peak resident memory over the idle process, for bundles of different sizes."""
    peaks: dict[str, float] = {}
    for size in megabytes:
        source = make_images(home / f"memory-{size}", max(size // 4, 1), 4 * MB, distinct=25)
        figures = finish(one_upload(source, f"memory/{uuid4()}.tar", uuid4(), redis_url))
        peaks[f"memory_{size}_mb_peak_over_idle_mib"] = (figures["peak"] - figures["idle"]) / MIB
    return peaks


def measure_resume(home: Path, store: ObjectStore, redis_url: str, images: int, image_bytes: int) -> dict[str, float]:
    """What the second attempt sends after the first was killed at half."""
    source = home / "large" if (home / "large").exists() else make_images(home / "large", images, image_bytes)
    key, timestep_id = f"resume/{uuid4()}.tar", uuid4()
    parts = Bundle.of(source, b"{}\n").size / store.part_size
    journal = RedisJournal(redis.Redis.from_url(redis_url), store.bucket_name)
    first = one_upload(source, key, timestep_id, redis_url)
    while first.poll() is None and len(journal.parts(key)) < parts / 2:
        time.sleep(0.01)
    first.kill()
    first.wait()
    second = finish(one_upload(source, key, timestep_id, redis_url))
    return {"resume_share_sent_by_second_attempt": second["sent"] / second["size"]}


TARGETS: dict[str, tuple[str, float]] = {
    "large_ratio_to_s5cmd": ("at least", 0.9),
    "large_ratio_to_classic": ("at least", 2.0),
    "small_ratio_to_classic": ("at least", 1.3),
    "memory_100_mb_peak_over_idle_mib": ("at most", 150),
    "memory_6000_mb_peak_over_idle_mib": ("at most", 150),
    "resume_share_sent_by_second_attempt": ("at most", 0.6),
}


def report(figures: dict[str, float]) -> None:
    """Print the table, then the figures as JSON."""
    table = Table("figure", "measured", "aim", "reached")
    for name, value in figures.items():
        bound, aim = TARGETS.get(name, ("", 0.0))
        reached = "" if not bound else "yes" if (value >= aim if bound == "at least" else value <= aim) else "no"
        table.add_row(name.replace("_", " "), f"{value:.2f}", f"{bound} {aim:g}" if bound else "", reached)
    Console(width=100).print(table)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of which the median counts")
    parser.add_argument("--images", type=int, default=150, help="of the large timestep")
    parser.add_argument("--image-bytes", type=int, default=4 * MB)
    parser.add_argument("--timesteps", type=int, default=200, help="small ones, of 10 images of 20 kB")
    parser.add_argument("--memory", type=int, nargs="+", default=[100, 6000], help="sizes in MB to measure memory with")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="bench-upload-") as directory:
        home = Path(directory)
        try:
            with s3_server(home) as store, redis_server(home) as redis_url:
                ways = Ways(store)
                figures = measure_large(ways, home, options.images, options.image_bytes, options.rounds)
                figures |= measure_resume(home, store, redis_url, options.images, options.image_bytes)
                figures |= measure_small(ways, home, options.timesteps, options.rounds)
                figures |= measure_memory(home, redis_url, options.memory)
        except NoServer as reason:
            print(json.dumps({"skipped": str(reason)}))
            return
    report(figures)


if __name__ == "__main__":
    main()
