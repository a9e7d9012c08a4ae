"""Broken command lines and spoilt run folders, by the thousand: `make fuzz`, by hand.

    python tests/fuzz.py [seed=0] [overrides=2000] [folders=500] [processes=20]

Each case is made from its own seed and number, whatever the others are.
A case is worked in a process that works many; what kills that process counts as a crash. Counted
are tracebacks (anything but a refusal of one line each), crashes, and silent accepts: a broken
override that was taken, a spoilt file that was read as if it were whole. The exit status is 1 if
there is any.
"""

# ruff: noqa: E501
from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 40  # cases of one process
LONGEST_LINE = 3000
SLOW_S = 60.0  # a case that takes longer is told as one that hangs
KINDS = ("ok", "traceback", "crash", "accepted", "slow")

# --- command lines -------------------------------------------------------------------------------

GOOD = ["seed=1", "total_env_steps=500", "agent.n_step=2", "network=mlp_gru", "tags=[a,b]"]
KEYS = [
    *("seed", "total_env_steps", "learner.batch_size", "agent.n_step", "replay.capacity"),
    *("acting.envs_per_actor", "checkpoint.keep", "env.threads", "agent.unroll"),
]
NO_NUMBERS = [
    *("x", "nan", "inf", "-inf", "-1", "1.5", "null", "true", "[1]", "{a:1}", "''", "1e400"),
    *(
        "9" * 400,
        "-" + "9" * 99,
        "0x1F",
        "1__0",
        "é",
        "'\\n'",
        "${seed",
        "${nope}",
        "${oc.env:NOPE}",
    ),
]
GROUPS = ["env", "agent", "network", "replay", "acting", "learner", "exploration", "experiment"]
NO_CHOICES = [
    "nope",
    "../env/atari",
    "/etc/passwd",
    "''",
    "a" * 300,
    "[a,b]",
    "{a:1}",
    "*",
    "?",
    "%00",
]
BROKEN = [
    *("=", "==", "=1", "seed", "seed==1", "seed=[1", "seed={", "seed='", 'seed="', "~seed=1=2", "+"),
    *("~", "~nope", "~seed", "++=1", "+seed=1", "a=b=c", "seed=1,2", "seed=range(1,3)", "seed=choice(1,2)"),
    *("hydra.searchpath=[nope]", "hydra.searchpath=[file:///nope]", "hydra.searchpath=[pkg://nope]"),
    *("hydra.searchpath=nope", "hydra.searchpath=null", "hydra.searchpath=[1]", "hydra.searchpath=[[]]"),
    *("hydra.run.dir=${nope}", "hydra.run.dir='${nope}'", "hydra.run.dir=null", "hydra.run.dir=[a]"),
    *("hydra.run.dir=/proc/x", "hydra.run.dir=/dev/null/x", "hydra.run.dir=" + "a" * 5000),
    *("hydra.run.dir=''", "hydra.mode=NOPE", "hydra.nope=1", "hydra=nope", "hydra/launcher=nope"),
    *("hydra.job.name=[", "hydra/job_logging=nope", "hydra.verbose=[", "hydra.output_subdir=[1]"),
    *("resume=nope", "resume=''", "resume=/", "resume=[a]", "resume=" + "a" * 5000, "resume=/dev/null"),
    *("a" * 300 + "=1", ".".join("a" * 200) + "=1", "seed.x.y=1", "env.id=" + "P" * 10_000, ".=1", "..=1"),
    *("seed=\n1\n[", "se\ned=1", "seed=\x00", "\x1b[31mseed=1", "env.id='\x1b[31m'", "\udcff=1"),
    *("env.id='\udcff'", "agent._target_=os.system", "agent._target_=rlx.nope.X", "agent._target_=1"),
    *("agent._target_=rlx.agents.dqn", "network._target_=rlx.agents.dqn.DQN", "network=null", "env=null"),
    *("env.id=Pnog-v5", "env.id=null", "env.id=[a]", "env.id=''", "env.options={frame_skip:0}"),
    *("+env.options.nope=1", "+env.options.frame_skip=4", "env.components=[99]", "env.components=[-9]"),
    *("env.components=[0.5]", "env.scale=[1,2,3]", "env.scale=[nan,1]"),
    *("env.max_episode_steps=2147483648", "env.threads=-1", "env.threads=100000", "env.observe=nope"),
    *("replay.priority_exponent=nan", "agent.optimizer.learning_rate=-1", "agent.optimizer=adam"),
    *("agent.optimizer.learning_rate=[1]", "replay.storage=nope", "learner.platform=nope", "tags=a"),
    *("tags=[1]", "tags=[[a]]", "tags={a:b}", "deterministic=1", "deterministic=maybe", "resume=1"),
]  # fmt: skip


