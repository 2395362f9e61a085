"""The supervisor with small real processes: what starts, what is started again, what ends."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from flows.stack import service as service_module
from flows.stack.service import Service, StartError
from flows.stack.supervisor import Supervisor

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
)
PATIENCE = 10.0

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def python(name: str, code: str, **options: object) -> Service:
    return Service(name=name, argv=[sys.executable, "-S", "-c", code], env={}, **options)  # type: ignore[arg-type]


def sleeper(name: str) -> Service:
    return python(name, "import time; time.sleep(60)")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE} s"
        await asyncio.sleep(0.02)


def contains(log: Path, text: str) -> Callable[[], Awaitable[None]]:
    """Ready when the log holds the text."""

    def check() -> None:
        assert text in log.read_text()

    return partial(asyncio.to_thread, check)


def pid_of(supervisor: Supervisor, name: str) -> int:
    pid = supervisor.pids[name]
    assert pid is not None
    return pid


async def test_a_service_that_is_killed_runs_again_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Supervisor(tmp_path) as supervisor:
        await supervisor.start(sleeper("worker"), sleeper("other"))
        killed, other = pid_of(supervisor, "worker"), pid_of(supervisor, "other")
        os.kill(killed, signal.SIGKILL)
        await until(lambda: supervisor.pids["worker"] not in (None, killed), "a restart")
        assert is_running(pid_of(supervisor, "worker"))
        assert pid_of(supervisor, "other") == other
    assert "worker ended (killed by SIGKILL)" in caplog.text
    assert str(tmp_path / "worker.log") in caplog.text


async def test_restarts_of_a_service_that_cannot_stay_up_become_rarer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flag = tmp_path / "broken"
    code = f"import os, sys, time\nif os.path.exists({str(flag)!r}): sys.exit(3)\ntime.sleep(60)"
    async with Supervisor(tmp_path) as supervisor:
        await supervisor.start(python("worker", code))
        flag.touch()
        os.kill(pid_of(supervisor, "worker"), signal.SIGKILL)
        await until(lambda: "again in 2 s" in caplog.text, "a longer pause")
        flag.unlink()
        await until(lambda: supervisor.pids["worker"] is not None, "a restart")
    assert "worker ended (exit code 3); starting it again in 1 s" in caplog.text


async def test_a_restart_waits_until_the_service_is_ready_and_prepares_it_again(tmp_path: Path) -> None:
    calls: list[str] = []

    async def prepare() -> None:
        calls.append("prepare")

    async def ready() -> None:
        calls.append("ready")

    async with Supervisor(tmp_path) as supervisor:
        await supervisor.start(python("worker", "import time; time.sleep(60)", prepare=prepare, ready=ready))
        os.kill(pid_of(supervisor, "worker"), signal.SIGKILL)
        await until(lambda: len(calls) == 4, "a second start")
    assert calls == ["prepare", "ready"] * 2


async def test_services_stop_in_the_reverse_order_of_their_start(tmp_path: Path) -> None:
    ended = tmp_path / "ended"

    def polite(name: str) -> Service:
        code = f"""
            import signal, sys, time
            def end(*_):
                with open({str(ended)!r}, "a") as file:
                    file.write("{name}\\n")
                sys.exit()
            signal.signal(signal.SIGTERM, end)
            print("ready", flush=True)
            time.sleep(60)
        """
        return python(name, textwrap.dedent(code), ready=contains(tmp_path / f"{name}.log", "ready"))

    async with Supervisor(tmp_path) as supervisor:
        for name in ("database", "server", "worker"):
            await supervisor.start(polite(name))
        started = time.monotonic()
    assert ended.read_text().split() == ["worker", "server", "database"]
    assert time.monotonic() - started < 5


async def test_a_service_that_ignores_sigterm_is_killed_in_time(tmp_path: Path) -> None:
    ready = contains(tmp_path / "stubborn.log", "deaf")
    async with Supervisor(tmp_path) as supervisor:
        await supervisor.start(sleeper("database"))
        await supervisor.start(python("stubborn", STUBBORN, ready=ready, stop_timeout=0.3))
        pids = [pid_of(supervisor, name) for name in ("database", "stubborn")]
        started = time.monotonic()
    assert time.monotonic() - started < 3
    assert not any(is_running(pid) for pid in pids)


async def test_what_a_service_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    code = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-S", "-c", {STUBBORN!r}])
        print("child", child.pid, flush=True)
        child.wait()
    """
    log = tmp_path / "parent.log"
    async with Supervisor(tmp_path) as supervisor:
        await supervisor.start(python("parent", textwrap.dedent(code), ready=contains(log, "deaf")))
        child = int(log.read_text().partition("child ")[2].split()[0])
        os.kill(pid_of(supervisor, "parent"), signal.SIGKILL)
        await until(lambda: not is_running(child), "the end of the child")


