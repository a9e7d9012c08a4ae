"""How fast, against what this machine could do: `python -m rlx.bench what=acting seconds=10`.

Every variant of a bench runs in slices, one after the other and round again, so that a noisy
machine disturbs them alike; a ratio is the median over the rounds of the ratio within a round.
Runs where neither ray nor envpool nor hydra is installed (`what=learner`). The last line printed
is one JSON object: {"what", "machine", "rows": [{"name", "value", "unit", "ratio"}]}.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from shutil import which
from typing import Any

import jax
import numpy as np

from rlx import xla
from rlx.acting.local_pool import LocalPool
from rlx.acting.policy import Policy
from rlx.bench_measuring import (
    SETUPS,
    Setup,
    Work,
    make_agent,
    measure,
    raw_stepping,
    report,
    rows,
    settings,
)
from rlx.config import build
from rlx.types import Weights


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
    pool: LocalPool = build(
        acting,
        "acting",
        family=family,
        agent=agent,
        exploration=build(settings("exploration", "ladder"), "exploration"),
        seed=0,
        chain=0,
        env_steps=0,
    )
    pool.publish(weights, 0)
    variants: dict[str, Work] = {
        "envpool": raw_stepping(family, lanes, None),
        "envpool + policy": raw_stepping(family, lanes, policy),
        "local pool": lambda: sum(
            rollout.env_steps for rollout in pool.collect(pool.env_steps_per_request, 60.0, 0)
        ),
    }
    prefix = f"acting/{setup.name}"
    rates = measure(variants, seconds)
    return rows(rates, prefix=prefix, unit="env steps/s", roofline="envpool + policy")


Bench = Callable[[Setup, float], list[dict[str, Any]]]

BENCHES = ("acting", "learner", "replay")
POOLS = ("local", "ray_pool")
DEFAULTS = {
    "what": "",
    "seconds": "10",
    "setup": "all",
    "acting": "local",
    "rows": "100000,1000000",
    "batch": "",
    "dtype": "float32",
    "profile": "false",
    "replay": "false",
    "dense": "",
    "torch": "",
}
DTYPES = ("float32", "bfloat16")
SWITCH = ("false", "true")


def main() -> None:
    """`what=acting|learner|replay seconds=10 setup=cartpole|pong|all`, and one more of each.

    `seconds`: for each setup (replay: for each storage); `acting=local|ray_pool`: of what=acting;
    `rows=100000,1000000`: sizes of what=replay; of what=learner `batch=32,64` (sequences; none: the
    setup's own), `dtype=float32,bfloat16`, `replay=true` (from full replays, too),
    `profile=true` (a trace, and what took longest), `dense=512` (units before the core) and
    `torch=PYTHON` (PyTorch's update beside it; setup=pong).
    """
    names = [setup.name for setup in SETUPS]
    given = dict(text.partition("=")[::2] for text in sys.argv[1:])
    options = DEFAULTS | given
    what, chosen, seconds = options["what"], options["setup"], options["seconds"]
    known = what in BENCHES and chosen in (*names, "all") and options.keys() == DEFAULTS.keys()
    counts = [*options["rows"].split(","), *filter(None, options["batch"].split(","))]
    peered = not options["torch"] or (chosen == "pong" and which(options["torch"]) is not None)
    dense = options["dense"].isdigit() or not options["dense"]
    numbers = [
        peered,
        dense,
        _positive(seconds),
        *(count.isdigit() and int(count) > 0 for count in counts),
    ]
    switches = {options["profile"], options["replay"]} <= set(SWITCH)
    named = set(options["dtype"].split(",")) <= set(DTYPES) and switches
    if not known or not all(numbers) or not named or options["acting"] not in POOLS:
        print(
            f"rlx.bench: got {' '.join(sys.argv[1:]) or 'nothing'}; accepted: "
            f"what={'|'.join(BENCHES)} seconds=10 setup={'|'.join(names)}|all "
            f"acting={'|'.join(POOLS)} rows={DEFAULTS['rows']} batch=32,64 "
            f"dtype={','.join(DTYPES)} profile={'|'.join(SWITCH)} replay={'|'.join(SWITCH)} "
            "dense=512 torch=PYTHON (with setup=pong)",
            file=sys.stderr,
        )
        sys.exit(2)
    xla.prepare()
    setups = [setup for setup in SETUPS if chosen in (setup.name, "all")]
    runs = _benches(options)
    report(what, [row for setup in setups for run in runs for row in run(setup, float(seconds))])


def _benches(options: Mapping[str, str]) -> Sequence[Bench]:
    """What to run; parts that not every machine has are imported only if they are asked for."""
    what = options["what"]
    if what == "replay":
        from rlx.replay_bench import bench_replay

        return [partial(bench_replay, rows=int(size)) for size in options["rows"].split(",")]
    if what == "learner":
        from rlx.learner_bench import bench_learner

        profile, from_replays = (options[name] == "true" for name in ("profile", "replay"))
        batches = [int(size) if size else None for size in options["batch"].split(",")]
        return [
            partial(
                bench_learner,
                batch=batch,
                dtype=dtype,
                profile=profile,
                from_replays=from_replays,
                dense=int(options["dense"]) if options["dense"] else None,
                torch=options["torch"] or None,
            )
            for dtype in options["dtype"].split(",")
            for batch in batches
        ]
    if options["acting"] == "ray_pool":
        from rlx.ray_bench import bench_ray

        return [bench_ray]
    return [bench_acting]


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


if __name__ == "__main__":
    main()
