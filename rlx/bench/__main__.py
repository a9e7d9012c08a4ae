"""Measures rlx against what this machine could do: `python -m rlx.bench what=all`.

Options, and the bench that each belongs to:

    what=NAME          acting | learner | replay | weights | end_to_end | rounds | scaling, or
                       all, which writes one table of them into a folder (required)
    seconds=10         of measuring, for each setup (replay: each storage; scaling: each number)
    setup=all          cartpole | pong | all: environment, network and sizes
    acting=local       local | threads | ray_pool (what=acting, end_to_end); what=scaling: local
                       is over lanes, ray_pool over actors
    lanes=             of the local pool, as lanes=1,8; nothing: its own 32 (what=acting), or
                       1,8,32,128 (what=scaling)
    actors=            of the scaling, as actors=1,2; nothing: 1,2,4,8,32 (what=all: 1,2,4,8)
    rows=100000,1000000    sizes of the replays (what=replay; what=all takes the first)
    batch=             sequences of an update, as batch=32,64; nothing: the setup's
                       (what=learner; what=end_to_end and all take the first, for Pong 16)
    dtype=float32      float32 | bfloat16, or both with a comma between (what=learner)
    replay=false       true: also batches from full replays (what=learner)
    profile=false      true: a trace of three updates, and what took longest (what=learner)
    dense=null         units of the layer before the core, as dense=512 (what=learner)
    torch=null         a python with PyTorch, whose update runs beside (what=learner setup=pong)
    experiment=atari_ppo,atari_pqn    of on-policy agents (what=rounds)
    overrides=         of runs, as overrides=agent.unroll=64,seed=1 (what=rounds, end_to_end;
                       what=all: of its runs with replay)
    groups=acting,replay,learner,weights,end_to_end,scaling    the parts of the table (what=all)
    minutes=40         after which nothing more is measured (what=all)
    folder=null        where bench.md, bench.csv and bench.png go; null: bench/DATE-TIME (what=all)

Every variant of a bench runs in slices, one after the other and round again, so that a noisy
machine disturbs them alike; a ratio is the median over the rounds of the ratio within a round.
Runs where neither ray nor envpool nor hydra is installed (`what=learner`). The last line printed
is one JSON object: {"what", "machine", "rows": [{"name", "value", "unit", "ratio", "roofline",
"least", "most"}]}, with the roofline's value and the least and the largest ratio of a round.
`what=all` runs each measurement as a command of its own: one that cannot be made says so in its
row, and the others go on. It leaves a picture out where matplotlib is not installed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from shutil import which
from typing import Annotated, Any, Literal

from rlx.bench.measuring import SETUPS, Setup, report
from rlx.config.options import command
from rlx.machine import xla
from rlx.machine.signals import sigterm_interrupts
from rlx.problems import refuse, show
from rlx.types import Range

Count = Annotated[int, Range(ge=1)]
Bench = Callable[[Setup, float], list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line takes these options; the module's docstring explains them."""

    what: Literal[
        "acting", "learner", "replay", "weights", "end_to_end", "rounds", "scaling", "all"
    ]
    seconds: Annotated[float, Range(gt=0)] = 10.0
    setup: Literal["cartpole", "pong", "all"] = "all"
    acting: Literal["local", "threads", "ray_pool"] = "local"
    lanes: tuple[Count, ...] = ()
    actors: tuple[Count, ...] = ()
    rows: tuple[Count, ...] = (100_000, 1_000_000)
    batch: tuple[Count, ...] = ()
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    replay: bool = False
    profile: bool = False
    dense: Annotated[int, Range(ge=0)] | None = None
    torch: str | None = None
    experiment: tuple[str, ...] = ("atari_ppo", "atari_pqn")
    overrides: tuple[str, ...] = ()
    groups: tuple[
        Literal["acting", "replay", "learner", "weights", "end_to_end", "scaling"], ...
    ] = ("acting", "replay", "learner", "weights", "end_to_end", "scaling")
    minutes: Annotated[float, Range(gt=0)] = 40.0
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.torch is not None and self.setup != "pong":
            raise refuse("torch", "has the paper's network; add setup=pong", given=self.torch)
        if self.torch is not None and which(self.torch) is None:
            raise refuse("torch", "no such program; give the path of a python", given=self.torch)
        if self.what == "all" and not self.rows:
            raise refuse("rows", "give the size of the replay", given="")
        if self.what == "all" and not self.groups:
            raise refuse("groups", "give one at least", given="")
        if self.what == "scaling" and self.acting == "threads":
            says = "what=scaling accepts local (over lanes) or ray_pool (over actors)"
            raise refuse("acting", says, given=self.acting)


