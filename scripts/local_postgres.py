"""A private PostgreSQL: a cluster in a temporary folder, on a socket that nobody else finds."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["MISSING", "Cluster", "server_programs"]

MISSING = "PostgreSQL is not installed"
_USER = "nobody"  # the server refuses to run as root
_DEBIAN = Path("/usr/lib/postgresql")
_LOG_LINES = 30


def server_programs() -> Path | None:
    """The folder of initdb and pg_ctl, newest version first."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    versions = sorted(_DEBIAN.glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]), reverse=True)
    return versions[0].parent if versions else None


class Cluster:
    """Started when it is made. `close` removes it."""

    def __init__(self) -> None:
        """Raises RuntimeError with what the server said."""
        programs = server_programs()
        if programs is None:
            raise RuntimeError(MISSING)
        self._programs = programs
        # Short, because the path of a socket may have 107 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix="pg"))
        self._data = self.folder / "data"
        if os.geteuid() == 0:
            account = pwd.getpwnam(_USER)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        self._databases = 0
        try:
            self._run(
                "initdb", "-D", str(self._data), "-U", "perfit", "-A", "trust", "-E", "UTF8", "--no-sync"
            )
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off -c max_connections=200"
        self._control("start", "-o", options, "-l", str(self.folder / "log"))

    def stop(self, how: str = "fast") -> None:
        """`fast` ends every connection; `immediate` is as good as a power cut."""
        self._control("stop", "-m", how)

    def freeze(self) -> None:
        """Stop all its processes where they are: they neither answer nor close a connection."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        import psutil

        server = psutil.Process(int((self._data / "postmaster.pid").read_text().splitlines()[0]))
        server.send_signal(number)  # first, so that it starts no more
        for child in server.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # ended just now
                child.send_signal(number)

    def database(self) -> str:
        """The connection string of a new, empty database."""
        import psycopg

        self._databases += 1
        name = f"perfit_{self._databases}"
        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        return self._conninfo(name)

    def dump(self, conninfo: str) -> str:
        """The SQL of pg_dump."""
        return subprocess.run(
            [self.client("pg_dump"), conninfo], capture_output=True, text=True, check=True, timeout=120
        ).stdout

    def restore(self, conninfo: str, dump: str) -> None:
        """Put a dump in place of a database, whoever is connected to it."""
        import psycopg
        from psycopg.conninfo import conninfo_to_dict

        name = str(conninfo_to_dict(conninfo)["dbname"])
        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as db:
            db.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[call-overload]
            db.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        command = [self.client("psql"), "--single-transaction", "--set=ON_ERROR_STOP=1", "--quiet", conninfo]
        subprocess.run(command, input=dump, capture_output=True, text=True, check=True, timeout=120)

    def client(self, program: str) -> str:
        """One of PostgreSQL's client programs, of the version of the server."""
        beside = self._programs / program
        return str(beside) if beside.exists() else program

    def _conninfo(self, name: str) -> str:
        return f"host={self.folder} user=perfit dbname={name}"

    def close(self) -> None:
        if (self._data / "postmaster.pid").exists():
            self.thaw()
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self._data), "-w", "-t", "60", *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        command: Sequence[str] = [str(self._programs / program), *arguments]
        if os.geteuid() == 0:
            command = ["setpriv", f"--reuid={_USER}", "--clear-groups", *command]
        # The server outlives pg_ctl and would hold a pipe open for ever, so this is a file.
        said = self.folder / "said"
        with said.open("wb") as out:
            done = subprocess.run(
                command,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                check=False,
                timeout=120,
            )
        if done.returncode:
            lines = said.read_text("utf-8", "replace").splitlines()[-_LOG_LINES:]
            raise RuntimeError(f"{program} ended with {done.returncode}: " + "\n".join(lines))
