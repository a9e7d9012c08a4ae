"""How fast, against what this machine could do: `python -m rlx.bench what=acting seconds=10`.

Every variant of a bench runs in slices, one after the other and round again, so that a noisy
machine disturbs them alike; a ratio is the median over the rounds of the ratio within a round.
Runs where neither ray nor envpool nor hydra is installed (`what=learner`). The last line printed
is one JSON object: {"what", "machine", "rows": [{"name", "value", "unit", "ratio"}]}.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from shutil import which
from time import perf_counter
from typing import Any

import jax
import numpy as np
import yaml

from rlx import trees, xla
from rlx._paths import config_dir
from rlx.acting.blocks import row_spec
from rlx.acting.local_pool import LocalPool
from rlx.acting.policy import Policy
from rlx.config import build
from rlx.interfaces import Agent
from rlx.types import ArraySpec, Batch, DiscreteSpec, EnvSpec, NetInput, Row, Weights

SLICE_S = 0.5

PONG = EnvSpec(
    id="Pong-v5",
    observation={"observation": ArraySpec(shape=(1, 84, 84), dtype="uint8")},
    action=DiscreteSpec(n=18),
    frames_per_env_step=4,
)
CARTPOLE = EnvSpec(
    id="CartPole-v1",
    observation={"observation": ArraySpec(shape=(2,), dtype="float32")},
    action=DiscreteSpec(n=2),
    frames_per_env_step=1,
)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A benched run: which file of each group, and its environment's spec without EnvPool."""

    name: str
    env: str
    network: str
    agent: str
    batch_size: int
    request_env_steps: int  # of a Ray actor's request: some tenths of a second of acting
    spec: EnvSpec


SETUPS = (
    Setup(
        name="cartpole",
        env="cartpole_memory",
        network="mlp_lstm",
        agent="r2d2_small",
        batch_size=32,
        request_env_steps=8192,
        spec=CARTPOLE,
    ),
    Setup(
        name="pong",
        env="atari",
        network="nature_lstm",
        agent="r2d2",
        batch_size=64,
        request_env_steps=256,
        spec=PONG,
    ),
)

Work = Callable[[], float]  # does a little and answers how much, in the bench's unit
Settle = Callable[[], object]  # waits for what work has left running


# --- measuring -----------------------------------------------------------------------------------


def measure(
    variants: Mapping[str, Work], seconds: float, settle: Mapping[str, Settle] | None = None
) -> dict[str, list[float]]:
    """Rates per second of each variant, one per round, within about `seconds` for all.

    A variant that leaves work running is settled within its own slice: not at the next one's cost.
    """
    waits = {name: (settle or {}).get(name, _nothing) for name in variants}
    for name, work in variants.items():
        work()  # compiles
        waits[name]()
    rates: dict[str, list[float]] = {name: [] for name in variants}
    end = perf_counter() + seconds
    while perf_counter() < end or not all(rates.values()):
        for name, work in variants.items():
            done, began = 0.0, perf_counter()
            while perf_counter() - began < SLICE_S or not done:
                done += work()
            waits[name]()
            rates[name].append(done / (perf_counter() - began))
    return rates


def _nothing() -> None:
    """Nothing was left running."""


def rows(
    rates: Mapping[str, Sequence[float]], *, prefix: str, unit: str, roofline: str
) -> list[dict[str, Any]]:
    """Median rates, and the median over the rounds of each round's ratio to the roofline."""
    return [
        {
            "name": f"{prefix}/{name}",
            "value": statistics.median(values),
            "unit": unit,
            "ratio": statistics.median(
                value / best for value, best in zip(values, rates[roofline], strict=True)
            ),
        }
        for name, values in rates.items()
    ]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": [str(device.device_kind) for device in jax.local_devices()],
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def report(what: str, found: list[dict[str, Any]]) -> None:
    """A table, then the same as one line of JSON."""
    print(f"{'name':<60} {'value':>14} {'unit':<14} {'ratio':>6}")
    for row in found:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        value = f"{row['value']:,.3f}" if row["value"] < 1 else f"{row['value']:,.1f}"
        print(f"{row['name']:<60} {value:>14} {row['unit']:<14} {ratio:>6}")
    print(json.dumps({"what": what, "machine": machine(), "rows": found}))


# --- parts ---------------------------------------------------------------------------------------


def settings(group: str, name: str) -> Any:
    """One file of a group, as it is (no hydra needed)."""
    return yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text())


def make_agent(setup: Setup, **changes: Any) -> Agent:
    """The setup's network, with changes of its settings, and agent."""
    own = settings("network", setup.network) | changes
    network = build(own, "network", spec=setup.spec)
    return build(settings("agent", setup.agent), "agent", network=network, spec=setup.spec)


def zero_batch(agent: Agent, size: int) -> Batch:
    """Sequences of valid rows without content, as the replay would give them."""
    length = agent.sequence.length
    rows: Row = trees.tree_map(
        lambda spec: np.zeros((size, length, *spec.shape), spec.dtype),
        row_spec(agent.spec, agent.acting_spec),
    )
    rows.valid[:] = True
    rows.discount[:] = 1
    return Batch(
        rows=rows,
        next=trees.tree_map(lambda leaf: leaf[:, 0].copy(), rows.inputs),
        carry=agent.initial_carry(size),
        importance=np.ones(size, np.float32),
    )


def random_batch(agent: Agent, size: int) -> Batch:
    """The same with noise for observations."""
    batch, rng = zero_batch(agent, size), np.random.default_rng(0)
    for leaf in batch.rows.inputs.observation.values():
        leaf[...] = rng.integers(0, 256, leaf.shape) if leaf.dtype == np.uint8 else 0.1
    return trees.tree_map(np.asarray, batch)


# --- benches -------------------------------------------------------------------------------------


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


def raw_stepping(family: Any, lanes: int, policy: Policy | None) -> Work:
    """EnvPool's own `step` in a bare loop, without adapter, rows or blocks."""
    pool = family.open(lanes=lanes, seeds=list(range(lanes)))
    columns = None if family.components is None else np.asarray(family.components)
    lane = np.arange(lanes, dtype=np.int32)
    zeros = np.zeros(lanes, np.int32)
    nothing: Any = np.zeros(lanes, np.float32), np.zeros(lanes, bool)
    state: dict[str, Any] = {"observation": pool.reset()[0], "action": zeros, "ended": nothing[1]}

    def work() -> float:
        if policy is not None:
            seen = state["observation"]
            inputs = NetInput(
                observation={"observation": seen if columns is None else seen[:, columns]},
                prev_action=state["action"],
                prev_reward=nothing[0],
                time=zeros,
                first=nothing[1],
            )
            state["action"], _ = policy.act(inputs, None, nothing[0])
        resets = int(np.count_nonzero(state["ended"]))  # rows that are no env steps
        state["observation"], _, terminated, truncated, _ = pool.step(state["action"], lane)
        state["ended"] = terminated | truncated
        return lanes - resets

    return work


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
