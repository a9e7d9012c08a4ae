"""Evaluation, during training and after it: `python -m rlx.evaluate run=DIR episodes=100`.

The episodes that *started* first are counted, not those that ended first: short ones would weigh
too much. They are played on the CPU, beside whatever trains on the GPUs. Options:

    run=DIR            the folder of a run (required)
    episodes=100       how many are played
    epsilon=null       share of random actions; null: the run's evaluation.epsilon
    envs=null          lanes; null: the run's evaluation.envs
    which=latest       latest | best | the folder of a checkpoint
    seed=0             of environments and random actions; the same seed gives the same returns
    record=false       true: a video of the first episode, DIR/videos/evaluation-<env steps>.mp4,
                       or .gif where imageio finds no ffmpeg; needs pip install rlx[video]
                       grid: of the first episodes side by side, with the Q-value of each action,
                       the chosen one and the return so far, DIR/videos/...-grid.mp4
    grid=9             episodes in that grid; at most envs and episodes
    record_fps=30      frames per second of that video, one per env step
    output=null        the file to write; null: DIR/evaluation.json

The file holds {"evaluations": [...]}, the newest last: a further evaluation is added to it.
`rlx.load(DIR).evaluate(episodes=100)` does the same from Python and writes no file.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import numpy as np

from rlx.acting.inputs import InputTracker
from rlx.acting.policy import Policy
from rlx.films import GridRecorder, Recorder, not_recorded, with_values
from rlx.interfaces import Agent, Env, EnvFamily
from rlx.metrics import write_json
from rlx.problems import ConfigError, Problem, or_exit, refuse
from rlx.seeding import spawn_int
from rlx.statistics import summarize
from rlx.types import Episode, Range, Timestep, Weights

log = logging.getLogger(__name__)

JSON = dict[str, Any]

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When and how a run is evaluated (conf/evaluation)."""

    every_env_steps: Annotated[int, Range(ge=1)] | None
    episodes: Annotated[int, Range(ge=1)]
    final_episodes: Annotated[int, Range(ge=0)]
    epsilon: Annotated[float, Range(ge=0, le=1)]
    envs: Annotated[int, Range(ge=1)]
    where: Literal["inline", "actor"]  # actor: in a Ray actor, beside the training

    def returns(
        self,
        *,
        agent: Agent,
        weights: Weights,
        family: EnvFamily,
        episodes: int,
        seed: int,
        watch: Watch | None = None,
    ) -> list[float]:
        """Unclipped returns of that many episodes."""
        finished = run_episodes(
            agent=agent,
            weights=weights,
            family=family,
            episodes=episodes,
            lanes=min(self.envs, episodes),
            epsilon=self.epsilon,
            seed=seed,
            watch=watch,
        )
        return [episode.ret for episode in finished]


# --- playing -------------------------------------------------------------------------------------


def run_episodes(
    *,
    agent: Agent,
    weights: Weights,
    family: EnvFamily,
    episodes: int,
    lanes: int,
    epsilon: float,
    seed: int,
    watch: Watch | None = None,
    acted: Acted | None = None,
    render: bool = False,
) -> list[Episode]:
    """The `episodes` episodes that started first, in the order in which they started.

    `watch` sees the environment, its answer and who started what, after every step; `acted` then
    sees the actions [n, *] chosen for that answer and the agent's record of them.
    """
    env = _open(family, lanes, seed, render)
    policy = Policy(
        agent=agent, lanes=lanes, seed=seed, path=("evaluation", "policy"), device="cpu"
    )
    policy.take(weights)
    tracker, starts = InputTracker(lanes, env.spec.action), Starts(lanes, episodes)
    exploration = np.full(lanes, epsilon, np.float32)
    try:
        timestep = env.reset()
        while True:
            if watch is not None:
                watch(env, timestep, starts)
            if starts.complete:
                return starts.finished()
            index = tracker.index(timestep.lane)
            subset = None if isinstance(index, slice) else timestep.lane
            action, acting = policy.act(tracker.inputs(timestep, index), subset, exploration[index])
            tracker.acted(index, action)
            if acted is not None:
                acted(action, acting)
            timestep = env.step(action, timestep.lane)
            starts.ended(env.episodes())
    finally:
        env.close()


def _open(family: EnvFamily, lanes: int, seed: int, render: bool) -> Env:
    # Answers of all lanes at once: else the machine's load decides which episodes start first,
    # and a batch size that suits the lanes of training may be more than there are here.
    if dataclasses.is_dataclass(family) and getattr(family, "batch_size", None) is not None:
        family = dataclasses.replace(family, batch_size=None)
    seeds = [spawn_int(seed, "evaluation", lane) for lane in range(lanes)]
    if not render:
        return family.make(lanes=lanes, seeds=seeds)
    drawing: Any = family  # `render` is no part of every family
    try:
        return drawing.make(lanes=lanes, seeds=seeds, render=True)
    except (ValueError, TypeError) as error:
        raise not_recorded(str(error)) from error


Watch = Callable[[Env, Timestep, "Starts"], None]
Acted = Callable[[np.ndarray, Any], None]


class Starts:
    """Numbers episodes by when they started: a lane's next one starts where its last one ended."""

    def __init__(self, lanes: int, episodes: int) -> None:
        self.number = np.arange(lanes)  # of the episode each lane is in
        self._wanted, self._next = episodes, lanes
        self._ended: dict[int, Episode] = {}

    @property
    def complete(self) -> bool:
        return len(self._ended) == self._wanted

    def ended(self, episodes: list[Episode]) -> None:
        for episode in episodes:
            number = int(self.number[episode.lane])
            if number < self._wanted:
                self._ended[number] = episode
            self.number[episode.lane] = self._next
            self._next += 1

    def finished(self) -> list[Episode]:
        return [self._ended[number] for number in sorted(self._ended)]