def command_line(rng: random.Random) -> list[str]:
    """A command line with at least one override that must be refused, among good ones."""
    makers: list[Callable[[], str]] = [
        lambda: f"{rng.choice(KEYS)}={rng.choice(NO_NUMBERS)}",
        lambda: f"{rng.choice(GROUPS)}={rng.choice(NO_CHOICES)}",
        lambda: rng.choice(BROKEN),
        lambda: f"{misspelt(rng, rng.choice(KEYS))}=1",
        lambda: spoilt(rng, rng.choice([*GOOD, *BROKEN])) + rng.choice(["=", "['", "={", "\n}"]),
    ]
    bad = [rng.choice(makers)() for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    line = rng.sample(GOOD, rng.randrange(3)) + bad
    rng.shuffle(line)
    return line


def misspelt(rng: random.Random, key: str) -> str:
    at = rng.randrange(len(key))
    return key[:at] + rng.choice("qxzQ_") + key[at + rng.randrange(2) :]


def spoilt(rng: random.Random, text: str) -> str:
    letters = list(text)
    for _ in range(rng.randrange(1, 4)):
        letters.insert(rng.randrange(len(letters) + 1), rng.choice("[]{}()'\"$,:=\\~+ \t\n%#@!é"))
    return "".join(letters)


def work_overrides(rng: random.Random, shared: Path) -> dict[str, str]:
    line = command_line(rng)
    os.chdir(tempfile.mkdtemp(dir=shared))
    from rlx import train

    def start() -> str:
        train.prepare(line)
        return "" if harmless(line) else "taken"

    return {"train": judged(start, line)}


def harmless(line: list[str]) -> bool:
    """True if the last words of a line made it a good one: the last of a key counts."""
    from rlx.config import composing
    from rlx.config.build import check

    last = {text.partition("=")[0]: text for text in line}
    broken = {*BROKEN} & {*last.values()}
    if broken - {"+seed=1", "~nope"}:
        return False
    check(composing.compose(line))
    return True


# --- run folders ---------------------------------------------------------------------------------

TEXTS = [
    *("", "[]", "{}", "1", "null", "[" * 50_000, '{"a":' * 50_000, "- " * 50_000, "9" * 400, "\x00", "\t"),
    *("[1, [2]]", '"text"', "a: &a [1]\nb: *a", "a: !!python/name:os.system", "{[1]: 2}", "? [a]\n: 1"),
    *('{"env_steps": -1}', '{"env_steps": 1e999}', '{"env_steps": true}', "a: ${nope}", "a: ${", "a: 1\na: 2"),
    *("seed: x", "seed: -1", "agent: 1", "agent: {_target_: os.system}", "env: {_target_: [1]}", "1: 2"),
    *("hydra: {job: {env_set: {A: b}}}", "defaults: [a]", "seed: 2026-11-28", "seed: !!set {a}", "~"),
]  # fmt: skip
VALUES = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    10**30,
    10**400,
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    "\ud800",
]


def spoil(rng: random.Random, run: Path) -> tuple[str, Path]:
    """Spoils one file of a run; answers how, and which."""
    paths = sorted(path for path in run.rglob("*") if path.is_file())
    small = [p for p in paths if p.suffix in (".json", ".jsonl", ".yaml", ".diff", ".npz")]
    path = rng.choice(small if rng.random() < 0.7 else paths)
    data = path.read_bytes()
    how = rng.choice(
        ["text", "text", "value", "value", "cut", "flip", "flips", "gone", "folder", "pipe", "swap"]
    )
    if how == "value":
        how, data = "value" if path.suffix == ".json" else "flip", data
    if how == "text":
        path.write_text(rng.choice(TEXTS), errors="surrogateescape")
    elif how == "value":
        changed = odd_value(rng, json.loads(data))
        path.write_text(json.dumps(changed))
        if path.name == "manifest.json" or path.parent.parent.name == "checkpoints":
            resign(path.parent)
    elif how == "cut":
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif how in ("flip", "flips"):
        changed = bytearray(data or b"x")
        for _ in range(1 if how == "flip" else 50):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
    elif how == "swap":
        path.write_bytes(rng.choice(paths).read_bytes())
    else:
        path.unlink()
        path.mkdir() if how == "folder" else os.mkfifo(path) if how == "pipe" else None
    return how, path


