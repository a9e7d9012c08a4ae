"""A trained agent as one file that runs without rlx: `python -m rlx.export run=DIR`.

Options:

    run=DIR            the folder of a run (required)
    out=null           the file to write; null: DIR/agent.zip. One that is there is replaced
    which=latest       latest | best | the folder of a checkpoint
    batch=symbolic     how many environments one call acts in: any number, or just so many
    allow=null         packages that the run's env.id=module:name may import, with commas between
    platforms=cpu      what it can run on, of cpu, cuda, rocm and tpu: platforms=cpu,cuda

The file needs jax, numpy and flatbuffers where it is used, not rlx; so does writing it
(pip install 'rlx[export]'). It holds

    act.jax_export     the greedy policy with its parameters, as `jax.export` serialises it:
                       action, state = act(observation, reward, first, state), dicts of arrays
    agent.json         what goes in and comes out (names, shapes, dtypes), the environment, the
                       checkpoint, and the versions that wrote it

docs/using.md shows the ten lines that run it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import logging
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from rlx import api
from rlx.config.options import command
from rlx.envs.actions import Start
from rlx.envs.observations import RawSpaces, raw_spaces_of
from rlx.evaluation.player import act_in_lanes, state_shapes
from rlx.interfaces import Agent
from rlx.machine.packages import import_package
from rlx.problems import refuse
from rlx.runs.files import write_whole
from rlx.types import ActionSpec, Array, BoxSpec, DiscreteSpec, Params, Range

JSON = dict[str, Any]

FORMAT = 1  # of agent.json
FUNCTION, DESCRIPTION = "act.jax_export", "agent.json"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BATCH = "batch"  # the name of a symbolic number of environments
PACKAGES = ("rlx", "jax", "jaxlib", "numpy")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line takes these options; the module's docstring explains them."""

    run: str
    out: str | None = None
    which: str = "latest"
    batch: Literal["symbolic"] | Annotated[int, Range(ge=1)] = "symbolic"
    platforms: tuple[str, ...] = ("cpu",)
    allow: tuple[str, ...] | None = None


def export(
    run: api.Loaded,
    *,
    which: str | Path = "latest",
    batch: int | None = None,
    platforms: Sequence[str] = ("cpu",),
) -> bytes:
    """The bytes of the exported file; batch None: any number of environments."""
    _check(platforms)
    restored = run.restore(which)
    agent, params = run.agent, run.agent.acting_params(restored.state)
    raw_spaces = raw_spaces_of(run.family, agent.spec)
    lanes = jax.export.symbolic_shape(BATCH)[0] if batch is None else batch
    inputs = input_shapes(agent, raw_spaces, lanes)
    exported = _exported(agent, raw_spaces, params, inputs, platforms)
    about = {
        "format": FORMAT,
        "call": "action, state = act(observation, reward, first, state)",
        "env_id": agent.spec.id,
        "batch": BATCH if batch is None else batch,
        "inputs": {name: _described(part) for name, part in inputs.items()},
        "outputs": {
            "action": {
                **_described(inputs["state"]["action"]),
                **_limits(agent.spec.action, raw_spaces.action_start),
            },
            "state": _described(inputs["state"]),
        },
        "initial_state": "zeros; where `first` is true neither state nor reward is read",
        "platforms": list(platforms),
        "checkpoint": {
            "name": restored.path.name,
            "env_steps": restored.env_steps,
            "updates": restored.meta["updates"],
        },
        "calling_convention_version": exported.calling_convention_version,
        "versions": {name: _version(name) for name in PACKAGES},
    }
    return _zipped({DESCRIPTION: json.dumps(about, indent=2).encode(), FUNCTION: _bytes(exported)})