def main(argv: Sequence[str] | None = None) -> None:
    """`what=acting|learner|...|all`; the module's docstring lists the options."""
    with sigterm_interrupts():
        command("rlx.bench", __doc__, Options, _bench, argv)


def _bench(options: Options) -> None:
    xla.prepare()
    if options.what == "all":
        _everything(options)
        return
    if options.what == "rounds":
        report(options.what, _rounds(options))
        return
    setups, runs = _setups(options), _benches(options)
    found = [row for setup in setups for run in runs for row in run(setup, options.seconds)]
    report(options.what, found)


def _setups(options: Options) -> list[Setup]:
    return [setup for setup in SETUPS if options.setup in (setup.name, "all")]


def _everything(options: Options) -> None:
    from rlx.bench.everything import Choices, bench_everything

    if options.overrides and "end_to_end" in options.groups:
        from rlx.bench.end_to_end import refuse_overrides

        refuse_overrides(_setups(options), options.overrides)
    choices = Choices(
        groups=options.groups,
        setup=options.setup,
        seconds=options.seconds,
        rows=options.rows[0],
        batch=next(iter(options.batch), None),
        lanes=options.lanes,
        actors=options.actors,
        overrides=options.overrides,
    )
    folder = None if options.folder is None else Path(options.folder)
    bench_everything(choices, folder, options.minutes, _line(options))


def _line(options: Options) -> str:
    """The command line that gives these options."""
    given = [
        f"{field.name}={_text(getattr(options, field.name))}"
        for field in fields(options)
        if getattr(options, field.name) != field.default
    ]
    return shlex.join(["python", "-m", "rlx.bench", *given])


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else show(value)


def _rounds(options: Options) -> list[dict[str, Any]]:
    from rlx.bench.rounds import bench_rounds

    return [
        row
        for name in options.experiment
        for row in bench_rounds(
            [f"experiment={name}", *options.overrides], options.seconds, name=name
        )
    ]


def _benches(options: Options) -> Sequence[Bench]:
    """Chooses what to run; parts that not every machine has are imported only if asked for."""
    if options.what == "replay":
        from rlx.bench.replay import bench_replay

        return [partial(bench_replay, rows=size) for size in options.rows]
    if options.what == "learner":
        return _learner_benches(options)
    if options.what == "end_to_end":
        from rlx.bench.end_to_end import bench_end_to_end

        batch, overrides = next(iter(options.batch), None), options.overrides
        run = partial(bench_end_to_end, acting=options.acting)
        return [partial(run, batch=batch, overrides=overrides)]
    if options.what == "weights" or options.acting == "ray_pool":
        return _ray_benches(options)
    return _pool_benches(options)


def _ray_benches(options: Options) -> Sequence[Bench]:
    from rlx.bench import actors

    if options.what == "weights":
        return [actors.bench_weights]
    if options.what == "scaling":
        return [partial(actors.bench_scaling, actors=options.actors or actors.SCALE)]
    return [actors.bench_pool]


def _pool_benches(options: Options) -> Sequence[Bench]:
    from rlx.bench.pools import LANES, bench_acting, bench_lanes

    if options.what == "scaling":
        return [partial(bench_lanes, lanes=options.lanes or LANES)]
    run = partial(bench_acting, acting=options.acting)
    return [partial(run, lanes=each) for each in options.lanes or (None,)]


def _learner_benches(options: Options) -> Sequence[Bench]:
    from rlx.bench.learner import bench_learner

    return [
        partial(
            bench_learner,
            batch=batch,
            dtype=dtype,
            profile=options.profile,
            from_replays=options.replay,
            dense=options.dense,
            torch=options.torch,
        )
        for dtype in options.dtype
        for batch in options.batch or (None,)
    ]


if __name__ == "__main__":
    main()
