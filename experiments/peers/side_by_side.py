"""This module runs programs of others beside rlx: environments, runs in turn, a table of ratios.

A script of this folder describes its comparison (`Comparison`) and calls `main` with it. A peer's
packages are installed with pinned versions in a virtual environment of its own; each program runs
once a round; a ratio is taken within a round. Every wait ends, with all its processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rlx.problems import first_line

ROOT = Path(__file__).resolve().parents[2]
DIGITS = (0, 2)  # after the point, of env steps and of updates
NEVER = "1_000_000_000"  # as many env steps as no run here makes


class Failed(Exception):
    """A step did not work; the text says why, in one line."""


class Speed(NamedTuple):
    env_steps: float  # per second
    updates: float  # per second


class Mark(NamedTuple):
    """A mark is a moment of a run."""

    env_steps: int
    updates: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program is one row of the table: how it is run, and how its log is read."""

    name: str
    peer: str  # whose work it does; its own name where it is the peer
    start: int  # env steps at which the measured part begins
    command: Callable[[Path], list[str]]  # of a run in this folder
    marks: Callable[[Path], Iterator[Mark]]  # of a run that was made there
    path: Path | None  # of modules that are not installed


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison is what a script of this folder gives: options, programs, and its table."""

    defaults: Mapping[str, str]  # of the options; folder, rounds and deadline_s are needed
    least: Mapping[str, int]  # of options that are whole numbers
    needs: Mapping[str, str]  # option of a checkout -> a file that it has
    programs: Callable[[Mapping[str, str], Path, dict[str, str]], list[Program]]
    measures: Sequence[str]  # columns of the table, in the order of Speed
    shown: Mapping[str, Sequence[str]]  # environment -> packages whose versions are printed


# --- processes -----------------------------------------------------------------------------------


def called(command: Sequence[str], seconds: float, log: Path, **settings) -> None:
    """Runs a command with its output in `log`; ends it and all its children at the deadline."""
    with log.open("wb") as out:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
        process = subprocess.Popen(command, start_new_session=True, **streams, **settings)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # children may outlive it, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        why = f"not done after {seconds:.0f} s" if code is None else f"exit status {code}"
        raise Failed(f"{why}, the last line of {log}: {last_line(log)}")


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "(nothing)"


def installed(
    folder: Path, name: str, packages: Sequence[str], seconds: float, maker: str = sys.executable
) -> Path:
    """Returns the Python of a peer's environment, which is made unless it has these packages.

    `maker` is the Python that makes it, for a peer that this one is too new for.
    """
    home, log = folder / f"venv_{name}", folder / f"pip_{name}.log"
    python, done = home / "bin" / "python", home / "packages.txt"
    if not (done.exists() and done.read_text() == "\n".join(packages)):
        print(f"{name}: installing into {home} ...", flush=True)
        try:
            answer(maker, "")
        except (Failed, OSError):
            raise Failed(f"{maker}: no Python that runs; give the path of one") from None
        called([maker, "-m", "venv", "--clear", str(home)], seconds, log)
        pip = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        called([*pip, *packages], seconds, log)
        done.write_text("\n".join(packages))
    return python


def answer(python: Path | str, code: str, *arguments: str) -> str:
    """Returns what a line or two of Python print in another environment; waits a minute at most."""
    try:
        return subprocess.run(
            [str(python), "-c", code, *arguments],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout.strip()  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise Failed(f"{python}: {(error.stderr.strip() or 'failed').splitlines()[-1]}") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{python}: no answer after 60 s") from None


# --- logs ----------------------------------------------------------------------------------------

EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0}).Reload()
print(json.dumps([(e.step, e.value, e.wall_time) for e in events.Scalars(sys.argv[2])]))
"""


def scalars(python: Path, run: Path, tag: str) -> list[tuple[int, float, float]]:
    """Returns step, value and time in seconds of a run's events with this tag."""
    return [(*event,) for event in json.loads(answer(python, EVENTS, str(run), tag))]


