"""The training state in a checkpoint, as host arrays.

    state.npz       every leaf by its path, in a segment (rlx.replay.files.segments)
    state/          the same, written by orbax, in checkpoints of format 2; these are only read
    leaves.json     path -> dtype, shape and key kind of every leaf of the state

JAX and orbax are imported when they are needed, so that importing this module is cheap.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlx import trees
from rlx.config.documents import read_json
from rlx.problems import RunFailed, cut, first_line
from rlx.replay.files.segments import SegmentError, read_segment, write_segment
from rlx.types import ArraySpec

JSON = dict[str, Any]
STATE, LEAVES = "state.npz", "leaves.json"
FORMER = "state"  # orbax's folder
ADDED = {"gradient_steps": "updates"}  # leaves that older checkpoints lack: equal to these then
LEAF_KEYS = {"dtype", "shape", "key"}
SHOWN = 5  # differing leaves named in an error


class CheckpointError(RunFailed):
    """A checkpoint cannot be written or restored; says which, why and what to do."""


class Damaged(CheckpointError):
    """The checkpoint's files are not those that were written; another one may be whole."""


# --- writing -------------------------------------------------------------------------------------


def write_state(folder: Path, state: Any) -> None:
    """Writes the state's files and reads them back; raises CheckpointError if that fails."""
    import jax

    arrays: dict[str, np.ndarray] = {}
    leaves: dict[str, JSON] = {}
    for path, leaf in _flatten(state)[0].items():
        kind = str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
        leaves[path] = _describe(leaf) | {"key": kind}
        arrays[path] = np.asarray(jax.random.key_data(leaf) if kind else leaf)
    write_text(folder / LEAVES, json.dumps(leaves, indent=1))
    write_segment(folder / STATE, arrays, {})
    found = _read_arrays(folder, leaves)
    for path, array in arrays.items():
        if found[path].tobytes() != array.tobytes():
            raise CheckpointError(f"{folder / STATE}: {path} is read as another than was written.")


def _flatten(state: Any) -> tuple[dict[str, Any], Callable[[list[Any]], Any]]:
    """The leaves by path, and the function that makes the tree of new leaves."""
    import jax

    trees.register()
    pairs, structure = jax.tree_util.tree_flatten_with_path(state)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in pairs}
    if len(leaves) != len(pairs):
        raise CheckpointError("two leaves of the state have one path; rename one ('/' in a name?).")
    return leaves, functools.partial(jax.tree_util.tree_unflatten, structure)


def _is_key(leaf: Any) -> bool:
    import jax

    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> JSON:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


# --- reading -------------------------------------------------------------------------------------


def read_object(path: Path) -> JSON:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: cannot be read ({first_line(error)}).") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path}: damaged: it holds no JSON object.")
    return found


def read_state(folder: Path, like_state: Any, has_segment: bool) -> Any:
    """The state with the structure of `like_state`; has_segment: it is not of format 2."""
    saved = _read_leaves(folder)
    expected, rebuild = _flatten(like_state)
    same_as = {path: old for path, old in ADDED.items() if path in expected and path not in saved}
    saved |= {path: saved[old] for path, old in same_as.items() if old in saved}
    _compare(folder, saved, {path: _describe(leaf) for path, leaf in expected.items()})
    there = {path: about for path, about in saved.items() if path not in same_as}
    stored = (_read_arrays if has_segment else _read_orbax)(folder, there)
    stored |= {path: stored[old] for path, old in same_as.items()}
    return rebuild([_leaf(folder, path, saved[path], stored[path]) for path in expected])


def read_leaves(folder: Path, has_segment: bool) -> dict[str, np.ndarray]:
    """Every leaf by its path, whatever the state is of; of a PRNG key its data."""
    return (_read_arrays if has_segment else _read_orbax)(folder, _read_leaves(folder))


