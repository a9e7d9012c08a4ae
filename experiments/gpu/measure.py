"""The questions that only a GPU answers: updates/s, replay, frames/s, and Pong to 20.

    python experiments/gpu/measure.py folder=/scratch/gpu
    python experiments/gpu/measure.py folder=/scratch/gpu what=frames pools=local
    python experiments/gpu/measure.py folder=/scratch/gpu what=pong    # goes on from its checkpoint

Options:

    folder=DIR     where runs, logs and the table go; another call adds to them (required)
    what=updates,replay,frames,pong    the parts, one after the other
    pools=threads,local,ray_pool,server    that `frames` is measured with, a command each
    minutes=9.5    that a command may take; it is told to stop before, a run with a checkpoint
    platform=gpu   cpu tries the script out at small sizes; its figures are worth nothing

Each part is one or more commands of rlx, each in a process of its own, which the table names; the
table is written after each. What cannot be measured says why there, and its former figures stay.
EnvPool is needed by `frames` and `pong` alone, and Ray by two pools.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rlx.bench.measuring import read_report
from rlx.config.options import command
from rlx.machine.signals import sigterm_interrupts
from rlx.problems import refuse
from rlx.runs.files import write_whole
from rlx.runs.folders import METRICS_FILE, read_rows
from rlx.types import Range

Part = Literal["updates", "replay", "frames", "pong"]
Pool = Literal["threads", "local", "ray_pool", "server"]
GRACE_S = 60.0  # at most, of its minutes, that a command has to end after it was told to
ROOT = Path(__file__).resolve().parents[2]
PONG = 20.0  # of 21: the mean return of 100 episodes at which that part is done


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command, as its help explains them."""

    folder: str
    what: tuple[Part, ...] = ("updates", "replay", "frames", "pong")
    pools: tuple[Pool, ...] = ("threads", "local", "ray_pool", "server")
    minutes: Annotated[float, Range(gt=0)] = 9.5
    platform: Literal["gpu", "cpu"] = "gpu"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of the table; `value` of None: not measured, and `note` says why."""

    part: str
    name: str
    value: float | None
    unit: str
    goal: str
    note: str
    command: str


# --- updates and replay: benches -----------------------------------------------------------------


def updates(options: Options) -> Iterator[list[Figure]]:
    """The paper's batch and network, from resident data and from replays, in both dtypes."""
    given = ["what=learner", "setup=pong", "replay=true", "profile=true"]
    size = ["batch=2", "seconds=1"] if options.platform == "cpu" else ["batch=64", "seconds=40"]
    for dtype in ("float32", "bfloat16"):
        yield benched(f"updates, {dtype}", [*given, *size, f"dtype={dtype}"], "50", options)


def replay(options: Options) -> Iterator[list[Figure]]:
    """The paper's 4 million rows, on the device and in the host's memory."""
    sizes = ["rows=2000", "seconds=1"] if options.platform == "cpu" else ["rows=4000000"]
    yield benched("replay", ["what=replay", "setup=pong", *sizes], "", options)


def benched(part: str, given: list[str], goal: str, options: Options) -> list[Figure]:
    """The rows of a bench, which prints them as its last line."""
    argv = [sys.executable, "-m", "rlx.bench", *given]
    ended = run(part, argv, options)
    said = read_report(ended.text)
    if said is None:
        return [missing(part, argv, ended.why or "it printed no figures; see its log")]
    return [
        Figure(
            part=part,
            name=row["name"],
            value=row["value"],
            unit=row["unit"],
            goal=goal if row["unit"] == "updates/s" else "",
            note="" if row.get("ratio") is None else f"{row['ratio']:.2f} of its roofline",
            command=shown(argv),
        )
        for row in said["rows"]
    ]


# --- frames and Pong: runs -----------------------------------------------------------------------