def odd_value(rng: random.Random, value: Any) -> Any:
    """The same value with another one somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: odd_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], odd_value(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


def resign(checkpoint: Path) -> None:
    """Gives a checkpoint's manifest right sums: anybody can compute them."""
    from rlx.training.checkpoint_files import _body_sha256, _fingerprint

    path = checkpoint / "manifest.json"
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        body = json.loads(path.read_bytes())["body"]
        for name in body["files"]:
            if (checkpoint / name).is_file():
                body["files"][name] = _fingerprint(checkpoint / name)
        path.write_text(json.dumps({"sha256": _body_sha256(body), "body": body}))


def work_folders(rng: random.Random, shared: Path) -> dict[str, str]:
    runs = Path(tempfile.mkdtemp(dir=shared))
    run = Path(shutil.copytree(shared / "trained", runs / "run"))
    shutil.copytree(
        shared / "trained", runs / "whole", ignore=shutil.ignore_patterns("checkpoints")
    )
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    how, path = spoil(rng, run)
    about = f"{how} {path.relative_to(run)}"
    is_same = path.is_file() and path.read_bytes() == before[path]
    found = {}
    for name, act in acts(run, rng).items():
        found[name] = judged(act, about)
    newest = max((run / "checkpoints").glob("[0-9]*"))
    spoilt_state = newest in path.parents and "replay" not in str(path.relative_to(newest))
    if found["load"] == newest.name and spoilt_state and not is_same and how != "value":
        found["load"] = f"accepted: {about}"
    shutil.rmtree(runs, ignore_errors=True)
    return {name: "" if value == newest.name else value for name, value in found.items()}


def acts(run: Path, rng: random.Random) -> dict[str, Callable[[], str]]:
    import rlx
    from rlx import diff, evaluate, report, train
    from rlx.results import reading
    from rlx.results.live import LiveRuns

    def load() -> str:
        return rlx.load(run).restore().path.name

    def watch() -> None:
        live = LiveRuns(run.parent)
        json.dumps([live.all(), live.one("run", ["learner/loss", "x"])], allow_nan=False)

    def tables() -> None:
        if rng.random() < 0.05:
            report.main([f"runs={run.parent}"])
        else:
            reading.runs(run.parent), reading.load(run.parent)

    def resume() -> None:
        argv = train.prepare([f"resume={run}", "total_env_steps=600"])
        assert any(text.startswith("resume=") for text in argv)
        if rng.random() < 0.05:
            more = ["evaluation.final_episodes=0", "logging.console=off"]
            in_a_process("train", f"resume={run}", "total_env_steps=600", *more)

    def differences() -> None:
        diff.main([str(run), str(run.parent / "whole")])

    def play() -> None:
        if rng.random() < 0.05:
            evaluate.main([f"run={run}", "episodes=1", "envs=1"])

    return {
        **{"load": load, "watch": watch, "report": tables, "diff": differences},
        **{"evaluate": play, "resume": resume},
    }


# --- judging -------------------------------------------------------------------------------------


def judged(act: Callable[[], str | None], about: Any) -> str:
    """'' for what went well or was refused well, else what was wrong; or what `act` answered."""
    from rlx.problems import ConfigError, RunFailed

    out, err, began = io.StringIO(), io.StringIO(), time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            answer = act() or ""
        if answer == "taken":
            return f"accepted: {about!r}"
    except (ConfigError, RunFailed) as error:
        answer, problems = "", getattr(error, "problems", [error])
        texts = [str(problem) for problem in problems]
        if wrong := [t for t in texts if "\n" in t or len(t) > LONGEST_LINE or not t.isprintable()]:
            return f"traceback: not a line: {wrong[0][:300]!r} of {about!r}"
    except SystemExit as error:
        answer, lines = "", err.getvalue().splitlines()
        if error.code not in (0, 1, 2) or (error.code == 2 and not lines):
            return f"traceback: exit {error.code}: {lines[-1:]} of {about!r}"
    except ValueError as error:  # rlx.results answers with them; the report says them in a line
        answer = ""
        last = traceback.extract_tb(error.__traceback__)[-1]
        if "rlx/results/reading.py" not in last.filename and "folders.py" not in last.filename:
            return told(error, about)
    except Died as error:
        return f"{error} of {about!r}"
    except BaseException as error:
        return told(error, about)
    if "Traceback" in err.getvalue():
        return f"traceback: {err.getvalue().splitlines()[-1][:200]} of {about!r}"
    if time.monotonic() - began > SLOW_S:
        return f"slow: {time.monotonic() - began:.0f} s of {about!r}"
    return answer


