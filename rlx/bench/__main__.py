"""Measures rlx against what this machine could do: `python -m rlx.bench what=acting seconds=10`.

Options, and the bench that each belongs to:

    what=NAME          acting | learner | replay | rounds (required)
    seconds=10         of measuring, for each setup (replay: for each storage)
    setup=all          cartpole | pong | all: environment, network and sizes
    acting=local       local | ray_pool (what=acting)
    rows=100000,1000000    sizes of the replays (what=replay)
    batch=             sequences of an update, as batch=32,64; nothing: the setup's (what=learner)
    dtype=float32      float32 | bfloat16, or both with a comma between (what=learner)
    replay=false       true: also batches from full replays (what=learner)
    profile=false      true: a trace of three updates, and what took longest (what=learner)
    dense=null         units of the layer before the core, as dense=512 (what=learner)
    torch=null         a python with PyTorch, whose update runs beside (what=learner setup=pong)
    experiment=atari_ppo,atari_pqn    of on-policy agents (what=rounds)
    overrides=         of these runs, as overrides=acting=threads,agent.unroll=64 (what=rounds)

Every variant of a bench runs in slices, one after the other and round again, so that a noisy
machine disturbs them alike; a ratio is the median over the rounds of the ratio within a round.
Runs where neither ray nor envpool nor hydra is installed (`what=learner`). The last line printed
is one JSON object: {"what", "machine", "rows": [{"name", "value", "unit", "ratio"}]}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from shutil import which
from typing import Annotated, Any, Literal

import jax
import numpy as np

from rlx.acting.local_pool import LocalPool
from rlx.acting.policy import Policy
from rlx.bench.measuring import (
    SETUPS,
    Setup,
    Work,
    context,
    make_agent,
    measure,
    raw_stepping,
    report,
    rows,
    settings,
)
from rlx.config.build import build
from rlx.config.options import command
from rlx.machine import xla
from rlx.problems import refuse
from rlx.types import Range, Weights


def bench_acting(setup: Setup, seconds: float) -> list[dict[str, Any]]:
    """Raw EnvPool, EnvPool with the jitted policy (the roofline), the whole local pool."""
    agent, acting = make_agent(setup), settings("acting", "local")
    lanes, device = acting["envs_per_actor"], acting["device"]
    family = build(settings("env", setup.env), "env")
    state = agent.init(jax.random.PRNGKey(0))
    params = jax.tree.map(np.asarray, agent.acting_params(state))
    weights = Weights(version=0, params=params)
    policy = Policy(agent=agent, lanes=lanes, seed=0, path=("bench",), device=device)
    policy.take(weights)
    pool = build(acting, LocalPool).open(context(agent, family))
    pool.publish(weights, 0)
    variants: dict[str, Work] = {
        "envpool": raw_stepping(family, lanes, None),
        "envpool + policy": raw_stepping(family, lanes, policy),
        "local pool": lambda: sum(rollout.env_steps for rollout in pool.collect(60.0, 0)),
    }
    prefix = f"acting/{setup.name}"
    rates = measure(variants, seconds)
    return rows(rates, prefix=prefix, unit="env steps/s", roofline="envpool + policy")


Bench = Callable[[Setup, float], list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line takes these options; the module's docstring explains them."""

    what: Literal["acting", "learner", "replay", "rounds"]
    seconds: Annotated[float, Range(gt=0)] = 10.0
    setup: Literal["cartpole", "pong", "all"] = "all"
    acting: Literal["local", "ray_pool"] = "local"
    rows: tuple[Annotated[int, Range(ge=1)], ...] = (100_000, 1_000_000)
    batch: tuple[Annotated[int, Range(ge=1)], ...] = ()
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    replay: bool = False
    profile: bool = False
    dense: Annotated[int, Range(ge=0)] | None = None
    torch: str | None = None
    experiment: tuple[str, ...] = ("atari_ppo", "atari_pqn")
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.torch is not None and self.setup != "pong":
            raise refuse("torch", "has the paper's network; add setup=pong", given=self.torch)
        if self.torch is not None and which(self.torch) is None:
            raise refuse("torch", "no such program; give the path of a python", given=self.torch)


def main(argv: Sequence[str] | None = None) -> None:
    """`what=acting|learner|replay|rounds`; the module's docstring lists the options."""
    command("rlx.bench", __doc__, Options, _bench, argv)


def _bench(options: Options) -> None:
    xla.prepare()
    if options.what == "rounds":
        report(options.what, _rounds(options))
        return
    setups = [setup for setup in SETUPS if options.setup in (setup.name, "all")]
    runs = _benches(options)
    found = [row for setup in setups for run in runs for row in run(setup, options.seconds)]
    report(options.what, found)


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
    if options.acting == "ray_pool":
        from rlx.bench.actors import bench_ray

        return [bench_ray]
    return [bench_acting]


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
