"""Plants bugs one at a time in a copy of rlx and runs the tests that should find them.

`make mutants` plants all of tests/mutants.yaml, `make mutants ARGS=restart` those with such a word
in their names. First all their tests run on the copy as it is: a test that fails anyway finds
nothing. A bug is killed if one of its tests fails. It is none if pytest itself does not get so far,
if it hangs, or if its text does not occur exactly once (any more): each of these is a failure here.
"""

from __future__ import annotations

import compileall
import os
import py_compile
import queue
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".yaml")
COPIED = ("rlx", "hydra_plugins", "conf", "tests", "pyproject.toml")
AT_ONCE = 2
TIMEOUT_S = 180.0  # for the tests of one bug
KILLED = "killed"


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One bug: `before` occurs once in the file, `after` takes its place, `tests` find it."""

    name: str
    file: str
    before: str
    after: str
    tests: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of one bug, and the test or the line that tells of it."""

    bug: Bug
    outcome: str
    by: str = ""
    seconds: float = 0.0


def read() -> list[Bug]:
    """The bugs of the list, whose groups are for its readers only."""
    groups = yaml.safe_load(LIST.read_text()).values()
    return [Bug(name=name, **bug) for group in groups for name, bug in group.items()]


def main(words: Sequence[str]) -> int:
    """Plants the bugs that have one of these words in their names, or all; 0 if none survived."""
    bugs = [bug for bug in read() if not words or any(word in bug.name for word in words)]
    if not bugs:
        print(f"no bug has {' or '.join(words)} in its name; {LIST} lists them")
        return 2
    with tempfile.TemporaryDirectory(prefix="rlx-mutants-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(AT_ONCE):
            copies.put(copy(Path(folder) / str(number)))
        os.environ["RLX_COMPILED"] = str(Path(folder) / "compiled")  # what one compiles all use
        if not pass_as_they_are(copies, bugs):
            return 2
        with ThreadPoolExecutor(AT_ONCE) as threads:
            found = [shown(one) for one in threads.map(lambda bug: plant_in_any(copies, bug), bugs)]
    return sum_up(found)


def copy(folder: Path) -> Path:
    """A copy of the sources and their tests."""
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / name, folder / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, folder / name)
    # By their contents: two bugs of one file may share a second and a size.
    by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(folder / "rlx", quiet=1, invalidation_mode=by_hash)
    return folder


def pass_as_they_are(copies: queue.SimpleQueue[Path], bugs: Sequence[Bug]) -> bool:
    """Runs every test that is named, once; says which fail without any bug."""
    tests = sorted({test for bug in bugs for test in bug.tests})
    print(f"{len(bugs)} bugs, {len(tests)} tests; first the tests as they are", flush=True)
    began, place = monotonic(), copies.get()
    ended = run_tests(place, tests, "-n", str(AT_ONCE), "--dist", "loadgroup", timeout_s=1200.0)
    copies.put(place)
    if ended is None or ended.returncode:
        print("without any bug:", *lines(ended), sep="\n")
        return False
    print(f"they pass, after {monotonic() - began:.0f} s", flush=True)
    return True


def plant_in_any(copies: queue.SimpleQueue[Path], bug: Bug) -> Found:
    """Plants a bug in the copy that is free."""
    place = copies.get()
    try:
        return plant(place, bug)
    finally:
        copies.put(place)


def plant(place: Path, bug: Bug) -> Found:
    """Plants a bug, runs its tests, and takes it out again."""
    path, began = place / bug.file, monotonic()
    text = path.read_text() if path.is_file() else ""
    if text.count(bug.before) != 1:
        says = f"its text occurs {text.count(bug.before)} times in {bug.file}"
        return Found(bug=bug, outcome="does not apply", by=says)
    path.write_text(text.replace(bug.before, bug.after))
    try:
        ended = run_tests(place, bug.tests, timeout_s=TIMEOUT_S)
    finally:
        path.write_text(text)
    seconds = monotonic() - began
    if ended is None:
        return Found(bug=bug, outcome="hangs", by=f"after {TIMEOUT_S:.0f} s", seconds=seconds)
    if ended.returncode == 0:
        return Found(bug=bug, outcome="SURVIVED", by=", ".join(bug.tests), seconds=seconds)
    failed = [line for line in lines(ended) if line.startswith(("FAILED ", "ERROR "))]
    if ended.returncode != 1 or not failed:
        last = (lines(ended) or ["nothing was said"])[-1]
        return Found(bug=bug, outcome="breaks pytest", by=last, seconds=seconds)
    by = failed[0].partition(" ")[2].partition(" - ")[0]
    return Found(bug=bug, outcome=KILLED, by=by, seconds=seconds)


def run_tests(
    place: Path, tests: Sequence[str], *options: str, timeout_s: float
) -> subprocess.CompletedProcess[str] | None:
    """Runs tests in a copy; None if they did not end in time."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options]
    environment = os.environ | {"PYTHONPATH": str(place)}
    try:
        return subprocess.run(
            [*command, *tests],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return None


def lines(ended: subprocess.CompletedProcess[str] | None) -> list[str]:
    """The last lines that pytest has said."""
    return ["no end in time"] if ended is None else (ended.stdout + ended.stderr).splitlines()[-25:]


def shown(one: Found) -> Found:
    """The outcome, printed as a line of the table."""
    print(f"{one.outcome:14}  {one.bug.name:44}  {one.seconds:5.0f} s  {one.by}", flush=True)
    return one


def sum_up(found: Sequence[Found]) -> int:
    """Says how many were killed; returns 0 if all were."""
    counts = Counter(one.outcome for one in found)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    print(f"{len(found)} bugs: {told}")
    return 0 if counts[KILLED] == len(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
