"""DQN on plain CartPole: rlx beside rltime's and CleanRL's JAX DQN, in one run, in turn.

    python experiments/peers/cartpole_dqn.py folder=/tmp/peers cleanrl=/path/to/cleanrl
    python experiments/peers/cartpole_dqn.py folder=/tmp/peers rounds=5 steps=200_000

folder      where environments and runs go, outside the repository; they are used again
cleanrl     a checkout of CleanRL, which PyPI has without dqn_jax.py; not given: left out
rounds      3: each program runs so often, one after the other, round by round
steps       100_000: env steps of a run; schedules are as long as the run
deadline_s  900: seconds that a run may take, and twice as many that an installation may

It runs on the Python that has rlx. Speeds come from the programs' own logs, over the part of a run
that begins 10,000 env steps after its warm-up, when all is compiled (README.md says more).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {"folder": "", "cleanrl": "", "rounds": "3", "steps": "100_000", "deadline_s": "900"}
BATCH = 128  # rows of every update, of every program
SETTLED = 10_000  # env steps after the warm-up that are left out: there all is compiled

# gym 0.22 is the last one that has what rltime imports (ImageEncoder) and installs on Python 3.11;
# it asks for no pygame, but its CartPole imports it; NumPy 1.24 took away names that it uses.
RLTIME = ("rltime==0.1.2", "gym==0.22.0", "numpy==1.23.5", "pygame==2.6.1", "torch==2.13.0")
RLTIME += ("opencv-python==4.8.1.78",)
# gymnasium 1.0 tells of ended episodes in another way than dqn_jax.py reads.
CLEANRL = ("jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "gymnasium==0.29.1", "tyro==1.0.17")
CLEANRL += ("stable-baselines3==2.9.2", "tensorboard==2.21.0", "torch==2.13.0")


class Failed(Exception):
    """A step that did not work, told in one line."""


class Speed(NamedTuple):
    env_steps: float  # per second
    updates: float  # per second


class Mark(NamedTuple):
    """A moment of a run."""

    env_steps: int
    updates: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """One column of the comparison: how it is run, and how its log is read."""

    name: str
    peer: str  # whose work it does; its own name where it is the peer
    start: int  # env steps at which the measured part begins
    command: Callable[[Path], list[str]]  # of a run in this folder
    marks: Callable[[Path], Iterator[Mark]]  # of a run that was made there
    path: Path | None  # of modules that are not installed


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
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code != 0:
        why = f"not done after {seconds:.0f} s" if code is None else f"exit status {code}"
        raise Failed(f"{why}, the last line of {log}: {last_line(log)}")


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "(nothing)"


def installed(folder: Path, name: str, packages: Sequence[str], seconds: float) -> Path:
    """Returns the Python of a peer's environment, which is made unless it has these packages."""
    home, log = folder / f"venv_{name}", folder / f"pip_{name}.log"
    python, done = home / "bin" / "python", home / "packages.txt"
    if not (done.exists() and done.read_text() == "\n".join(packages)):
        print(f"{name}: installing into {home} ...", flush=True)
        called([sys.executable, "-m", "venv", "--clear", str(home)], seconds, log)
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


# --- rltime --------------------------------------------------------------------------------------


def rltime_command(python: Path, steps: int, folder: Path) -> list[str]:
    code = "import rltime; print(list(rltime.__path__)[0])"
    config = Path(answer(python, code)) / "configs" / "cartpole_dqn.json"
    update = json.dumps({"training": {"args": {"total_steps": steps}}})
    return [
        *(str(python), "-m", "rltime.train", str(config)),
        *("--log-dir", str(folder), "--conf-update", update),
    ]


def rltime_marks(folder: Path) -> Iterator[Mark]:
    """From train.json: a row every 10,000 env steps."""
    for file in folder.glob("*/train.json"):
        for line in file.read_text().splitlines():
            total = json.loads(line)["total"]
            trained = total.get("steps_trained", 0)
            yield Mark(int(total["steps_acted"]), trained / BATCH, total["seconds"])


# --- CleanRL -------------------------------------------------------------------------------------


def cleanrl_command(python: Path, checkout: Path, steps: int, folder: Path) -> list[str]:
    return [str(python), str(checkout / "cleanrl" / "dqn_jax.py"), "--total-timesteps", str(steps)]


EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0}).Reload()
print(json.dumps([(e.step, e.wall_time) for e in events.Scalars("losses/td_loss")]))
"""


def cleanrl_marks(python: Path, folder: Path) -> Iterator[Mark]:
    """From TensorBoard's events: one every 100 env steps; an update is made every 10."""
    for run in (folder / "runs").glob("*"):
        for step, seconds in json.loads(answer(python, EVENTS, str(run))):
            yield Mark(step, step / 10, seconds)


# --- rlx -----------------------------------------------------------------------------------------

PLAIN = (  # what both have in common: single rows, the Markov observation alone, one linear head
    *("env=cartpole", "network=mlp", "network.prev_action=false", "network.prev_reward=false"),
    *("agent=dqn", "agent.unroll=1", "agent.double_q=false", "agent.target_period_updates=null"),
    *("agent.head._target_=rlx.networks.heads.Plain", "agent.head.hidden=null"),
    *("agent.optimizer.max_grad_norm=null", "agent.optimizer.epsilon=1e-8"),
    *("replay=uniform", "replay.capacity=10_000", f"replay.min_sequences={BATCH}"),
    *("exploration=linear", f"learner.batch_size={BATCH}", "learner.platform=cpu"),
    *("evaluation.final_episodes=0", "checkpoint.replay=false", "logging.console=off"),
)
NEVER = "1_000_000_000"


def as_rltime(steps: int) -> list[str]:
    return [
        *("env.max_episode_steps=1000", "network.torso.layers=[64]", "network.core.units=64"),
        *("agent.n_step=10", "agent.target_period_env_steps=10_000"),
        f"agent.optimizer.decay_gradient_steps={(steps - 20_000) * 4 // BATCH}",
        *("replay.ratio=4", "replay.min_env_steps=20_000"),
        *("exploration.final=0.01", f"exploration.decay_env_steps={steps // 2}"),
        *("acting.envs_per_actor=16", "logging.every_env_steps=10_000"),
        *("logging.tensorboard=false", "checkpoint.every_env_steps=10_000"),
    ]


def as_cleanrl(steps: int) -> list[str]:
    return [
        *("network.torso.layers=[120]", "network.core.units=84", "agent.n_step=1"),
        *("agent.error=squared", "agent.target_period_env_steps=500"),
        *("agent.optimizer.learning_rate=2.5e-4", "replay.ratio=12.8"),
        *("replay.min_env_steps=10_000", "exploration.final=0.05"),
        f"exploration.decay_env_steps={steps // 2}",
        f"checkpoint.every_env_steps={NEVER}",
    ]


def rlx_command(overrides: Sequence[str], steps: int, folder: Path) -> list[str]:
    ends = (f"total_env_steps={steps}", f"hydra.run.dir={folder}/run")
    return [sys.executable, "-m", "rlx.train", *PLAIN, *overrides, *ends]


def rlx_marks(folder: Path) -> Iterator[Mark]:
    """From metrics.jsonl."""
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield Mark(row["env_steps"], row["updates"], row["wall_s"])


def turn(env_steps: int, *more: str) -> list[str]:
    """An update as often as the peer makes one, and acting with the newest weights."""
    return [f"acting.env_steps_per_request={env_steps}", "learner.publish_every_updates=1", *more]


# --- the comparison ------------------------------------------------------------------------------


def programs(given: Mapping[str, str], folder: Path, missing: dict[str, str]) -> list[Program]:
    """The peers that can be installed, each followed by rlx's runs of the same work."""
    steps, seconds, found = int(given["steps"]), 2 * float(given["deadline_s"]), []

    def add(peer: str, path, start: int, command, marks, rlx: Mapping[str, Sequence[str]]) -> None:
        runs = {peer: (command, marks, path)}
        runs |= {n: (partial(rlx_command, o, steps), rlx_marks, ROOT) for n, o in rlx.items()}
        for name, (run, read, at) in runs.items():
            found.append(
                Program(name=name, peer=peer, start=start, command=run, marks=read, path=at)
            )

    try:
        python = installed(folder, "rltime", RLTIME, seconds)
        work = as_rltime(steps)
        same = {"rlx, as rltime": work + turn(32), "rlx, its own turn, 16 lanes": work}
        command = partial(rltime_command, python, steps)
        add("rltime", None, 20_000 + SETTLED, command, rltime_marks, same)
    except Failed as error:
        missing["rltime"] = str(error)
    try:
        if not given["cleanrl"]:
            raise Failed("not given; say cleanrl=PATH of a checkout")
        checkout = Path(given["cleanrl"]).resolve()
        python = installed(folder, "cleanrl", CLEANRL, seconds)
        work = as_cleanrl(steps)
        same = {
            "rlx, as CleanRL, 1 lane": work + turn(10, "acting.envs_per_actor=1"),
            "rlx, its own turn, 32 lanes": work,
        }
        command = partial(cleanrl_command, python, checkout, steps)
        marks = partial(cleanrl_marks, python)
        add("CleanRL", checkout, 10_000 + SETTLED, command, marks, same)
    except Failed as error:
        missing["CleanRL"] = str(error)
    return found


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