PAPER = (
    *("experiment=atari_r2d2", "env.id=Pong-v5", "network.compute_dtype=bfloat16"),
    *("replay=device_prioritized", "replay.capacity=4_000_000", "replay.ratio=0.8"),
    *("checkpoint.replay=false", "evaluation.final_episodes=0", "logging.every_env_steps=50_000"),
)
SMALL = (
    *("experiment=atari_r2d2_small", "env.id=Pong-v5", "replay.capacity=5_000"),
    *("acting.envs_per_actor=8", "logging.every_env_steps=1_000", "learner.platform=cpu"),
    *("checkpoint.replay=false", "evaluation.final_episodes=0"),
)
POOLS: dict[Pool, tuple[str, ...]] = {
    "threads": ("acting=threads", "acting.instances=8", "acting.envs_per_actor=128"),
    "local": ("acting=local", "acting.device=learner", "acting.envs_per_actor=512"),
    "ray_pool": ("acting=ray_pool", "acting.instances=14", "acting.envs_per_actor=64"),
    "server": (
        *("acting=ray_pool", "acting.inference=server", "acting.instances=14"),
        "acting.envs_per_actor=64",
    ),
}


def frames(options: Options) -> Iterator[list[Figure]]:
    """Acting and learning at once, with the replay of the paper's size on the device."""
    for pool in options.pools:
        folder = Path(options.folder) / f"frames-{pool}"
        about = "64,000; stretch 100,000"
        yield trained(f"frames, {pool}", folder, POOLS[pool], about, options)


def trained(
    part: str, folder: Path, settings: Sequence[str], goal: str, options: Options
) -> list[Figure]:
    """Rates of a run's second half, in which nothing is compiled any more."""
    base = SMALL if options.platform == "cpu" else (*PAPER, "learner.platform=gpu")
    kinds = ("acting=", "acting.inference=")
    pool = [each for each in settings if options.platform == "gpu" or each.startswith(kinds)]
    argv = train_argv(folder, (*base, *pool))
    shutil.rmtree(folder, ignore_errors=True)  # an earlier call's run of this measurement
    ended = run(part, argv, options)
    rows = rows_of(folder)
    late = rows[len(rows) // 2 :]
    if ended.failed or len(late) < 2:
        return [missing(part, argv, ended.why or "it wrote fewer than two rows of metrics")]
    seconds = late[-1]["wall_s"] - late[0]["wall_s"]
    said = f"{late[-1]['env_steps']:,} env steps, replay {late[-1]['replay/fill']:.0%} full"
    return [
        Figure(
            part=part,
            name=name,
            value=(late[-1][name] - late[0][name]) / seconds,
            unit=f"{name}/s",
            goal=goal if name == "frames" else "",
            note=said,
            command=shown(argv),
        )
        for name in ("frames", "updates")
    ]


def pong(options: Options) -> Iterator[list[Figure]]:
    """Pong until an evaluation of 100 episodes has a mean of 20; called again, it goes on."""
    folder = Path(options.folder) / "pong"
    base = SMALL if options.platform == "cpu" else (*PAPER, "learner.platform=gpu")
    more = (
        *POOLS["threads"][: 1 if options.platform == "cpu" else 3],
        *("env.options.full_action_space=false", "resume=auto"),
        *("evaluation.every_env_steps=500_000", "evaluation.episodes=100"),
    )
    if options.platform == "gpu":
        more += ("replay.ratio=4.0", "checkpoint.every_env_steps=2_000_000")
    argv, why = train_argv(folder, (*base, *more)), ""
    if not any(is_solved(row) for row in rows_of(folder)):
        ended = run("pong", argv, options)
        why = f"; {ended.why}" if ended.failed else ""
    rows = rows_of(folder)
    scores = [score for row in rows if (score := row.get("evaluation/return_mean")) is not None]
    if not scores:
        yield [missing("pong", argv, f"no evaluation yet; see its log{why}")]
        return
    done = next((row for row in rows if is_solved(row)), rows[-1])
    about = f"{done['frames']:,} frames, {done['updates']:,} updates, {done['wall_s']:.0f} s"
    yield [
        Figure(
            part="pong",
            name="best greedy mean of 100 episodes",
            value=max(scores),
            unit="of 21",
            goal=f"{PONG:g}",
            note=f"{about}{why}",
            command=shown(argv),
        )
    ]


def is_solved(row: dict[str, Any]) -> bool:
    """Says whether an evaluation came to the goal."""
    score = row.get("evaluation/return_mean")
    return score is not None and score >= PONG


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics of a run; none if it has none."""
    path = folder / METRICS_FILE
    return read_rows(path) if path.exists() else []


def train_argv(folder: Path, settings: Sequence[str]) -> list[str]:
    """The command of a run in this folder."""
    return [sys.executable, "-m", "rlx.train", *settings, f"hydra.run.dir={folder}"]


# --- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command's end: what it printed, and why it ended early, or ""."""

    text: str
    why: str
    failed: bool  # by itself, or it did not end when it was told to


def run(part: str, argv: Sequence[str], options: Options) -> Ended:
    """Runs a command in the folder; near the deadline it is told to stop, then it is killed."""
    log = Path(options.folder) / f"{part.replace(' ', '-').replace(',', '')}.log"
    print(f"{part}: {shown(argv)}", flush=True)
    grace_s = min(GRACE_S, 30 * options.minutes)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    why, failed = "", True
    with log.open("w") as file:
        process = subprocess.Popen(
            argv, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            cwd=options.folder, env=env,
        )  # fmt: skip
        try:
            failed = process.wait(timeout=60 * options.minutes - grace_s) != 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # a run ends with a checkpoint
            why = f"stopped near {options.minutes:g} minutes"
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace_s)
                failed = False
        finally:  # whatever ends this script, too, so that nothing keeps the GPU
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace")
    last = (text.strip().splitlines() or ["nothing was printed"])[-1]
    if failed:
        why = f"{why} it ended with {process.returncode}: {last[:200]}".strip()
    return Ended(text=text, why=why, failed=failed)