async def test_one_service_can_be_stopped_and_started_again(tmp_path: Path) -> None:
    worker = sleeper("worker")
    async with Supervisor(tmp_path) as supervisor:
        await supervisor.start(sleeper("server"), worker)
        pid = pid_of(supervisor, "worker")
        await supervisor.stop("worker")
        assert not is_running(pid)
        assert list(supervisor.pids) == ["server"]
        await supervisor.start(worker)
        assert is_running(pid_of(supervisor, "worker"))


@pytest.mark.parametrize(
    ("code", "how"), [("print('no such database'); raise SystemExit(4)", "exit code 4"), (STUBBORN, "0.5 s")]
)
async def test_a_failed_start_shows_the_end_of_the_log(tmp_path: Path, code: str, how: str) -> None:
    async def ready() -> None:
        raise ConnectionError("nobody answers")

    (tmp_path / "worker.log").write_text("of an earlier start\n")
    supervisor = Supervisor(tmp_path)
    async with supervisor:
        await supervisor.start(sleeper("server"))
        server = pid_of(supervisor, "server")
        with pytest.raises(StartError) as failure:
            await supervisor.start(python("worker", code, ready=ready, ready_timeout=0.5, stop_timeout=0.2))
        assert supervisor.pids["worker"] is None
    message = str(failure.value)
    assert message.startswith("worker ")
    assert how in message
    assert ("no such database" if "exit" in how else "deaf") in message
    assert "of an earlier start" not in message
    assert not is_running(server)


async def test_a_command_runs_to_its_end_or_fails_with_its_output(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as supervisor:
        await supervisor.run(python("init", "print('done')"))
        with pytest.raises(StartError, match=r"init failed \(exit code 2\)(.|\n)*no table"):
            await supervisor.run(python("init", "print('no table'); raise SystemExit(2)"))
        with pytest.raises(StartError, match=r"init did not end within 0.3 s"):
            await supervisor.run(python("init", "import time; time.sleep(60)", ready_timeout=0.3))


async def test_a_log_is_bounded_while_its_service_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "LOG_LIMIT", 2000)
    monkeypatch.setattr("flows.stack.supervisor.LOG_CHECK", 0.05)
    code = "import time\nwhile True: print('x' * 99, flush=True); time.sleep(0.002)"
    log, former = tmp_path / "chatty.log", tmp_path / "chatty.log.1"
    async with Supervisor(tmp_path) as supervisor:
        await supervisor.start(python("chatty", code))
        await until(former.exists, "a shortened log")
        await asyncio.sleep(0.3)
        # At most what is written between two looks comes on top.
        assert log.stat().st_size < 50_000
        assert b"\0" not in log.read_bytes()
    assert former.stat().st_size > 2000


@pytest.fixture
def orphans(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A supervisor in a process of its own, and the processes of its services."""
    code = f"""
        import asyncio, signal, sys
        from pathlib import Path
        from flows.stack.service import Service
        from flows.stack.supervisor import Supervisor

        async def main():
            deaf = [sys.executable, "-S", "-c", {STUBBORN!r}]
            async with Supervisor(Path({str(tmp_path)!r})) as supervisor:
                await supervisor.start(Service(name="a", argv=deaf, env={{}}), Service(name="b", argv=deaf, env={{}}))
                await asyncio.sleep(0.5)
                print(*supervisor.pids.values(), flush=True)
                await asyncio.sleep(60)

        asyncio.run(main())
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(pid) for pid in supervisor.stdout.readline().split()]
        yield supervisor, pids
        supervisor.kill()
    for pid in pids:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


async def test_services_end_with_a_supervisor_that_is_killed(
    orphans: tuple[subprocess.Popen[bytes], list[int]],
) -> None:
    supervisor, pids = orphans
    assert len(pids) == 2
    assert all(is_running(pid) for pid in pids)
    supervisor.kill()
    await until(lambda: not any(is_running(pid) for pid in pids), "the end of the services")


async def test_a_service_gets_no_signal_from_the_terminal(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as supervisor:
        await supervisor.start(sleeper("worker"))
        pid = pid_of(supervisor, "worker")
        assert os.getsid(pid) == os.getpgid(pid) == pid
