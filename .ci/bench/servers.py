"""The contenders' processes, and the databases that they ask."""

import asyncio
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from selectors import SelectSelector
from statistics import median
from typing import NamedTuple
from urllib.request import urlopen

import asyncpg
import psutil
from load import CLIENTS, Operation, load

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CORES = sorted(os.sched_getaffinity(0))  # the first is the contenders', the others are for the
USERS = 10_000  #                          database and the load
POOL = {"POOL": str(CLIENTS), "DATABASE_POOL_SIZE": str(CLIENTS)}


class Spec(NamedTuple):
    """How to start a contender; with --port it is complete."""

    command: list[str]
    url: str
    users: int = USERS
    cores: list[int] = CORES[:1]


class Costs(NamedTuple):
    """What an operation costs: CPU seconds a request, and what its clients see."""

    cpu: float
    rate: float = 0
    median: float = 0
    slow: float = 0


START, MEMORY = "CPU of the start, until the first answer", "memory of an idle worker"
Table = dict[str, dict[str, Costs]]  # by row and contender


def uvicorn(application: str, python: str | Path = sys.executable, *options: str) -> list[str]:
    quiet = "--no-access-log", "--log-level=error"
    return [str(python), "-m", "uvicorn", application, *quiet, *options]


class Contender:
    """A server process. It logs to another process, as it does in a container."""

    def __init__(self, spec: Spec, log: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.spec = spec
        settings = POOL | {
            "DATABASE_URL": spec.url,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
            "PYTHONDONTWRITEBYTECODE": "",  # else each start compiles
        }
        with tempfile.TemporaryFile("w+") as errors:
            command = [*spec.command, f"--port={port}"]
            before = time.monotonic()
            self.process = psutil.Popen(
                command, env=os.environ | settings, stdout=log, stderr=errors
            )
            self.process.cpu_affinity(spec.cores)
            while True:
                with suppress(OSError), urlopen(f"{self.address}/users/1") as response:
                    response.read()
                    break
                if self.process.poll() is not None or time.monotonic() > before + 60:
                    self.process.kill()
                    errors.seek(0)
                    raise RuntimeError(f"{command} does not answer:\n{errors.read()}")
                time.sleep(0.01)
        self.start = Costs(self.used())
        self.memory = Costs(self.process.memory_info().rss / 2**20)

    def used(self) -> float:
        """Give the CPU time, user and system, of the process and its workers so far."""
        processes = [self.process, *self.process.children(recursive=True)]
        return sum(float(sum(process.cpu_times()[:2])) for process in processes)

    def warm_up(self, operations: Iterable[Operation]) -> None:
        """Ask for all at once, so that what is compiled and prepared on first use is there."""
        few = [operation._replace(clients=CLIENTS // 4) for operation in operations]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda o: load(self.address, o, 2, self.spec.users), few))

    def measure(self, operation: Operation, seconds: int) -> Costs:
        before = self.used()
        answered, *seen = load(self.address, operation, seconds, self.spec.users)
        return Costs((self.used() - before) / answered, *seen)


def compare(
    specs: dict[str, Spec],
    operations: dict[str, Operation],
    rounds: int,
    seconds: int,
    prepare: Callable[[], object] = lambda: None,
) -> Table:
    """Have the contenders take turns at each operation, and give the medians of the rounds."""
    found: list[Table] = []
    for number in range(rounds):
        print(f"{', '.join(specs)}: round {number + 1} of {rounds}", file=sys.stderr)
        prepare()
        contenders: dict[str, Contender] = {}
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as log:
            assert log.stdin
            try:
                for name, spec in specs.items():
                    contenders[name] = Contender(spec, log.stdin.fileno())
                    contenders[name].warm_up(operations.values())
                found.append(
                    {
                        row: {name: c.measure(operation, seconds) for name, c in contenders.items()}
                        for row, operation in operations.items()
                    }
                )
                found[-1][START] = {name: c.start for name, c in contenders.items()}
                found[-1][MEMORY] = {name: c.memory for name, c in contenders.items()}
            finally:
                for contender in contenders.values():
                    contender.process.terminate()
                psutil.wait_procs([contender.process for contender in contenders.values()], 30)
    return {
        row: {
            name: Costs(*map(median, zip(*(table[row][name] for table in found), strict=True)))
            for name in specs
        }
        for row in found[0]
    }


# --- Databases ------------------------------------------------------------------------

DDL = """CREATE TABLE IF NOT EXISTS users (
    id {}, name VARCHAR(100) NOT NULL, email VARCHAR(254) NOT NULL UNIQUE,
    password_hash VARCHAR NOT NULL)"""
INSERT = """INSERT INTO users (name, email, password_hash)
    SELECT 'Ada ' || i, i || '@example.com', 'a constant' FROM """


def fill(url: str, users: int = USERS) -> None:
    """Make the table as main.py does, with so many users in it."""

    async def fill_postgres() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(DDL.format("SERIAL PRIMARY KEY"))
        await connection.execute("TRUNCATE users RESTART IDENTITY")
        await connection.execute(f"{INSERT} generate_series(1, {users}) AS i")
        await connection.execute("VACUUM ANALYZE users")
        await connection.execute("CHECKPOINT")  # not while it is measured
        await connection.close()

    if url.startswith("postgres"):
        asyncio.run(fill_postgres())
        return
    numbers = "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {})"
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute(DDL.format("INTEGER PRIMARY KEY AUTOINCREMENT"))
        connection.execute(f"{INSERT} {numbers.format(users)} SELECT i FROM n)")
        connection.commit()


def create_database(url: str, name: str) -> str:
    """Create a database beside that of a URL, and give its URL."""

    async def create() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    asyncio.run(create())
    return url.replace("/postgres?", f"/{name}?")


class Delay(asyncio.Protocol):
    """An end of a connection that hands on what comes, after a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.loop = asyncio.get_running_loop()
        self.other: asyncio.Future[asyncio.Transport] = self.loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.loop.call_later(self.seconds, self.hand_on, data)

    def hand_on(self, data: bytes) -> None:
        if self.other.done():
            self.other.result().write(data)
        else:
            self.other.add_done_callback(lambda other: other.result().write(data))

    def connection_lost(self, _: Exception | None) -> None:
        self.other.add_done_callback(lambda other: other.result().close())


@contextmanager
def away(url: str, seconds: float) -> Iterator[str]:
    """Give the URL at which a database is so far away, there and back."""
    socket_file = f"{url.partition('?host=')[2]}/.s.PGSQL.5432"

    def make(seconds: float) -> Delay:
        near = Delay(seconds)

        async def connect() -> None:
            far = Delay(seconds)
            await near.loop.create_unix_connection(lambda: far, socket_file)
            near.other.set_result(far.transport)
            far.other.set_result(near.transport)

        tasks.add(near.loop.create_task(connect()))
        return near

    tasks: set[asyncio.Task[None]] = set()  # or they may be collected before they end
    loop = asyncio.SelectorEventLoop(SelectSelector())  # epoll would wait in whole milliseconds
    serving = loop.create_server(lambda: make(seconds / 2), "127.0.0.1")
    server = loop.run_until_complete(serving)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"postgresql://postgres@127.0.0.1:{server.sockets[0].getsockname()[1]}/postgres"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
