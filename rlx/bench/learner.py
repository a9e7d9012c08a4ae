"""Measures updates against what the device's arithmetic allows:
`python -m rlx.bench what=learner batch=32,64 dtype=float32,bfloat16`.

For each batch size and compute dtype, in turn: the compiled update on data that lies on the device
(the roofline of the learner's path), and the learner's path as the loop takes it; `replay=true`
adds full replays, in the host's memory and in the device's; `torch=PYTHON` PyTorch's update of the
paper's network (setup=pong), in a process of that python. The floor is the update's products and
convolutions at the rate of one large matrix product, measured beside them.
"""

from __future__ import annotations

import gzip
import json
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx.bench import measuring
from rlx.bench.flops import count_flops
from rlx.bench.replay import RowSource, filled, frames_of
from rlx.config.build import build
from rlx.config.paths import config_dir
from rlx.interfaces import Agent
from rlx.training.learner import OpenLearner
from rlx.types import Sample, UpdateOutput

PRODUCT = {"cpu": 2048, "gpu": 8192}  # rows and columns of the matrices that are multiplied
PROFILED_UPDATES = 3
PEER = config_dir().parent / "experiments" / "peers" / "torch_update.py"
SHOWN = 10  # operations
REPLAYED_ROWS = 50_000  # of the replays that batches are drawn from
REPLAYS: Mapping[str, dict[str, Any]] = {
    "from host replay": {},
    "from host replay, 2 ahead": {"prefetch": 2},
    "from device replay": {"storage": "device"},
}


def bench_learner(
    setup: measuring.Setup,
    seconds: float,
    batch: int | None,
    dtype: str,
    profile: bool,
    from_replays: bool,
    dense: int | None,
    torch: str | None,
) -> list[dict[str, Any]]:
    """The floor, the compiled update and the learner's path: updates/s, then trained rows/s."""
    changes = {} if dense is None else {"dense_before_core": dense or None}
    agent = measuring.make_agent(setup, compute_dtype=dtype, **changes)
    size = setup.batch_size if batch is None else batch
    prefix = f"learner/{setup.name}/{dtype}/{size} sequences"
    update = Compiled(agent, size)
    paths: dict[str, LoopPath | Torch] = {
        "learner path": LoopPath(agent, size, SameBatch(agent, size))
    }
    if torch is not None:
        paths["PyTorch's update"] = Torch(torch, size, dense or 0)
    if from_replays:
        blocks = RowSource(agent, frames_of(setup))
        for name, keeping in REPLAYS.items():
            replay, _ = filled(agent, REPLAYED_ROWS, blocks, keeping, size)
            paths[name] = LoopPath(agent, size, replay)
    product = Product(dtype)
    variants: dict[str, measuring.Work] = {
        "compiled update": update.work,
        **{name: path.work for name, path in paths.items()},
        "product": product.work,
    }
    rates = measuring.measure(
        variants, seconds, {name: path.settle for name, path in paths.items()}
    )
    for path in paths.values():
        path.close()
    flop_rates = [rate * product.flops for rate in rates.pop("product")]
    rates = {"floor": [rate / update.flops for rate in flop_rates], **rates}
    found = measuring.rows(rates, prefix=prefix, unit="updates/s", roofline="compiled update")
    trained = size * agent.sequence.unroll
    details = [
        measuring.alone(f"{prefix}/one product", max(flop_rates) / 1e9, "GFLOP/s"),
        measuring.alone(f"{prefix}/update", update.flops / 1e9, "GFLOP"),
    ]
    rows = [_in_rows(row, trained) for row in found]
    return [*found, *rows, *details, *(_profiled(update, prefix) if profile else ())]


def _in_rows(row: dict[str, Any], trained: int) -> dict[str, Any]:
    """The same in trained rows per second."""
    more = {name: row[name] * trained for name in ("value", "roofline")}
    return row | more | {"unit": "trained rows/s"}