def missing(part: str, argv: Sequence[str], why: str) -> Figure:
    """A row that says why there is no figure."""
    return Figure(part=part, name="", value=None, unit="", goal="", note=why, command=shown(argv))


def shown(argv: Sequence[str]) -> str:
    """The command as a reader types it."""
    return " ".join(["python", *argv[1:]])


def platform_problem(wanted: str) -> str | None:
    """Says what is missing, asked in a process of its own: JAX would hold the GPU in this one."""
    code = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    backend = (found.stdout.split() or ["none"])[0]
    return None if backend == wanted or wanted == "cpu" else f"JAX sees {backend} only"


# --- the table -----------------------------------------------------------------------------------


def write(figures: Sequence[Figure], folder: Path) -> None:
    """Writes gpu.csv and gpu.md; rows of parts that were not measured now are kept.

    A part that could not be measured again keeps its figures beside the row that says why.
    """
    path, names = folder / "gpu.csv", [field.name for field in fields(Figure)]
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            tried = {figure.part for figure in figures}
            now = {figure.part for figure in figures if figure.value is not None}
            kept = [
                row
                for row in csv.DictReader(file)
                if row["part"] not in now and (row["value"] or row["part"] not in tried)
            ]
    rows = [*kept, *map(asdict, figures)]
    raw = io.StringIO()
    writer = csv.DictWriter(raw, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table = ["| part | what | figure | unit | goal | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        value = row["value"]
        figure = "not measured" if value in (None, "") else f"{float(value):,.1f}"
        cells = (row["part"], row["name"], figure, row["unit"], row["goal"], row["note"])
        table.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    text = "\n".join(table) + "\n"
    write_whole(path, raw.getvalue().encode())
    write_whole(folder / "gpu.md", text.encode())
    print(text)


def measure(options: Options) -> None:
    """Measures the parts one after the other; each command adds its rows to the table at once."""
    folder = Path(options.folder).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        says = f"it cannot be made ({error.strerror}); give another folder"
        raise refuse("folder", says, given=options.folder) from error
    options = replace(options, folder=str(folder))
    if problem := platform_problem(options.platform):
        says = (
            f"{problem}; install JAX for the GPU (pip install 'jax[cuda12]'), or say platform=cpu"
        )
        raise refuse("platform", says, given=options.platform)
    parts = {"updates": updates, "replay": replay, "frames": frames, "pong": pong}
    for name in options.what:
        for figures in parts[name](options):
            write(figures, folder)


if __name__ == "__main__":
    with sigterm_interrupts():
        command("measure.py", __doc__, Options, measure)