def rounds(given: Mapping[str, str], folder: Path, missing: dict[str, str]) -> Results:
    """Every program with its speeds; one that fails is left out, a peer with rlx's runs of it."""
    found = programs(given, folder, missing)
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
            except (Failed, OSError, ValueError, KeyError) as error:
                missing[program.name] = f"{error}".splitlines()[0]
                continue
            speeds[program.name].append(speed)
            print(
                f"round {number + 1}, {program.name}: {speed.env_steps:,.0f} env steps/s, "
                f"{speed.updates:,.1f} updates/s (load before it {load:.1f})",
                flush=True,
            )
    whole = [p for p in found if not missing.keys() & {p.name, p.peer}]
    return [(program, speeds[program.name]) for program in whole]


def table(results: Results) -> Iterator[str]:
    """Medians over the rounds; a ratio is the median of the rounds' own, with the range."""
    yield "| program | env steps/s | updates/s | env steps/s, rlx / peer | updates/s, rlx / peer |"
    yield "|---|---|---|---|---|"
    peers = {program.peer: speeds for program, speeds in results if program.name == program.peer}
    for program, speeds in results:
        cells = [f"{median(s.env_steps for s in speeds):,.0f}"]
        cells += [f"{median(s.updates for s in speeds):,.1f}"]
        for which in range(2) if program.name != program.peer else ():
            own = peers[program.peer]
            ratios = sorted(a[which] / b[which] for a, b in zip(speeds, own, strict=True))
            cells += [f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"]
        cells += [""] * (4 - len(cells))
        yield f"| {program.name} | {' | '.join(cells)} |"


def versions(folder: Path) -> Iterator[str]:
    code = "import sys, platform\nfrom importlib.metadata import distributions\n"
    code += "has = {d.metadata['Name'].lower(): d.version for d in distributions()}\n"
    code += "print('Python', platform.python_version(), end='')\n"
    code += "[print(f', {n} {has[n]}', end='') for n in sys.argv[1:] if n in has]"
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False, timeout=60).stdout
    yield f"rlx {commit.strip()}: {answer(sys.executable, code, 'jax', 'envpool', 'numpy')}"
    for name in ("rltime", "cleanrl"):
        python = folder / f"venv_{name}" / "bin" / "python"
        names = ("rltime", "jax", "flax", "torch", "gym", "gymnasium", "numpy", "stable_baselines3")
        if (folder / f"venv_{name}" / "packages.txt").exists():
            yield f"{name}: {answer(python, code, *names)}"


def options(arguments: Sequence[str]) -> dict[str, str]:
    given = dict(DEFAULTS)
    for text in arguments:
        name, found, value = text.partition("=")
        if not found or name not in DEFAULTS:
            sys.exit(f"{text}: not an option; give any of {', '.join(f'{n}=' for n in DEFAULTS)}")
        given[name] = value
    for name, lowest in (("rounds", 1), ("steps", 40_000), ("deadline_s", 1)):
        value = given[name].replace("_", "")
        if not value.isdecimal() or int(value) < lowest:
            sys.exit(f"{name}={given[name]}: give a whole number of at least {lowest:,}")
    if not given["folder"] or Path(given["folder"]).resolve().is_relative_to(ROOT):
        sys.exit(f"folder={given['folder']}: give a folder outside the repository, {ROOT}")
    if given["cleanrl"] and not (Path(given["cleanrl"]) / "cleanrl" / "dqn_jax.py").is_file():
        sys.exit(f"cleanrl={given['cleanrl']}: no cleanrl/dqn_jax.py; give CleanRL's checkout")
    return given


def main() -> None:
    given, missing = options(sys.argv[1:]), {}
    folder = Path(given["folder"]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = rounds(given, folder, missing)
    print()
    for line in (*table(results), "", *versions(folder)):
        print(line)
    for name, why in missing.items():
        print(f"missing: {name}: {why}")


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")