class Compiled:
    """The agent's update alone, on data that lies on the device."""

    def __init__(self, agent: Agent, size: int) -> None:
        self._update = jax.jit(agent.update, donate_argnums=0)
        self._batch = jax.device_put(measuring.random_batch(agent, size))
        self._state = jax.tree.map(jnp.array, agent.init(jax.random.PRNGKey(0)))
        self.flops = count_flops(agent.update, self._state, self._batch)

    def work(self) -> float:
        self._state, output = self._update(self._state, self._batch)
        jax.block_until_ready(output.priorities)
        return 1


class LoopPath:
    """Updates as the loop makes them: fresh host batches, late priorities, publishing."""

    def __init__(self, agent: Agent, size: int, replay: Any) -> None:
        own = measuring.settings("learner", "default") | {"batch_size": size}
        self._learner: OpenLearner = build(own, "learner").open(agent, 0)
        self._size, self._replay = size, replay
        self._waiting: list[tuple[np.ndarray, UpdateOutput]] = []
        self._published: list[Any] = []

    def work(self) -> float:
        learner = self._learner
        sample = self._replay.sample(self._size)
        output = learner.update(learner.put(sample.batch))
        self.settle()
        if self._published:
            self._published.pop().weights()
        self._waiting.append((sample.keys, output))
        if learner.publishes(updates=learner.updates, env_steps=0, published_env_steps=0):
            self._published.append(learner.publish())
        return 1

    def settle(self) -> None:
        while self._waiting:
            keys, output = self._waiting.pop()
            priorities = np.asarray(self._learner.priorities(output))
            self._replay.update_priorities(keys, priorities)

    def close(self) -> None:
        self._replay.close()


class SameBatch:
    """Stands for a replay that costs nothing: it gives the same batch always."""

    def __init__(self, agent: Agent, size: int) -> None:
        self._sample = Sample(
            batch=measuring.random_batch(agent, size),
            keys=np.arange(size),
            weights_version=np.zeros(size, np.int64),
            least_scaled_probability=1.0,
            importance_exponent=0.0,
        )

    def sample(self, batch_size: int) -> Sample:
        """The batch, whatever is asked for."""
        return self._sample

    def update_priorities(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """Does nothing: nothing is drawn by them."""

    def close(self) -> None:
        """Does nothing: nothing is open."""


class Torch:
    """The same update in PyTorch, in a process of its own (another venv's python)."""

    def __init__(self, python: str, size: int, dense: int) -> None:
        given = [f"sequences={size}", f"dense={dense}", "wait=true"]
        self._process = subprocess.Popen(
            [python, str(PEER), *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def work(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        if self._process.stdout.readline() != "done\n":
            raise SystemExit("rlx.bench: PyTorch's update ended; its error stands above.")
        return 1

    def settle(self) -> None:
        """Does nothing: an update has ended when `work` returns."""

    def close(self) -> None:
        self._process.communicate()


class Product:
    """One large matrix product."""

    def __init__(self, dtype: str) -> None:
        size = PRODUCT.get(jax.default_backend(), PRODUCT["gpu"])
        self.flops = 2.0 * size**3
        self._x = jnp.ones((size, size), dtype)
        self._product = jax.jit(jnp.matmul)

    def work(self) -> float:
        jax.block_until_ready(self._product(self._x, self._x))
        return 1


# --- profile -------------------------------------------------------------------------------------


def _profiled(update: Compiled, prefix: str) -> list[dict[str, Any]]:
    """Writes XLA's trace of a few updates; returns the operations that took longest."""
    folder = Path("profile") / prefix.replace(" ", "_")
    began = perf_counter()
    with jax.profiler.trace(str(folder)):
        for _ in range(PROFILED_UPDATES):
            update.work()
    whole_ms = 1e3 * (perf_counter() - began)
    print(f"rlx.bench: a trace is in {folder}; open it with Perfetto or TensorBoard")
    spent = _spent_ms(max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime))
    return [
        measuring.alone(f"{prefix}/{name}", ms / PROFILED_UPDATES, "ms/update", ms / whole_ms)
        for name, ms in spent.most_common(SHOWN)
    ]


def _spent_ms(trace: Path) -> Counter[str]:
    """Milliseconds of each of XLA's operations, over all threads or streams."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    spent: Counter[str] = Counter()
    for event in events:
        if (name := event.get("args", {}).get("hlo_op")) is not None:
            spent[name] += event["dur"] / 1e3
    return spent
