"""Evaluates a run: `python -m rlx.evaluate run=DIR episodes=100`.

The episodes that started first are counted (rlx/evaluation/playing.py), played on the CPU. Options:

    run=DIR            the folder of a run (required)
    episodes=100       how many are played
    epsilon=null       share of random actions; null: the run's evaluation.epsilon, or other's
    envs=null          lanes; null: the run's evaluation.envs
    other=null         the name of one of the run's evaluation.others: in its environment, with
                       its epsilon
    which=latest       latest | best | the folder of a checkpoint
    seed=0             of environments and random actions; the same seed gives the same returns
    record=false       true: a video of the first episode, DIR/videos/evaluation-<env steps>.mp4,
                       or .gif where imageio finds no ffmpeg; needs pip install rlx[video]
                       grid: of the first episodes side by side, with the Q-value of each action,
                       the chosen one and the return so far, DIR/videos/...-grid.mp4
    grid=9             episodes in that grid; at most envs and episodes
    record_fps=30      frames per second of that video, one per env step
    allow=null         packages that the run's env.id=module:name may import, with commas between
    output=null        the file to write; null: DIR/evaluation.json, or, if something of the above
                       is not as in the run's own last evaluation, DIR/other_evaluations.json

Reports take a run's score from DIR/evaluation.json. So only evaluations of the newest parameters,
with the run's evaluation.epsilon and at least as many episodes as end its training, go there; the
others are kept apart, each with what it `differs` in. A file holds {"evaluations": [...]}, the
newest last: a further evaluation is added to it.
`rlx.load(DIR).evaluate(episodes=100)` does the same from Python and writes no file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax

from rlx import api
from rlx.config.build import plain
from rlx.config.documents import read_json
from rlx.config.options import command
from rlx.problems import RunFailed, refuse
from rlx.runs.files import write_json
from rlx.runs.folders import EVALUATION_FILE, OTHER_EVALUATIONS_FILE, newest_checkpoint
from rlx.runs.scores import differences
from rlx.types import Range

JSON = dict[str, Any]

FILES = (EVALUATION_FILE, OTHER_EVALUATIONS_FILE)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line takes these options; the module's docstring explains them."""

    run: str
    episodes: Annotated[int, Range(ge=1)] = 100
    epsilon: Annotated[float, Range(ge=0, le=1)] | None = None
    envs: Annotated[int, Range(ge=1)] | None = None
    other: str | None = None
    which: str = "latest"
    seed: Annotated[int, Range(ge=0)] = 0
    record: bool | Literal["grid"] = False
    grid: Annotated[int, Range(ge=1)] = 9
    record_fps: Annotated[float, Range(gt=0)] = 30.0
    output: str | None = None
    allow: tuple[str, ...] | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `rlx-evaluate`."""
    logging.basicConfig(level=logging.WARNING, format="rlx: %(message)s")
    logging.getLogger("rlx.evaluation").setLevel(logging.INFO)  # how far it is
    jax.config.update("jax_platforms", "cpu")  # a GPU's memory is not touched
    command("rlx", __doc__, Options, evaluate_run, argv, also=(RunFailed,))


def evaluate_run(options: Options) -> JSON:
    """Evaluates a run, adds the result to its evaluation.json, shows and returns it."""
    run = api.load(options.run, allow=options.allow or ())
    given = None if options.output is None else Path(options.output)
    for path in [given] if given else [run.output_dir / name for name in FILES]:
        read_evaluations(path)  # what could not be written in the end is refused now
    result = run.evaluate(
        episodes=options.episodes,
        which=options.which,
        other=options.other,
        epsilon=options.epsilon,
        envs=options.envs,
        seed=options.seed,
        record=options.record,
        grid=options.grid,
        record_fps=options.record_fps,
    )
    differs = differences(result, plain(run.cfg), newest_checkpoint(run.output_dir))
    output = given or run.output_dir / FILES[bool(differs)]
    added = result | {"differs": differs} if differs else result
    try:
        write_json(output, {"evaluations": [*read_evaluations(output), added]})
    except OSError as error:
        says = f"cannot be written ({error.strerror}); make room, or give another"
        raise refuse("output", says, given=str(output)) from error
    _show(result, output)
    return result


def read_evaluations(path: Path) -> list[JSON]:
    """Reads an evaluation.json, oldest first; raises ConfigError if another file is there."""
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        says = "cannot be written; give output=FILE in a folder that exists and can be written"
        raise refuse("output", says, given=str(path))
    if not path.exists():
        return []
    try:
        return list(read_json(path)["evaluations"])
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
