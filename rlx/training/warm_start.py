"""Begins a run with the weights of another one (`init_from`, docs/warm_start.md)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlx import trees
from rlx.problems import refuse
from rlx.runs.folders import find_run
from rlx.training.checkpoint import Checkpointer
from rlx.training.checkpoint_files import CheckpointError
from rlx.trees import check_patterns, matches_any
from rlx.types import TrainState

log = logging.getLogger(__name__)

KEY = "init_from"
PARAMS = "params/"  # of the paths of a training state
SHOWN = 5  # parameters that do not fit and are named


def warm(state: TrainState, folder: str, patterns: Sequence[str]) -> TrainState:
    """The fresh state with the parameters of another run whose names fit the patterns.

    folder: a run's, for its newest checkpoint, or that of a checkpoint. Target parameters follow
    those that they are of, and running statistics count as parameters named `statistics/`. Raises
    ConfigError where a chosen parameter is missing there or has another shape.
    """
    if not patterns:
        raise refuse("init_params", "they choose no parameter; give ['*'] for all", given="[]")
    own = trees.flatten({"params": state.params, "statistics": state.statistics})
    names = {path.removeprefix(PARAMS): path for path in own}
    try:
        check_patterns(patterns, names, "init_params")
    except ValueError as error:
        raise refuse("init_params", str(error).partition(": ")[2]) from error
    chosen = {name: path for name, path in names.items() if matches_any(name, patterns)}
    checkpoint, there = _read(folder)
    _check(own, there, chosen, folder)
    taken = {path: there[path].astype(own[path].dtype) for path in chosen.values()}
    found = trees.unflatten(
        {"params": state.params, "statistics": state.statistics}, {**own, **taken}
    )
    targets = trees.flatten(state.target_params)
    followed = {name: taken.get(_followed(name, own), leaf) for name, leaf in targets.items()}
    count = sum(leaf.size for leaf in taken.values())
    says = "begins with %d of %d parameter arrays (%s numbers) of %s"
    log.info(says, len(taken), len(own), f"{count:,}", checkpoint)
    return dataclasses.replace(
        state,
        params=found["params"],
        statistics=found["statistics"],
        target_params=trees.unflatten(state.target_params, followed),
    )


def _followed(name: str, own: Mapping[str, np.ndarray]) -> str:
    """The path of the parameter that a target parameter follows; SAC's are those of its critics."""
    whole = PARAMS + name
    return whole if whole in own else f"{PARAMS}network/{name}"


def _read(folder: str) -> tuple[Path, dict[str, np.ndarray]]:
    """(the checkpoint, its leaves by path) of a run, or of a checkpoint's own folder."""
    path = Path(folder)
    try:
        if (path / "manifest.json").is_file():
            return Checkpointer(path.parent.parent, None).leaves(path)
        return Checkpointer(find_run(path, KEY), None).leaves()
    except CheckpointError as error:
        raise refuse(KEY, str(error), given=folder) from error


def _check(
    own: Mapping[str, np.ndarray],
    there: Mapping[str, np.ndarray],
    chosen: Mapping[str, str],
    folder: str,
) -> None:
    """Raises ConfigError that names the chosen parameters which do not fit."""
    wrong = [
        f"{name} is {_shape(there.get(path))} there and {_shape(own[path])} here"
        for name, path in chosen.items()
        if path not in there or there[path].shape != own[path].shape
    ]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        name = wrong[0].partition(" ")[0]
        part = f"{name.rpartition('/')[0]}/*" if "/" in name else name
        says = f"{'; '.join(wrong[:SHOWN])}{more}; leave them out, "
        says += f"as by init_params=['*','!{part}']"
        raise refuse(KEY, says, given=folder)


def _shape(leaf: np.ndarray | None) -> str:
    return "missing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
