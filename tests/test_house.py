"""The size of things: what keeps modules and functions readable, and one transition short."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import mutants

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {  # what a library asks us to inherit from
    "Protocol", "NamedTuple", "nn.Module", "Head", "ActionHead", "Core", "Torso",
    "Launcher", "Sweeper",
    "BaseHTTPRequestHandler", "ThreadingHTTPServer", "CompactHydraException",
    "gymnasium.Env", "gymnasium.Wrapper", "gymnasium.ObservationWrapper",
}  # fmt: skip
ERRORS = {"Exception", "RuntimeError", "ValueError", "RunFailed", "CheckpointError"} | {
    "FloatingPointError", "KeyboardInterrupt",
}  # fmt: skip

LARGEST = 500_000  # bytes of a file in the repository


def sources() -> list[Path]:
    return [*ROOT.glob("rlx/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")]


def nodes(*more: str) -> Iterator[tuple[str, ast.AST]]:
    """The nodes of the product, and of the folders that are named."""
    for path in [*sources(), *(path for name in more for path in ROOT.glob(f"{name}/**/*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def functions() -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {f"{at} {node.name}": node for at, node in nodes() if isinstance(node, kinds)}


def test_functions_fit_on_a_page_and_most_are_a_few_lines():
    lines = {at: (node.end_lineno or 0) - node.lineno + 1 for at, node in functions().items()}
    assert {at: n for at, n in lines.items() if n > 60} == {}
    assert statistics.median(lines.values()) <= 6
    assert statistics.quantiles(lines.values(), n=10)[-1] <= 18


def test_constructors_have_few_parameters():
    found = {}
    for at, node in functions().items():
        count = len(node.args.args) + len(node.args.kwonlyargs) - 1
        if node.name == "__init__" and count > 12:
            found[at] = count
    assert found == {}


def test_modules_are_short_and_few_lie_at_the_top():
    long = {path.name: n for path in sources() if (n := len(path.read_text().splitlines())) > 450}
    assert long == {}
    assert len(list((ROOT / "rlx").glob("*.py"))) <= 18


def test_nothing_is_inherited_but_protocols_modules_and_one_level_of_errors():
    classes = {at: node for at, node in nodes() if isinstance(node, ast.ClassDef)}
    bases = {
        f"{at} {node.name}": ast.unparse(base).partition("[")[0]
        for at, node in classes.items()
        for base in node.bases
    }
    assert {at: base for at, base in bases.items() if base not in LIBRARIES | ERRORS} == {}


@pytest.fixture(scope="module")
def followed() -> str:
    done = subprocess.run(
        [sys.executable, "docs/make/transition.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.xdist_group("transition")  # one process follows it for both
def test_one_transition_crosses_few_files(followed):
    counted = re.match(r"(\d+) files, (\d+) lines of functions entered:", followed)
    assert counted, followed[:200]
    files, lines = map(int, counted.groups())
    assert files <= 14
    assert lines <= 900
    listed = re.findall(r"^- `([\w/]+\.py)`, (\d+) lines", followed, re.M)
    assert len(listed) == files
    assert sum(int(n) for _, n in listed) == lines
    for file in ("envs/envpool.py", "replay/ring/ring.py", "training/learner.py"):
        assert file in dict(listed), "the script lost the transition"


@pytest.mark.xdist_group("transition")  # one process follows it for both
def test_the_design_lists_the_files_that_a_transition_crosses(followed):
    page = (ROOT / "docs" / "design.md").read_text()
    between = page.partition("<!-- transition: begin -->")[2].partition("<!-- transition: end")[0]
    files = re.findall(r"^- `([\w/]+\.py)`", between, re.M)
    assert files == re.findall(r"^- `([\w/]+\.py)`", followed, re.M), (
        "run python docs/make/transition.py --write"
    )


MID_CLAUSE = {
    "What", "Where", "How", "When", "Which", "Why", "Of", "Those", "That", "And", "Or", "But",
    "For", "With", "As", "To", "If", "In", "By", "Else", "Then", "Whose", "From", "Once", "While",
    "Whether",
}  # fmt: skip


def test_no_file_is_large_and_none_is_one_that_git_ignores():
    """A trace or a run's folder is easily added by accident, and a history keeps it for ever."""

    def listed(*more: str) -> list[str]:
        git = ["git", "ls-files", "-z", *more]
        names = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return [name for name in names.split("\0") if name]

    assert listed("--cached", "--ignored", "--exclude-standard") == []
    sizes = {name: path.stat().st_size for name in listed() if (path := ROOT / name).is_file()}
    assert {name: size for name, size in sizes.items() if size > LARGEST} == {}


def test_docstrings_begin_with_a_subject_or_a_verb():
    described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = nodes("tests", "experiments")
    texts = {at: ast.get_docstring(node) for at, node in found if isinstance(node, described)}
    wrong = {at: text for at, text in texts.items() if text and text.split()[0] in MID_CLAUSE}
    assert wrong == {}


def test_every_planted_bug_has_its_place_in_the_code():
    """`make mutants` is run by hand; what it would plant must not be gone by then."""
    counts = {bug.name: (ROOT / bug.file).read_text().count(bug.before) for bug in mutants.read()}
    assert {name: count for name, count in counts.items() if count != 1} == {}
