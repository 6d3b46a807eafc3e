"""Execute what README.md shows.

readme.py test              runs each block under "## Test", and looks for the tests that are named
readme.py run               runs each block under "## Run", and replays the transcript against it
readme.py deploy            runs the block under "## Deploy" with Docker, and the transcript
readme.py show H LANGUAGE   prints the first block of a language under a heading H of OPERATING.md

`test` and `run` need `uv`. In a folder without .venv, `test` runs the command of uv before there is
one, and `run` runs it beside one. Without `--isolated` uv adds what is installed beside Python,
plugins of pytest among it; without `--no-project` what a project in a folder above asks for.
"""

import doctest
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPERATING = (ROOT / ".github" / "OPERATING.md").read_text()
PROMISES = (ROOT / ".github" / "PROMISES.md").read_text()
RECIPES = (ROOT / ".github" / "RECIPES.md").read_text()
OWN = "Tests as in FastAPI's tutorial"


def blocks(text: str, heading: str) -> list[tuple[str, str]]:
    """Give the languages and contents of the fenced blocks under a heading."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def contents(heading: str, language: str) -> list[str]:
    """Give the blocks of a language under a heading of README.md."""
    return [content for found, content in blocks(README, heading) if found == language]


def commands(heading: str) -> tuple[str, str]:
    """Give the command for pip and the one for uv under a heading of README.md."""
    with_pip, with_uv = contents(heading, "sh")
    assert "pip install" in with_pip
    assert with_uv.startswith("uv run ")
    assert with_pip.count("\n") == with_uv.count("\n") == 1  # one line to paste
    return with_pip, with_uv


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Fail if git sees more, or less, in the end than in the beginning."""
    status = ["git", "status", "--porcelain", "--untracked-files=all"]
    before = subprocess.check_output(status, cwd=ROOT, text=True)
    yield
    after = subprocess.check_output(status, cwd=ROOT, text=True)
    if before != after:
        sys.exit(f"What git sees has changed:\n{before}became\n{after}")


def replay(transcript: str, url: str) -> int:
    """Run each `$ command` and compare what it prints; give the number of those that differ."""
    failures = 0
    checker = doctest.OutputChecker()
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", transcript, re.MULTILINE):
        real = command.replace("curl", "curl -sS", 1).replace(
            "localhost:8000", url.removeprefix("http://")
        )
        printed = subprocess.run(
            ["bash", "-c", real], capture_output=True, text=True, check=True
        ).stdout
        printed = printed.replace("\r", "").rstrip("\n") + "\n"
        if not checker.check_output(expected.rstrip("\n") + "\n", printed, doctest.ELLIPSIS):
            failures += 1
            print(f"$ {command}\nREADME.md:\n{expected}\nreally:\n{printed}")
    return failures


def test_of_ones_own() -> int:
    """Run the tests that README.md and RECIPES.md show, each in an empty directory."""
    code = 0
    tests = *contents("Test", "python"), dict(blocks(RECIPES, OWN))["python"]
    for test in tests:
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "test_mine.py").write_text(test)
            command = [f"{ROOT}/.venv/bin/python", "-m", "pytest", "-W", "error", directory]
            url = f"sqlite:///{directory}/mine.db"
            environment = os.environ | {"PYTHONPATH": str(ROOT), "DATABASE_URL": url}
            code |= subprocess.run(command, cwd=directory, env=environment).returncode
    return code


def run(command: str) -> int:
    """Start the service on a free port and an empty SQLite database; replay the transcript."""
    with tempfile.TemporaryDirectory() as directory, (Path(directory) / "log").open("wb+") as log:
        database = f"sqlite:///{directory}/users.db"
        server = subprocess.Popen(
            ["bash", "-ec", command],
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": database, "UVICORN_PORT": "0"},
            stdout=log,
            stderr=log,
            start_new_session=True,  # a signal for bash alone would leave the service running
        )
        try:
            while not (found := re.findall(r"running on (http://\S+)", Path(log.name).read_text())):
                if server.poll() is not None:
                    sys.exit(Path(log.name).read_text())
                time.sleep(0.1)
            return replay(contents("Run", "console")[0], found[0])
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def deploy() -> int:
    """Build the image, start it, wait until it is healthy, replay the transcript, and stop it."""
    name = "users-of-the-readme"

    def docker(*arguments: str) -> str:
        return subprocess.run(
            ["docker", *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    [script] = contents("Deploy", "sh")
    script = script.replace("-v users:", f"-v {name}:")
    script = script.replace("docker run", f"docker run --detach --name={name}")
    try:
        subprocess.run(["bash", "-ec", script], cwd=ROOT, check=True)
        while (health := docker("inspect", "--format={{.State.Health.Status}}", name)) != "healthy":
            if health != "starting":
                sys.exit(docker("logs", name))
            time.sleep(1)
        failures = replay(contents("Run", "console")[0], "http://localhost:8000")
        docker("stop", name)
        code = docker("inspect", "--format={{.State.ExitCode}}", name)
        if code not in ("0", "143"):
            sys.exit(f"docker stop ended it with code {code}")
        return failures
    finally:
        docker("rm", "--force", name)
        docker("volume", "rm", "--force", name)


def untested() -> list[str]:
    """Give the promises without a test, and the tests that are named and nobody wrote."""
    tests = "".join(file.read_text() for file in (ROOT / "test_main.py", *ROOT.glob(".ci/*.py")))
    there = set(re.findall(r"def (test_\w+)", tests))
    rows = re.findall(r"^\| (?!promise)(.+) \|$", PROMISES, re.MULTILINE)
    assert rows
    bare = [row for row in rows if not re.search(r"`test_\w+`", row)]
    return bare + sorted(set(re.findall(r"`(test_\w+)`", PROMISES)) - there)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["test"]:
            if found := untested():
                sys.exit(f"Of PROMISES.md, without a test: {found}")
            for command in reversed(commands("Test")):
                with leaving_nothing():
                    subprocess.run(["bash", "-ec", command], cwd=ROOT, check=True)
            sys.exit(test_of_ones_own())
        case ["run"]:
            with leaving_nothing():
                failures = sum(run(command) for command in commands("Run"))
            sys.exit(failures)
        case ["deploy"]:
            sys.exit(deploy())
        case ["show", heading, language]:
            print(dict(blocks(OPERATING, heading))[language], end="")
        case _:
            sys.exit(__doc__)