def evaluate(
    *,
    agent: Agent,
    weights: Weights,
    family: EnvFamily,
    episodes: int,
    lanes: int,
    epsilon: float,
    seed: int,
    recorder: Recorder | GridRecorder | None = None,
) -> JSON:
    """Plays that many episodes; their statistics, returns and settings, ready for JSON."""
    lanes = min(lanes, episodes)
    finished = run_episodes(
        agent=with_values(agent) if isinstance(recorder, GridRecorder) else agent,
        weights=weights,
        family=family,
        episodes=episodes,
        lanes=lanes,
        epsilon=epsilon,
        seed=seed,
        watch=recorder,
        acted=recorder.acted if isinstance(recorder, GridRecorder) else None,
        render=recorder is not None,
    )
    returns = [episode.ret for episode in finished]
    return {
        "env_id": agent.spec.id,
        "seed": seed,
        "epsilon": epsilon,
        "envs": lanes,
        **summarize(returns, seed=seed),
        "length_mean": sum(episode.env_steps for episode in finished) / len(finished),
        "returns": returns,
    }


# --- the command line ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line takes; the module's docstring explains it."""

    run: str
    episodes: Annotated[int, Range(ge=1)]
    epsilon: Annotated[float, Range(ge=0, le=1)] | None
    envs: Annotated[int, Range(ge=1)] | None
    which: str
    seed: Annotated[int, Range(ge=0)]
    record: bool | Literal["grid"]
    grid: Annotated[int, Range(ge=1)]
    record_fps: Annotated[float, Range(gt=0)]
    output: str | None


DEFAULTS: Mapping[str, Any] = {
    "episodes": 100,
    "epsilon": None,
    "envs": None,
    "which": "latest",
    "seed": 0,
    "record": False,
    "grid": 9,
    "record_fps": 30.0,
    "output": None,
}
PATHS = ("run", "which", "output")


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `rlx-evaluate`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    logging.basicConfig(level=logging.WARNING, format="rlx: %(message)s")
    jax.config.update("jax_platforms", "cpu")  # a GPU's memory is not touched
    with or_exit("rlx"):
        evaluate_run(parse(arguments))


def evaluate_run(options: Options) -> JSON:
    """Evaluates a run, adds the result to its evaluation.json, shows and returns it."""
    from rlx import api

    run = api.load(options.run)
    output = Path(options.output or run.output_dir / EVALUATION_FILE)
    read_evaluations(output)  # what could not be written in the end is refused now
    result = run.evaluate(
        episodes=options.episodes,
        which=options.which,
        epsilon=options.epsilon,
        envs=options.envs,
        seed=options.seed,
        record=options.record,
        grid=options.grid,
        record_fps=options.record_fps,
    )
    write_json(output, {"evaluations": [*read_evaluations(output), result]})
    _show(result, output)
    return result


def parse(arguments: Sequence[str]) -> Options:
    """Options of `key=value` texts; raises a ConfigError with every problem."""
    return read_options(Options, DEFAULTS, PATHS, arguments)


T = TypeVar("T")


def read_options(
    cls: type[T], defaults: Mapping[str, Any], paths: Sequence[str], arguments: Sequence[str]
) -> T:
    """A command's options of `key=value` texts; raises a ConfigError with every problem.

    paths: the keys whose values are taken as they stand.
    """
    from rlx.config import read

    given: JSON = dict(defaults)
    problems: list[Problem] = []
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals:
            problems.append(Problem(path=text, says="write key=value; --help lists the keys"))
            continue
        try:
            given[key] = _value(value, as_it_stands=key in paths)
        except ValueError as error:
            problems.append(Problem(path=key, given=value, says=str(error)))
    try:
        options = read(cls, given)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return options


def _value(text: str, *, as_it_stands: bool) -> Any:
    """The value as YAML reads it; paths as they stand, since run=0 may be a folder."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if as_it_stands:
        return None if text in ("null", "") else text
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError("cannot be read; write a number, true, false or null") from error
    return tree["value"]


def read_evaluations(path: Path) -> list[JSON]:
    """What an evaluation.json holds, oldest first; a ConfigError if another file is there."""
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        says = "cannot be written; give output=FILE in a folder that exists and can be written"
        raise refuse("output", says, given=str(path))
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_bytes())["evaluations"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        says = "is no file of evaluations; move it away, or give another"
        raise refuse("output", says, given=str(path)) from error


def _show(result: Mapping[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    about = f"{result['env_id']} after {result['env_steps']:,} env steps"
    table = Table(title=f"{about}, epsilon {result['epsilon']:g}", title_justify="left")
    interval = f"{result['iqm']:.2f} [{result['iqm_low']:.2f}, {result['iqm_high']:.2f}]"
    columns = {
        "episodes": str(result["episodes"]),
        "mean": f"{result['mean']:.2f}",
        "IQM [95 %]": interval,
        "median": f"{result['median']:.2f}",
        "min": f"{result['min']:.2f}",
        "max": f"{result['max']:.2f}",
        "env steps": f"{result['length_mean']:.1f}",
    }
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*columns.values())
    console = Console(highlight=False)
    console.print(table, markup=False)
    for path in filter(None, (output, result["video"])):
        console.print(str(path), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
