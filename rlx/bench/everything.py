"""All benches one after the other, in one table: `python -m rlx.bench what=all`.

Each measurement is a command of its own, which anyone may repeat. One that fails, is killed or
takes too long is a line that says so, and the others go on. The tables are written anew after each,
so that whatever ends the whole leaves what there is.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

from rlx.bench.measuring import CPU_BATCHES, SETUPS, read_report, report
from rlx.bench.tables import FAILED, Line, as_csv, as_markdown, failed_line, read_line
from rlx.problems import cut, refuse
from rlx.runs import provenance
from rlx.runs.files import write_whole

START_S = 300.0  # of a command, to import, compile and start actors on a busy machine
STOP_S = 30.0  # for a command that was asked to end, and for Ray with it
ACTORS = (1, 2, 4, 8)
ROUNDS = {"cartpole": "cartpole_ppo", "pong": "atari_ppo"}
REPLAY = ("sample + update", "when asked for", "2 ahead", "process")
INTERRUPTED = f"{FAILED}: interrupted"
NOT_YET = "not measured yet"
SAID = re.compile(r"(rlx[\w.]*: |[\w.]*(Error|Exception|Failed|Lost|Exit|Interrupt)\b)")
STATUS_INTERRUPTED = 130


class CannotBeMade(Exception):
    """A measurement that failed; the text says why in one line."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command that measures: where its lines go, and how long it may take."""

    group: str
    setup: str
    name: str  # of the line, if there is nothing else to say
    arguments: tuple[str, ...]
    own: tuple[str, ...]  # how the names of rlx's own measurements end
    most_s: float


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Options of the command line say what `what=all` measures."""

    groups: Sequence[str]
    setup: str
    seconds: float
    rows: int
    batch: int | None
    lanes: Sequence[int]
    actors: Sequence[int]
    overrides: Sequence[str]


def plan(choices: Choices) -> list[Part]:
    """The parts in the order in which they are measured."""
    setups = [setup.name for setup in SETUPS if choices.setup in (setup.name, "all")]
    return [
        Part(
            group=group,
            setup=setup,
            name=name,
            arguments=(*arguments, f"setup={setup}", f"seconds={choices.seconds}"),
            own=own,
            most_s=START_S + 4 * measures * choices.seconds,
        )
        for group in choices.groups
        for setup in setups
        for name, arguments, own, measures in _commands(choices, group, setup)
    ]


Command = tuple[str, tuple[str, ...], tuple[str, ...], int]  # name, arguments, own, measures


def _commands(choices: Choices, group: str, setup: str) -> Iterator[Command]:
    """The commands of a group; the number is how often each measures for `seconds`."""
    what, given = f"what={group}", ",".join(choices.overrides)
    size = choices.batch or CPU_BATCHES.get(setup)
    batch = () if size is None else (f"batch={size}",)
    pools = ("local", "threads", "ray_pool")
    if group == "acting":
        for name, ending in zip(pools, ("local pool", "thread pool", "actors/pool"), strict=True):
            yield name, (what, f"acting={name}"), (ending,), 2
    elif group == "replay":
        yield f"{choices.rows:,}", (what, f"rows={choices.rows}"), REPLAY, 8
    elif group == "learner":
        yield "learner path", (what, *batch), ("learner path",), 1
    elif group == "weights":
        yield "p50", (what,), ("p50",), 2
    elif group == "end_to_end":
        for name in pools:
            run = (what, f"acting={name}", *batch, f"overrides={given}")
            yield f"acting={name}", run, ("/whole",), 2
        own = ROUNDS[setup]  # an agent of another kind, with settings of its own
        yield own, ("what=rounds", f"experiment={own}"), ("/whole",), 1
    elif group == "scaling":
        lanes = (f"lanes={_list(choices.lanes)}",) if choices.lanes else ()
        yield "over lanes", (what, *lanes), ("local pool",), 4
        actors = f"actors={_list(choices.actors or ACTORS)}"
        yield "over actors", (what, "acting=ray_pool", actors), (" actors",), 8


def _list(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


# --- measuring -----------------------------------------------------------------------------------


def bench_everything(choices: Choices, folder: Path | None, minutes: float, command: str) -> None:
    """Measures all parts into bench.md, bench.csv and bench.png; Ctrl-C leaves what there is.

    folder: None: bench/DATE-TIME. minutes: after them nothing more is measured.
    Raises ConfigError for a folder that cannot be written.
    """
    folder = folder or Path("bench") / f"{datetime.now():%Y-%m-%d-%H-%M-%S}"
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        says = f"cannot be made ({error.strerror}); give another"
        raise refuse("folder", says, given=str(folder)) from error
    table = Table(folder, plan(choices), command)
    ends_s = monotonic() + 60 * minutes
    over = f"the {minutes:g} minutes were over; give more as minutes="
    try:
        for part in table.parts:
            table.measure(part, ends_s, over)
    except KeyboardInterrupt:
        table.end(INTERRUPTED)
        raise SystemExit(STATUS_INTERRUPTED) from None
    table.end(NOT_YET)


class Table:
    """The table of what was measured so far, and its files."""

    def __init__(self, folder: Path, parts: Sequence[Part], command: str) -> None:
        self.folder, self.parts = folder, parts
        self._found: dict[Part, list[Line]] = {}
        self._machine: Mapping[str, Any] = {}
        self._about = _about(command)

    def measure(self, part: Part, ends_s: float, over: str) -> None:
        """Makes the lines of a part, and writes the tables."""
        began = monotonic()
        print(f"{part.group}, {part.setup}, {part.name} ...", flush=True)
        log = self.folder / "logs" / f"{part.group}-{part.setup}-{part.name.replace(' ', '-')}.log"
        try:
            rows, machine = _run(part, log, ends_s, over)
        except CannotBeMade as error:
            self._found[part] = [
                failed_line(part.group, part.setup, part.name, f"{FAILED}: {error}")
            ]
            print(f"    {self._found[part][0].note}", flush=True)
        else:
            own = part.own
            self._found[part] = [read_line(row, part.group, part.setup, own) for row in rows]
            self._machine = self._machine or machine
            print(f"    {monotonic() - began:.0f} s", flush=True)
        self.write("The picture is drawn at the end.", NOT_YET)

    def end(self, missing: str) -> None:
        """Draws the picture, writes the files a last time and prints all of it."""
        lines = self.write("", missing)
        said = _draw(lines, self.folder / "bench.png")
        self.write(said or "![ratios and scaling](bench.png)", missing)
        rows = [{"name": f"{x.group}/{x.setup}/{x.name}", **_numbers(x)} for x in lines]
        report("all", rows, self._machine)
        print(f"rlx.bench: the table is in {self.folder / 'bench.md'}. {said}", file=sys.stderr)

    def write(self, picture: str, missing: str) -> list[Line]:
        """Writes the tables whole; the lines of parts that were not measured say why."""
        lines = [
            line
            for part in self.parts
            for line in self._found.get(part)
            or [failed_line(part.group, part.setup, part.name, missing)]
        ]
        about = self._about | {
            "devices": ", ".join(self._machine.get("devices", ())) or "unknown",
            "one product of two matrices": _product(lines),
        }
        write_whole(self.folder / "bench.csv", as_csv(lines).encode())
        write_whole(self.folder / "bench.md", as_markdown(lines, about, picture).encode())
        return lines


def _numbers(line: Line) -> dict[str, Any]:
    names = ("value", "unit", "ratio", "roofline", "least", "most", "note")
    return {name: getattr(line, name) for name in names}


def _run(part: Part, log: Path, ends_s: float, over: str) -> tuple[list[Any], dict[str, Any]]:
    """(rows, the machine) of a part's command, whose output is in `log`; raises CannotBeMade."""
    left_s = ends_s - monotonic()
    if left_s <= 0:
        raise CannotBeMade(over)
    python = (sys.executable, "-m")
    tied = (*python, "rlx.machine.tied", str(os.getpid()), "")  # it ends with this process
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*tied, *python, "rlx.bench", *part.arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the command
        )
        try:
            status = process.wait(min(left_s, part.most_s))
        except subprocess.TimeoutExpired:
            late = f"it did not end within {part.most_s:.0f} s; give fewer as seconds="
            raise CannotBeMade(over if left_s <= part.most_s else late) from None
        finally:
            _stop(process)
    text = log.read_text(errors="replace")
    if status == 0 and (found := read_report(text)) is not None:
        return found["rows"], found["machine"]
    raise CannotBeMade(reason(status, text))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a command, and whatever of its own it left."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reason(status: int, text: str) -> str:
    """Says in one line why a command failed, from its exit status and its output."""
    if status == -signal.SIGKILL:
        return "it was killed by SIGKILL; there may be too little memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    said = next((line for line in reversed(lines) if SAID.match(line)), last)
    if status < 0:
        return cut(f"it was killed by {signal.Signals(-status).name}: {said}")
    return cut(said.removeprefix("rlx.bench: "))