def _read_leaves(folder: Path) -> dict[str, JSON]:
    leaves = read_object(folder / LEAVES)
    for path, about in leaves.items():
        if not _is_description(about):
            raise Damaged(f"{folder / LEAVES}: damaged: {cut(path)} is not described.")
    return leaves


def _is_description(about: Any) -> bool:
    if not isinstance(about, dict) or not about.keys() >= LEAF_KEYS:
        return False
    shape, kinds = about["shape"], (about["dtype"], about["key"] or "")
    is_shape = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    return is_shape and all(isinstance(kind, str) for kind in kinds)


def _leaf(folder: Path, path: str, about: JSON, array: np.ndarray) -> Any:
    """The leaf of an array, which of a PRNG key is its data."""
    import jax

    leaf: Any = array
    if about["key"]:
        try:
            leaf = jax.random.wrap_key_data(jax.numpy.asarray(array), impl=about["key"])
        except Exception as error:  # JAX has several kinds for data that are no key's
            raise Damaged(f"{folder}: damaged: {path} is no key ({first_line(error)}).") from error
    if _describe(leaf) != {name: about[name] for name in ("dtype", "shape")}:
        raise Damaged(f"{folder}: damaged: {path} is not as {LEAVES} describes it.")
    return leaf


def _read_arrays(folder: Path, leaves: Mapping[str, JSON]) -> dict[str, np.ndarray]:
    def check(found: Mapping[str, ArraySpec]) -> None:
        """Raises ValueError unless the file has the arrays of these leaves, and no others."""
        if found.keys() != leaves.keys():
            raise ValueError(f"it has other arrays than {LEAVES}")

    try:
        return read_segment(folder / STATE, check)[0]
    except SegmentError as error:
        raise Damaged(cut(str(error))) from error


def _read_orbax(folder: Path, leaves: Mapping[str, JSON]) -> dict[str, np.ndarray]:
    """Reads a checkpoint of format 2, which has no leaf without elements.

    orbax keeps its log lines to itself.
    It takes some characters of a path for others (brackets, backslashes): the path that it gets is
    made of the folder's descriptor.
    """
    arrays = {
        path: np.zeros(about["shape"], about["dtype"])
        for path, about in leaves.items()
        if 0 in about["shape"]
    }
    there = [path for path in leaves if path not in arrays]
    if not there:  # as in the folder of a learner process other than the first
        return arrays
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.WARNING)
    handle = os.open(folder, os.O_RDONLY)
    try:
        import orbax.checkpoint as ocp

        options = _alone()
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True, use_zarr3=True, multiprocessing_options=options
        )
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            as_numpy = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in there}
            place = Path(f"/proc/self/fd/{handle}") / FORMER
            return arrays | checkpointer.restore(place, restore_args=as_numpy)
    except Exception as error:
        why = first_line(error).replace(f"/proc/self/fd/{handle}", str(folder))
        raise Damaged(f"{folder / FORMER}: cannot be read ({cut(why)}).") from error
    finally:
        os.close(handle)
        logger.setLevel(level)


def _alone() -> Any:
    """One of several learner processes by itself; orbax would wait for the others to join in."""
    import jax
    from orbax.checkpoint.options import MultiprocessingOptions

    own = jax.process_index()
    return MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )


def _compare(folder: Path, saved: dict[str, JSON], expected: dict[str, JSON]) -> None:
    """Raises where the saved leaves are not those that the run expects."""
    differing = [
        f"{path} is {_described(saved.get(path))}, expected {_described(expected.get(path))}"
        for path in [*expected, *(path for path in saved if path not in expected)]
        if _described(saved.get(path)) != _described(expected.get(path))
    ]
    if differing:
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise CheckpointError(
            f"{folder}: its run had another network, agent or optimiser: "
            f"{'; '.join(differing[:SHOWN])}{more}. Resume with the config saved in that run."
        )


def _described(leaf: JSON | None) -> str:
    return f"{leaf['dtype']}{leaf['shape']}" if leaf else "missing"
