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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from selectors import SelectSelector
from statistics import median
from typing import NamedTuple, Self
from urllib.request import urlopen

import asyncpg
import psutil
from load import CLIENTS, Operation, load

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CORES = sorted(os.sched_getaffinity(0))  # the first is the contenders'
OTHERS = CORES[1:] or CORES  # for the database and the load
USERS = 10_000
POOL = {"POOL": str(CLIENTS), "DATABASE_POOL_SIZE": str(CLIENTS)}


class Spec(NamedTuple):
    """How to start a contender; with --port it is complete."""

    command: list[str]
    url: str
    users: int = USERS
    cores: list[int] = CORES[:1]
    asked: Callable[[], int] = lambda: 0  # how often the database has been, where that is counted


class Costs(NamedTuple):
    """What an operation costs: CPU seconds a request, and what its clients see."""

    cpu: float
    rate: float = 0
    median: float = 0
    slow: float = 0
    trips: float = 0  # to the database and back, where they are counted


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
            os.sched_setaffinity(0, spec.cores)  # a thread keeps those that it begins with
            self.process = psutil.Popen(
                command, cwd=ROOT, env=os.environ | settings, stdout=log, stderr=errors
            )
            os.sched_setaffinity(0, OTHERS)
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
        self.memory = Costs(max(each.memory_info().rss for each in self.processes()) / 2**20)

    def processes(self) -> list[psutil.Process]:
        """Give the process and its workers; or that which a wrapper, as of node, has started."""
        return [self.process, *self.process.children(recursive=True)]

    def used(self) -> float:
        """Give the CPU time, user and system, of the process and its workers so far."""
        return sum(float(sum(process.cpu_times()[:2])) for process in self.processes())

    def warm_up(self, operations: Iterable[Operation]) -> None:
        """Ask for all at once, so that what is compiled and prepared on first use is there."""
        few = [operation._replace(clients=CLIENTS // 4) for operation in operations]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda o: load(self.address, o, 2, self.spec.users), few))

    def measure(self, operation: Operation, seconds: int) -> Costs:
        used, asked = self.used(), self.spec.asked()
        answered, rate, median, slow = load(self.address, operation, seconds, self.spec.users)
        cpu, trips = self.used() - used, self.spec.asked() - asked
        return Costs(cpu / answered, rate, median, slow, trips / answered)


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
                first = number % len(specs)  # another in each round
                turns = [*contenders.items()]
                turns = turns[first:] + turns[:first]
                found.append(
                    {
                        row: {name: c.measure(operation, seconds) for name, c in turns}
                        for row, operation in operations.items()
                    }
                )
                found[-1][START] = {name: c.start for name, c in contenders.items()}
                found[-1][MEMORY] = {name: c.memory for name, c in contenders.items()}
            finally:
                processes = [p for contender in contenders.values() for p in contender.processes()]
                for process in reversed(processes):  # a wrapper of node does not end its own
                    process.terminate()
                psutil.wait_procs(processes, 30)
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

    def __init__(self, seconds: float, count: Callable[[], object]) -> None:
        self.seconds, self.count = seconds, count
        self.loop = asyncio.get_running_loop()
        self.other: asyncio.Future[asyncio.Transport] = self.loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.count()
        self.loop.call_later(self.seconds, self.hand_on, data)

    def hand_on(self, data: bytes) -> None:
        self.other.add_done_callback(lambda other: other.result().write(data))

    def connection_lost(self, _: Exception | None) -> None:
        self.other.add_done_callback(lambda other: other.result().close())


class Distance:
    """A TCP proxy that takes so many seconds, there and back, and counts what is asked."""

    def __init__(self, url: str, seconds: float) -> None:
        self.socket_file = f"{url.partition('?host=')[2]}/.s.PGSQL.5432"
        self.seconds = seconds / 2
        self.asked = 0
        self.tasks: set[asyncio.Task[None]] = set()  # or they may be collected before they end
        self.loop = asyncio.SelectorEventLoop(SelectSelector())  # epoll waits whole milliseconds
        server = self.loop.run_until_complete(self.loop.create_server(self.accept, "127.0.0.1"))
        port = server.sockets[0].getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        self.thread = threading.Thread(target=self.loop.run_forever)

    def count(self) -> None:
        self.asked += 1

    def accept(self) -> Delay:
        near = Delay(self.seconds, self.count)
        self.tasks.add(self.loop.create_task(self.connect(near)))
        return near

    async def connect(self, near: Delay) -> None:
        far = Delay(self.seconds, int)
        await self.loop.create_unix_connection(lambda: far, self.socket_file)
        near.other.set_result(far.transport)
        far.other.set_result(near.transport)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
