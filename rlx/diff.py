"""Shows what differs between two runs: `python -m rlx.diff RUN_A RUN_B`.

Settings, code, versions, machine, and what the runs came to. Of a resumed run the newest part
counts. The exit status is 0 if the settings are the same, 1 if any differs, 2 for bad input;
`rlx.diff.compare(RUN_A, RUN_B)` gives the same rows to Python.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rlx.config.documents import Unreadable, read_file
from rlx.config.options import command
from rlx.problems import cut, refuse, show
from rlx.runs.folders import (
    STATUS_FILE,
    SUMMARY_FILE,
    RunFolder,
    flat,
    is_number,
    read_object,
    settings_now,
)

JSON = dict[str, Any]

CONFIGURATION, CODE, VERSIONS, MACHINE, RESULT = SECTIONS = (
    *("configuration", "code", "versions", "machine", "result"),
)
RESULTS = ("state", "env_steps", "updates", "wall_s", "train_return", "evaluation_return")
HOW_IT_BEGAN = ("resume",)  # settings that say nothing about what a run does
WIDTH = 100  # columns, where the output is no terminal
GAP = "  "
DIFF = "git.diff"


class Absent:
    """Stands for a value that one of the runs has not got."""

    def __repr__(self) -> str:
        return "-"


ABSENT = Absent()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that differs."""

    section: str  # of SECTIONS
    name: str  # agent.optimizer.learning_rate, git, jax, evaluation_return
    a: Any
    b: Any


def compare(run_a: Path | str, run_b: Path | str) -> list[Difference]:
    """All that differs between the runs in two folders, in the order of SECTIONS.

    Raises ConfigError, of one line, for a folder that holds no run or one that cannot be read.
    """
    one, other = describe(Path(run_a)), describe(Path(run_b))
    rows = []
    for section in SECTIONS:
        a, b = one[section], other[section]
        for name in dict.fromkeys([*a, *b]):
            values = a.get(name, ABSENT), b.get(name, ABSENT)
            if _differ(*values):
                rows.append(Difference(section=section, name=name, a=values[0], b=values[1]))
    return _by_group(rows)


def _differ(a: Any, b: Any) -> bool:
    return a != b or isinstance(a, bool) != isinstance(b, bool)  # 1 and 1.0 are the same setting


def _by_group(rows: list[Difference]) -> list[Difference]:
    """The rows of each group of settings side by side, single settings first."""
    groups = dict.fromkeys(_group(row) for row in rows)
    order = {group: number for number, group in enumerate(groups)} | {(CONFIGURATION, ""): -1}
    return sorted(rows, key=lambda row: order[_group(row)])


def _group(row: Difference) -> tuple[str, str]:
    """agent of agent.optimizer.learning_rate; sections but that of settings are one group."""
    return row.section, row.name.rpartition(".")[0] and row.name.partition(".")[0]


# --- what is known of a run ----------------------------------------------------------------------


def describe(run: Path) -> dict[str, JSON]:
    """The values of one run: section -> name -> value."""
    settings = read_settings(run)
    files = sorted(run.glob("env*.json"), key=_number)
    env = read_object(files[-1], strict=True) if files else {}
    versions = env.pop("versions", None)
    status = read_object(run / STATUS_FILE, strict=True)
    summary = status | read_object(run / SUMMARY_FILE, strict=True)
    summary |= {"state": RunFolder(run).state()[0]}
    results = {name: summary[name] for name in RESULTS if name in summary}
    fingerprint = {k: v for k, v in summary.items() if k == "params_sha256"}
    return {
        CONFIGURATION: settings,
        CODE: {"git": env.pop("git", ABSENT), DIFF: _changes(run, files)},
        VERSIONS: flat(versions) if isinstance(versions, dict) else {},
        MACHINE: flat(env),
        RESULT: results | {"resumes": max(0, len(files) - 1)} | fingerprint,
    }


def read_settings(run: Path) -> JSON:
    """Dotted name -> value, as the run was last started; ConfigError where no run is."""
    settings = flat(settings_now(run))
    return {name: value for name, value in settings.items() if name not in HOW_IT_BEGAN}