# --- about the machine ---------------------------------------------------------------------------


def _about(command: str) -> dict[str, str]:
    """The machine, the versions, the date, the commit and the command, for the page's head."""
    found = provenance.record()
    commit = found["git"] or "unknown"
    changed = ", with changes that are not committed" if provenance.changes() else ""
    versions = {name: known for name, known in found["versions"].items() if known}
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "machine": f"{found['platform']}, {len(os.sched_getaffinity(0))} cores, {_model()}",
        "load before": f"{load} (processes that wanted a core, over 1, 5 and 15 minutes)",
        "versions": f"Python {found['python']}, {', '.join(map(' '.join, versions.items()))}",
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "commit": f"{commit}{changed}",
        "command": f"`{command}`",
    }


def _model() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "an unknown processor"


def _product(lines: Sequence[Line]) -> str:
    """The rate of one large matrix product, the best of what the learner's commands measured."""
    rates = [line.value for line in lines if line.name.endswith("one product") and line.value]
    return f"{max(rates):.0f} GFLOP/s at best" if rates else "not measured"


def _draw(lines: Sequence[Line], path: Path) -> str:
    """Draws the picture; returns why there is none, or nothing."""
    try:
        from rlx.bench.picture import draw

        draw(lines, path)
    except (ImportError, OSError) as error:
        return f"There is no picture: {error}."
    return ""