def event_marks(
    python: Path, runs: str, tag: str, env_steps_per_update: float, folder: Path
) -> Iterator[Mark]:
    """Yields TensorBoard's events with this tag, of the runs in `folder` that the pattern finds."""
    for run in folder.glob(runs):
        for step, _, seconds in scalars(python, run, tag):
            yield Mark(step, step / env_steps_per_update, seconds)


def json_marks(rows: str, seconds: str, folder: Path) -> Iterator[Mark]:
    """Yields the rows of a file of JSON lines with env_steps, updates, and seconds by that name."""
    for line in (folder / rows).read_text().splitlines():
        row = json.loads(line)
        yield Mark(row["env_steps"], row["updates"], row[seconds])


rlx_marks = partial(json_marks, "run/metrics.jsonl", "wall_s")


# --- the comparison ------------------------------------------------------------------------------


def chosen(given: Mapping[str, str], option: str, known: Iterable[str]) -> list[str]:
    """Returns the words of an option, which are some of the known ones, or "all"."""
    words = list(known) if given[option] == "all" else given[option].split(",")
    if unknown := set(words) - set(known):
        raise Failed(
            f"{option}={given[option]}: {', '.join(unknown)} is none of {', '.join(known)}"
        )
    return words


def bound(count: int) -> None:
    """Binds this process, and so all that it starts, to so many CPU cores."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise Failed(f"cores={count}: this machine has {len(cores)}")
    os.sched_setaffinity(0, cores[:count])


def rlx_command(overrides: Sequence[str], steps: int, folder: Path) -> list[str]:
    ends = (f"total_env_steps={steps}", f"hydra.run.dir={folder}/run")
    return [sys.executable, "-m", "rlx.train", *overrides, *ends]


def with_rlx(peer: Program, steps: int, runs: Mapping[str, Sequence[str]]) -> list[Program]:
    """Returns the peer's program, followed by rlx's runs of its work, by name with overrides."""
    same = {"peer": peer.name, "start": peer.start, "marks": rlx_marks, "path": ROOT}
    commands = {name: partial(rlx_command, overrides, steps) for name, overrides in runs.items()}
    return [peer, *(Program(name=name, command=run, **same) for name, run in commands.items())]


@contextmanager
def noted(missing: dict[str, str], peer: str) -> Iterator[None]:
    """A peer that cannot be prepared is named at the end, and the others go on."""
    try:
        yield
    except Failed as error:
        missing[peer] = str(error)


def measured(program: Program, folder: Path, given: Mapping[str, str]) -> Speed:
    """Runs a program once and reads its speed."""
    folder.mkdir(parents=True)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(program.path or "")}
    command = program.command(folder)
    called(command, float(given["deadline_s"]), folder / "output.log", cwd=folder, env=env)
    marks = [mark for mark in program.marks(folder) if mark.env_steps >= program.start]
    if len(marks) < 2:
        raise Failed(f"{folder}: fewer than two rows after {program.start:,} env steps")
    first, last = marks[0], marks[-1]
    seconds = last.seconds - first.seconds
    return Speed(
        (last.env_steps - first.env_steps) / seconds, (last.updates - first.updates) / seconds
    )


Results = list[tuple[Program, list[Speed]]]  # of each round


def told(measures: Sequence[str], values: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Yields the measures of a speed, each with its number as it is printed."""
    for measure, value, digits in zip(measures, values, DIGITS, strict=False):
        yield measure, f"{value:,.{digits}f}"


def rounds(
    found: Sequence[Program],
    given: Mapping[str, str],
    folder: Path,
    missing: dict[str, str],
    measures: Sequence[str],
) -> Results:
    """Returns all programs with their speeds; one that fails is left out, a peer with its rlx."""
    speeds: dict[str, list[Speed]] = {program.name: [] for program in found}
    base = folder / f"runs_{os.getpid()}"
    for number in range(int(given["rounds"])):
        for program in found:
            if missing.keys() & {program.name, program.peer}:
                continue
            at = base / f"{number}_{''.join(c if c.isalnum() else '_' for c in program.name)}"
            load = os.getloadavg()[0]
            try:
                speed = measured(program, at, given)
            except (Failed, OSError, ValueError, KeyError, ArithmeticError) as error:
                missing[program.name] = first_line(error)
                continue
            speeds[program.name].append(speed)
            text = ", ".join(f"{value} {measure}/s" for measure, value in told(measures, speed))
            print(
                f"round {number + 1}, {program.name}: {text} (load before it {load:.1f})",
                flush=True,
            )
    whole = [p for p in found if not missing.keys() & {p.name, p.peer}]
    return [(program, speeds[program.name]) for program in whole]