def _number(path: Path) -> int:
    """3 of env-3.json and of resume-3; 0 of env.json."""
    digits = path.stem.rpartition("-")[2]
    return int(digits) if is_number(digits) else 0


def _changes(run: Path, files: Sequence[Path]) -> str:
    """The uncommitted changes that belong to the newest env.json."""
    name = files[-1].stem.replace("env", "git") if files else "git"
    path = run / f"{name}.diff"
    try:
        return read_file(path).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except Unreadable as error:
        raise refuse("run", f"cannot be read ({error})", given=str(path)) from error


# --- printing ------------------------------------------------------------------------------------


def table(rows: Sequence[Difference], columns: int) -> str:
    """Aligned text: a heading for each section, a blank line between groups of settings."""
    name_width = max((len(row.name) for row in rows), default=0)
    room = max(12, (columns - name_width - 2 - 2 * len(GAP)) // 2)
    pairs = [(row, *shorten(*_texts(row), room)) for row in rows]
    a_width = max((len(a) for _, a, _ in pairs), default=0)
    lines: list[str] = []
    for section, members in groupby(pairs, key=lambda pair: pair[0].section):
        lines += ["", section] if lines else [section]
        for number, (_, group) in enumerate(groupby(members, key=lambda pair: _group(pair[0]))):
            lines += [""] if number else []
            for row, a, b in group:
                lines.append(f"  {row.name:<{name_width}}{GAP}{a:<{a_width}}{GAP}{b}".rstrip())
    return "\n".join(lines)


def _texts(row: Difference) -> tuple[str, str]:
    a, b = _text(row.name, row.a), _text(row.name, row.b)
    if row.name == DIFF:
        return (a, b) if a != b else (f"{a}", f"{b}, others")
    return (a, b) if a != b else (repr(row.a), repr(row.b))  # floats that are nearly the same


def _text(name: str, value: Any) -> str:
    if isinstance(value, Absent):
        return "-"
    if name == DIFF:
        return _size_of_diff(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict):
        return json.dumps(value, default=str)
    return f"{value:_}" if type(value) is int else show(value)


def _size_of_diff(diff: str) -> str:
    """The size of a git.diff: '+12 -3 lines in 2 files'."""
    if not diff:
        return "no changes"
    lines = diff.splitlines()
    added = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
    taken = sum(line.startswith("-") and not line.startswith("---") for line in lines)
    files = sum(line.startswith("diff --git") for line in lines)
    return f"+{added} -{taken} lines in {files} file{'s' * (files != 1)}"


def shorten(a: str, b: str, width: int) -> tuple[str, str]:
    """Both texts in at most `width` columns each, cut so that their difference stays in sight."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    same = min(len(a), len(b)) if same is None else same
    start = same - width // 2 if max(len(a), len(b)) > width else 0
    return _cut(a, start, width), _cut(b, start, width)


def _cut(text: str, start: int, width: int) -> str:
    """`width` columns of a text from `start`, with an ellipsis where something is left out."""
    text = cut(" ".join(text.split("\n")), max(len(text), 1))
    if len(text) <= width:
        return text
    start = max(0, min(start, len(text) - width))
    shown = text[start : start + width]
    shown = shown if start == 0 else "…" + shown[1:]
    return shown if start + width == len(text) else shown[:-1] + "…"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line takes these arguments, in this order."""

    run_a: str
    run_b: str


def main(argv: Sequence[str] | None = None) -> None:
    """`RUN_A RUN_B`."""
    places = ("run_a", "run_b")
    changed = command("rlx.diff", __doc__, Options, _show_changes, argv, places=places)
    sys.exit(int(bool(changed)))


def _show_changes(options: Options) -> bool:
    """Prints the differences; returns whether any setting differs."""
    rows = compare(options.run_a, options.run_b)
    print(f"A  {options.run_a}\nB  {options.run_b}\n")
    changed = any(row.section == CONFIGURATION for row in rows)
    if not changed:
        print("no setting differs" + "\n" * bool(rows))
    columns = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH
    if rows:
        print(table(rows, columns))
    return changed


if __name__ == "__main__":
    main()