def input_shapes(agent: Agent, raw_spaces: RawSpaces, lanes: Any) -> dict[str, Any]:
    """The inputs of the exported function, in this order."""

    def each(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((lanes, *shape), dtype)

    return {
        "observation": {
            leaf.source.name: each(leaf.source.shape, _narrowed(leaf.source.dtype))
            for leaf in raw_spaces.leaves
        },
        "reward": each((), np.float32),
        "first": each((), bool),
        "state": state_shapes(agent, lanes),
    }


def _exported(
    agent: Agent, raw_spaces: RawSpaces, params: Params, inputs: JSON, platforms: Sequence[str]
) -> jax.export.Exported:
    def act(observation: Any, reward: Array, first: Array, state: Any) -> Any:
        key, greedy = jax.random.PRNGKey(0), jnp.zeros(first.shape, jnp.float32)
        return act_in_lanes(
            agent, raw_spaces, params, observation, reward, first, state, key, greedy
        )

    try:
        return jax.export.export(jax.jit(act), platforms=tuple(platforms))(*inputs.values())
    except Exception as error:  # it is anybody's network
        line = str(error).strip().split("\n")[0] or type(error).__name__
        raise refuse("batch", f"jax.export cannot write this agent so: {line}") from error


def _check(platforms: Sequence[str]) -> None:
    """Raises a ConfigError for what would fail after the work is done."""
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        says = f"accepted: one or more of {', '.join(PLATFORMS)}, with commas between"
        raise refuse("platforms", says, given=",".join(platforms))
    try:
        import_package("flatbuffers")
    except ImportError as error:
        says = "jax.export needs flatbuffers, which is not installed; pip install 'rlx[export]'"
        raise refuse("export", says) from error


def _narrowed(dtype: str) -> np.dtype:
    """The dtype as JAX takes it: 64-bit arrays become 32-bit there."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def _limits(action: ActionSpec, start: Start) -> JSON:
    """The action's limits: integers, or (nested) lists; null where there is no bound."""
    if isinstance(action, BoxSpec):
        return {
            "low": _nested(action.low, action.shape),
            "high": _nested(action.high, action.shape),
        }
    counts = action.n if isinstance(action, DiscreteSpec) else action.counts
    low = np.broadcast_to(np.asarray(start), np.shape(counts))
    return {"low": low.tolist(), "high": (low + np.asarray(counts) - 1).tolist()}


def _nested(bounds: Sequence[float], shape: tuple[int, ...]) -> Any:
    finite = [bound if math.isfinite(bound) else None for bound in bounds]
    return np.asarray(finite, object).reshape(shape).tolist()


def _described(tree: Any) -> JSON:
    if isinstance(tree, Mapping):
        return {name: _described(leaf) for name, leaf in tree.items()}
    shape = [size if isinstance(size, int) else BATCH for size in tree.shape]
    return {"shape": shape, "dtype": np.dtype(tree.dtype).name}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _bytes(exported: jax.export.Exported) -> bytes:
    return bytes(exported.serialize())


def _zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return buffer.getvalue()


# --- the command line ----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `rlx-export`."""
    logging.basicConfig(level=logging.WARNING, format="rlx: %(message)s")
    jax.config.update("jax_platforms", "cpu")  # a GPU's memory is not touched
    command("rlx.export", __doc__, Options, lambda options: print(export_run(options)), argv)


def export_run(options: Options) -> Path:
    """Writes the file; returns its path."""
    _check(options.platforms)
    run = api.load(options.run, allow=options.allow or ())
    out = Path(options.out or run.output_dir / "agent.zip")
    if out.is_dir() or not out.parent.is_dir():
        says = "cannot be written; give out=FILE in a folder that exists"
        raise refuse("out", says, given=str(out))
    batch = None if options.batch == "symbolic" else int(options.batch)
    data = export(run, which=options.which, batch=batch, platforms=options.platforms)
    try:
        write_whole(out, data)
    except OSError as error:
        raise refuse("out", f"cannot be written ({error})", given=str(out)) from error
    return out


if __name__ == "__main__":
    main()
