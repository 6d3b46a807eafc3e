"""Ask a server for as much as it answers, with wrk, or with Python where there is none."""

import asyncio
import itertools
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from statistics import quantiles
from typing import NamedTuple
from uuid import uuid4

WRK = shutil.which("wrk")
CLIENTS = 16


class Operation(NamedTuple):
    """A request: ID is any user's, END is 100 before the last, UNIQUE is never the same."""

    method: str
    path: str
    body: str = ""
    clients: int = CLIENTS


class Load(NamedTuple):
    answered: int
    rate: float  # requests a second
    median: float  # seconds
    slow: float  # the 99th percentile


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
done = function(summary, latency)
    local e = summary.errors
    print("errors", e.connect + e.read + e.write + e.status + e.timeout)
    print(summary.requests, summary.duration, latency:percentile(50), latency:percentile(99))
end
"""


def load(url: str, operation: Operation, seconds: int, users: int) -> Load:
    """Have all clients ask, each again when it is answered."""
    operation = operation._replace(path=operation.path.replace("END", str(users - 100)))
    found = (with_wrk if WRK else with_python)(url, operation, seconds, users)
    # A machine that is stalled may answer nothing in a second.
    return found if found.answered > 1 else load(url, operation, 2 * seconds, users)


def with_wrk(url: str, operation: Operation, seconds: int, users: int) -> Load:
    script = LUA.replace("USERS", str(users)).replace("RUN", uuid4().hex)
    for field in "method", "path", "body":
        script = script.replace(field.upper(), getattr(operation, field))
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        options = [f"--connections={operation.clients}", f"--duration={seconds}", "--timeout=30"]
        command = ["wrk", "--threads=1", *options, f"--script={file.name}", url]
        printed = subprocess.check_output(command, text=True)
    errors, figures = printed.splitlines()[-2:]
    assert errors.split() == ["errors", "0"], printed
    answered, duration, median, slow = (float(figure) for figure in figures.split())
    return Load(int(answered), answered / duration * 1e6, median / 1e6, slow / 1e6)


def with_python(url: str, operation: Operation, seconds: int, users: int) -> Load:
    host, port = url.removeprefix("http://").split(":")
    begin = time.monotonic()
    times: list[float] = []

    def requests() -> Iterator[bytes]:
        run = uuid4().hex
        for number in itertools.count():
            content = operation.body.replace("UNIQUE", f"{run}-{number}")
            target = operation.path.replace("ID", str(random.randint(1, users)))
            head = [
                f"{operation.method} {target} HTTP/1.1",
                f"Host: {host}",
                "Content-Type: application/json",
                f"Content-Length: {len(content)}",
            ]
            yield "\r\n".join([*head, "", content]).encode()

    async def client(requests: Iterator[bytes]) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        while (before := time.monotonic()) < begin + seconds:
            writer.write(next(requests))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 20"), head
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
            times.append(time.monotonic() - before)
        writer.close()

    async def clients() -> None:
        each = requests()
        await asyncio.gather(*(client(each) for _ in range(operation.clients)))

    asyncio.run(clients())
    percentiles = quantiles(times, n=100)
    rate = len(times) / (time.monotonic() - begin)
    return Load(len(times), rate, percentiles[49], percentiles[98])