def told(error: BaseException, about: Any) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    mine = [f for f in traceback.extract_tb(error.__traceback__) if "/rlx/" in f.filename]
    where += f" from {Path(mine[-1].filename).name}:{mine[-1].lineno}" if mine else ""
    return f"traceback: {type(error).__name__} {str(error)[:150]!r} at {where} of {about!r:.200}"


class Died(Exception):
    """A real process ended otherwise than it should."""


def in_a_process(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"rlx.{name}", *arguments]
    done = subprocess.run(
        line, capture_output=True, timeout=300, check=False, errors="replace", text=True
    )
    if done.returncode < 0:
        raise Died(f"crash: signal {-done.returncode}")
    if "Traceback" in done.stderr or done.returncode not in (0, 1, 2):
        raise Died(f"traceback: {done.stderr.splitlines()[-1][:300]}")
    return done


def work_processes(rng: random.Random, shared: Path) -> dict[str, str]:
    os.chdir(tempfile.mkdtemp(dir=shared))
    line = [text.replace("\x00", "") for text in command_line(rng)]

    def start() -> str:
        # The limit keeps a line that turns out to be good short.
        done = in_a_process("train", *line)
        return "taken" if done.returncode == 0 and not harmless(line) else ""

    return {"process": judged(start, line)}


# --- many cases ----------------------------------------------------------------------------------

WORK = {"overrides": work_overrides, "folders": work_folders, "processes": work_processes}


def work(what: str, seed: int, begin: int, end: int, shared: Path) -> None:
    """Works some cases and prints each one's findings as JSON."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    out = os.fdopen(os.dup(1), "w")
    for number in range(begin, end):
        print(json.dumps([number]), file=out, flush=True)
        found = WORK[what](random.Random(f"{seed} {what} {number}"), shared)
        print(json.dumps([number, found]), file=out, flush=True)
        os.chdir(shared)


def chunks(what: str, seed: int, count: int, shared: Path) -> Iterator[tuple[int, str, str]]:
    """(case, act, what was wrong or '') of each case."""
    begin = 0
    while begin < count:
        line = [
            sys.executable,
            __file__,
            "work",
            what,
            *map(str, (seed, begin, min(count, begin + CHUNK), shared)),
        ]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
        rows = [json.loads(row) for row in done.stdout.splitlines()]
        for row in rows:
            for act, wrong in row[1].items() if len(row) > 1 else ():
                yield row[0], act, wrong
        begin = max((row[0] for row in rows), default=begin) + 1
        if done.returncode:
            yield begin - 1, what, f"crash: the process ended with status {done.returncode}"


def main(argv: list[str]) -> int:
    if argv[:1] == ["work"]:
        work(argv[1], int(argv[2]), int(argv[3]), int(argv[4]), Path(argv[5]))
        return 0
    given = {"seed": "0", "overrides": "2000", "folders": "500", "processes": "20"}
    given |= dict(text.split("=", 1) for text in argv)
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="rlx-fuzz-") as shared:
        if int(given["folders"]):
            train_one(Path(shared) / "trained")
        for what in WORK:
            for number, act, wrong in chunks(
                what, int(given["seed"]), int(given[what]), Path(shared)
            ):
                kind = wrong.partition(":")[0] if ": " in wrong else "ok"
                counts.setdefault(act, Counter())[kind] += 1
                if kind != "ok" and kind in KINDS:
                    print(f"{what} {number} {act}: {wrong}", flush=True)
    print(f"\n{'':<10}" + "".join(f"{kind:>11}" for kind in KINDS))
    for act, found in counts.items():
        print(f"{act:<10}" + "".join(f"{found[kind]:>11}" for kind in KINDS))
    return int(any(found[kind] for found in counts.values() for kind in KINDS[1:]))


def train_one(folder: Path) -> None:
    """A small run that was resumed once, with two checkpoints, recorded experience and a diff."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import SMALL

    in_a_process("train", *SMALL, f"hydra.run.dir={folder}", f"replay.record={folder}/recorded")
    in_a_process("train", f"resume={folder}", "total_env_steps=550")
    (folder / "git.diff").write_text("diff --git a/x b/x\n+one\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
