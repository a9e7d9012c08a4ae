"""Measuring that the benches share: turns of variants, setups, parts without a run, the table.

Every variant of a bench runs in slices, one after the other and round again, so that a noisy
machine disturbs them alike; a ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any

import jax
import numpy as np
import yaml

from rlx import trees
from rlx.acting.plan import row_spec
from rlx.acting.policy import Policy
from rlx.config.build import build
from rlx.config.paths import config_dir
from rlx.interfaces import ActingPool, Agent, EnvFamily, RunContext
from rlx.problems import RunFailed
from rlx.types import ArraySpec, Batch, DiscreteSpec, EnvSpec, NetInput, Row

SLICE_S = 0.5
READY_S = 240.0  # for the actors of a pool to start, on a busy machine

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
CPU_BATCHES = {"pong": 16}  # sequences; one update of 64 takes a CPU half a minute

Work = Callable[[], float]  # does a little and answers how much, in the bench's unit
Settle = Callable[[], object]  # waits for what work has left running


# --- measuring -----------------------------------------------------------------------------------


def measure(
    variants: Mapping[str, Work],
    seconds: float,
    settle: Mapping[str, Settle] | None = None,
    *,
    before: Mapping[str, Settle] | None = None,
    slice_s: float | None = None,
) -> dict[str, list[float]]:
    """Rates per second of each variant, one per round, within about `seconds` for all.

    A variant that leaves work running is settled within its own slice: not at the next one's cost.
    before: what a variant needs before its slice begins, on nobody's time. slice_s: None: SLICE_S.
    """
    waits = {name: (settle or {}).get(name, _nothing) for name in variants}
    prepared = {name: (before or {}).get(name, _nothing) for name in variants}
    least_s = SLICE_S if slice_s is None else slice_s
    for name, work in variants.items():
        work()  # compiles
        waits[name]()
    rates: dict[str, list[float]] = {name: [] for name in variants}
    end = perf_counter() + seconds
    while perf_counter() < end or not all(rates.values()):
        for name, work in variants.items():
            prepared[name]()
            done, began = 0.0, perf_counter()
            while perf_counter() - began < least_s or not done:
                done += work()
            waits[name]()
            rates[name].append(done / (perf_counter() - began))
    return rates


def _nothing() -> None:
    """Does nothing: nothing was left running."""


def rows(
    rates: Mapping[str, Sequence[float]], *, prefix: str, unit: str, roofline: str
) -> list[dict[str, Any]]:
    """A row per variant: its median rate, and the median of its rounds' ratios to the roofline.

    Beside them stand the roofline's median rate and the least and the largest ratio of a round.
    """
    return [
        compared(
            f"{prefix}/{name}",
            statistics.median(values),
            unit,
            roofline=statistics.median(rates[roofline]),
            ratios=[value / best for value, best in zip(values, rates[roofline], strict=True)],
        )
        for name, values in rates.items()
    ]


def compared(
    name: str, value: float, unit: str, *, roofline: float, ratios: Sequence[float]
) -> dict[str, Any]:
    """A row beside its roofline; ratios: one of each round."""
    found = alone(name, value, unit) | {"roofline": roofline, "ratio": statistics.median(ratios)}
    return found | {"least": min(ratios), "most": max(ratios)}


def alone(name: str, value: float, unit: str, ratio: float | None = None) -> dict[str, Any]:
    """A row that has no roofline; its ratio, if it has one, is to something else."""
    row = {"name": name, "value": float(value), "unit": unit, "ratio": ratio}
    return row | {"roofline": None, "least": None, "most": None}


def machine() -> dict[str, Any]:
    """The machine that the figures were measured on."""
    return {
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": [str(device.device_kind) for device in jax.local_devices()],
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def report(what: str, found: list[dict[str, Any]], where: Mapping[str, Any] | None = None) -> None:
    """Prints a table, then the same as one line of JSON; where: the machine, None: this one."""
    print(f"{'name':<60} {'value':>14} {'unit':<14} {'ratio':>6}")
    for row in found:
        if row["value"] is None:
            print(f"{row['name']:<60} {row['note']}")
            continue
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        value = f"{row['value']:,.3f}" if row["value"] < 1 else f"{row['value']:,.1f}"
        print(f"{row['name']:<60} {value:>14} {row['unit']:<14} {ratio:>6}")
    about = machine() if where is None else where
    print(json.dumps({"what": what, "machine": about, "rows": found}), flush=True)


def read_report(text: str) -> dict[str, Any] | None:
    """The JSON that `report` printed in this output; None where there is none."""
    lines = (line for line in reversed(text.splitlines()) if line.startswith('{"what"'))
    return next(map(json.loads, lines), None)


# --- parts ---------------------------------------------------------------------------------------


def settings(group: str, name: str) -> Any:
    """The settings in one file of a group, as they stand (Hydra is not needed)."""
    return yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text())


def context(agent: Agent, family: EnvFamily) -> RunContext:
    """Makes the record that a run that begins would give its pool."""
    return RunContext(
        family=family,
        agent=agent,
        exploration=build(settings("exploration", "ladder"), "exploration"),
        seed=0,
        output_dir=None,
        chain=0,
        env_steps=0,
        round_blocks=None,
    )


def await_actors(pool: ActingPool) -> None:
    """Waits until all actors of a pool that starts processes are ready; raises RunFailed."""
    end = perf_counter() + READY_S
    while (now := pool.stats()).get("acting/actors_ready") != now.get("acting/actors_wanted"):
        if now.get("acting/restarts"):
            pool.collect(0.0, 0)  # raises what went wrong, if no other actor is tried
        if perf_counter() > end:
            raise RunFailed(f"not all actors of the pool were ready within {READY_S:.0f} s")
        sleep(0.2)  # those that are ready fill what may be under way and leave the cores to others


def make_agent(setup: Setup, **changes: Any) -> Agent:
    """Makes the setup's agent, with its network; `changes` are settings of the network."""
    own = settings("network", setup.network) | changes
    network = build(own, "network", spec=setup.spec)
    return build(settings("agent", setup.agent), "agent", network=network, spec=setup.spec)


def zero_batch(agent: Agent, size: int) -> Batch:
    """A batch of valid rows of zeros, as the loop would give it."""
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
        env_steps=np.zeros(size, np.uint32),
    )


def random_batch(agent: Agent, size: int) -> Batch:
    """The same batch with noise for observations."""
    batch, rng = zero_batch(agent, size), np.random.default_rng(0)
    for leaf in batch.rows.inputs.observation.values():
        leaf[...] = rng.integers(0, 256, leaf.shape) if leaf.dtype == np.uint8 else 0.1
    return trees.tree_map(np.asarray, batch)


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