def ratio(of_rounds: Sequence[tuple[float, float]]) -> str:
    """Returns the median of the rounds' ratios with their range; nothing where a peer has 0."""
    if not all(other for _, other in of_rounds):
        return ""
    found = sorted(one / other for one, other in of_rounds)
    return f"{median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def table(results: Results, measures: Sequence[str]) -> Iterator[str]:
    """Yields lines: medians over the rounds, and of the rounds' own ratios, with their range."""
    columns = [f"{measure}/s" for measure in measures]
    ratios = [f"{column}, rlx / peer" for column in columns]
    yield f"| {' | '.join(['program', *columns, *ratios])} |"
    yield "|---" * (1 + 2 * len(measures)) + "|"
    peers = {program.peer: speeds for program, speeds in results if program.name == program.peer}
    for program, speeds in results:
        medians = [median(values) for values in zip(*speeds, strict=True)]
        cells = [text for _, text in told(measures, medians)]
        for which in range(len(measures)) if program.name != program.peer else ():
            own = peers[program.peer]
            cells += [ratio([(a[which], b[which]) for a, b in zip(speeds, own, strict=True)])]
        cells += [""] * (2 * len(measures) - len(cells))
        yield f"| {program.name} | {' | '.join(cells)} |"


def versions(folder: Path, shown: Mapping[str, Sequence[str]]) -> Iterator[str]:
    code = "import sys, platform\nfrom importlib.metadata import distributions\n"
    code += "has = {d.metadata['Name'].lower(): d.version for d in distributions()}\n"
    code += "print('Python', platform.python_version(), end='')\n"
    code += "[print(f', {n} {has[n]}', end='') for n in sys.argv[1:] if n in has]"
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False, timeout=60).stdout
    yield f"rlx {commit.strip()}: {answer(sys.executable, code, 'jax', 'envpool', 'numpy')}"
    for name, packages in shown.items():
        python = folder / f"venv_{name}" / "bin" / "python"
        if (folder / f"venv_{name}" / "packages.txt").exists():
            yield f"{name}: {answer(python, code, *packages)}"


def options(arguments: Sequence[str], this: Comparison) -> dict[str, str]:
    given = dict(this.defaults)
    for text in arguments:
        name, found, value = text.partition("=")
        if not found or name not in given:
            sys.exit(f"{text}: not an option; give any of {', '.join(f'{n}=' for n in given)}")
        given[name] = value
    for name, lowest in this.least.items():
        value = given[name].replace("_", "")
        if not value.isdecimal() or int(value) < lowest:
            sys.exit(f"{name}={given[name]}: give a whole number of at least {lowest:,}")
    if not given["folder"] or Path(given["folder"]).resolve().is_relative_to(ROOT):
        sys.exit(f"folder={given['folder']}: give a folder outside the repository, {ROOT}")
    for name, file in this.needs.items():
        if given[name] and not (Path(given[name]) / file).is_file():
            sys.exit(f"{name}={given[name]}: no {file}; give the checkout of {name}")
    return given


def compare(this: Comparison) -> None:
    given, missing = options(sys.argv[1:], this), {}
    folder = Path(given["folder"]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = this.programs(given, folder, missing)
    if not found and not missing:
        raise Failed("none of the peers that are chosen does the work that is chosen")
    results = rounds(found, given, folder, missing, this.measures)
    print()
    for line in table(results, this.measures):
        print(line)
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    print()
    for line in versions(folder, this.shown):
        print(line)


def main(this: Comparison) -> None:
    """Runs a comparison as its script; what ends it, ends the program that is running, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        compare(this)
    except Failed as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")
