"""Follows one transition from the environment to the gradient: `python docs/make/transition.py`.

It trains the default run for a few hundred env steps and notes every function of rlx that has the
transition in its hands: that takes, holds or returns one of the records it travels in. Files and
lines of those functions are the reading list of docs/design.md; `--write` puts it there. Networks
are counted by their entrance (networks/recurrent.py): below it is the choice of torso and core.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import tempfile
import textwrap
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import rlx

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rlx"
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- transition: begin -->\n", "<!-- transition: end -->\n"
COLUMNS = 118
START = "train"
TRAVELS = ("Timestep", "NetInput", "Row", "Rollout", "Blocks", "Drawn", "Sample", "Batch")
BELOW = ("networks/torsos", "networks/cores", "networks/convolution", "networks/heads")
BESIDE = ("trees.py", "runs/", "statistics.py", "seeding.py")  # they see every record
SETTINGS = [
    *("total_env_steps=400", "replay.min_sequences=8", "learner.batch_size=4"),
    *("acting.envs_per_actor=4", "acting.env_steps_per_request=32", "replay.ratio=4"),
    *("evaluation.final_episodes=0", "checkpoint.replay=false", "logging.console=off"),
]


class Follower:
    """Collects the functions that have the transition in their hands when they return."""

    def __init__(self) -> None:
        self.seen: dict[CodeType, None] = {}  # in the order of the first call
        self._other: set[CodeType] = set()  # nobody's who will be asked again
        self._trains = False  # the parts are built before, of specs that look like records

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "return" or code in self._other:
            self._trains |= code.co_qualname == START
            return
        if not is_ours(code):
            self._other.add(code)
            return
        new = self._trains and code not in self.seen and not code.co_name.startswith("__")
        if new and any(holds(value) for value in (*frame.f_locals.values(), argument)):
            self.seen[code] = None


def is_ours(code: CodeType) -> bool:
    """True if a function is rlx's, and no part of what is only passed by."""
    path = Path(code.co_filename)
    if PACKAGE not in path.parents or code.co_name.startswith("<"):
        return False
    name = path.relative_to(PACKAGE).as_posix()
    return not name.startswith((*BELOW, *BESIDE))


def holds(value: Any, depth: int = 2) -> bool:
    """True if a value is, or has among its items, a record that the transition travels in."""
    if type(value).__name__ in TRAVELS and dataclasses.is_dataclass(value):
        return True
    if depth and isinstance(value, tuple | list):
        return any(holds(item, depth - 1) for item in value[:8])
    return False


def follow() -> dict[str, list[tuple[str, int]]]:
    """File below rlx/ -> (function, lines), both in the order in which they are first entered."""
    follower = Follower()
    with tempfile.TemporaryDirectory() as folder:
        sys.setprofile(follower)
        try:
            rlx.run(rlx.compose(SETTINGS), folder)
        finally:
            sys.setprofile(None)
    files: dict[str, list[tuple[str, int]]] = {}
    for code in follower.seen:
        name = Path(code.co_filename).relative_to(PACKAGE).as_posix()
        files.setdefault(name, []).append((code.co_qualname, lines_of(code)))
    return files


def lines_of(code: CodeType) -> int:
    """Lines of its source, with docstring and comments."""
    return len(inspect.getsourcelines(code)[0])


def listed(files: dict[str, list[tuple[str, int]]]) -> str:
    """The list as Markdown."""
    total = sum(lines for functions in files.values() for _, lines in functions)
    items = [
        textwrap.fill(
            f"- `{name}`, {sum(lines for _, lines in functions)} lines: "
            f"{', '.join(f'`{function}`' for function, _ in functions)}",
            width=COLUMNS,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, functions in files.items()
    ]
    head = f"{len(files)} files, {total} lines of functions entered:\n\n"
    return head + "\n".join(items) + "\n"


def write(text: str) -> None:
    """Puts the list between its marks in docs/design.md."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    found = listed(follow())
    print(found)
    if "--write" in sys.argv[1:]:
        write(found)
