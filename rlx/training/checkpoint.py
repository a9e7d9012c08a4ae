"""Checkpoints: a folder per checkpoint, in place as a whole or not at all, checked when read.

    <run>/checkpoints/000000050000/     named after its env steps
        state.npz       the training state as host arrays
        leaves.json     path -> dtype, shape and key kind of every leaf of the state
        meta.json       the run's counters, generators and metrics, as given
        replay.json     the replay's tables; their arrays lie in replay/*.npy
        manifest.json   size and sha256 of every file above, and the segments; written last
    <run>/checkpoints/segments/         the replay's blocks, which checkpoints share
    <run>/checkpoints/best-000000040000/    the training state with the best score, no replay
    <run>/checkpoints/discarded/        checkpoints that the run went back behind

All is written to a temporary folder, forced to the disk and renamed. What is in a checkpoint's
folder is the matter of `rlx.training.checkpoint_files`.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np

from rlx.problems import Problem
from rlx.runs.folders import is_number
from rlx.training.agreement import by_clock, takes_turns
from rlx.training.checkpoint_files import (
    BEST,
    DISCARDED,
    JSON,
    SEGMENTS,
    CheckpointError,
    Damaged,
    Restored,
    read_all,
    read_manifest,
    sync,
    verify,
    write_all,
)
from rlx.training.checkpoint_state import STATE, read_leaves
from rlx.types import AloneOnly, Range

T = TypeVar("T")

log = logging.getLogger(__name__)


FOLDER = "checkpoints"

_TEMPORARY = ".tmp-"
NO_OTHER = "No other checkpoint is left."
_ASIDE = ".old-"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """These settings of conf/checkpoint say when a run is saved, and what of it."""

    every_env_steps: Annotated[int, Range(ge=1)]
    keep: Annotated[int, Range(ge=1)]
    replay: bool
    exact: Annotated[bool, AloneOnly()]

    @staticmethod
    def clashes(settings: JSON) -> list[Problem]:
        """The same bits need that nothing happens beside the loop, and that all is saved."""
        checkpoint, prefetch = settings["checkpoint"], settings["replay"].get("prefetch")
        if not checkpoint["exact"]:
            return []
        if not (takes_turns(settings) and checkpoint["replay"]):
            says = "the same bits need acting=local and checkpoint.replay=true; set both"
            return [Problem(path="checkpoint.exact", given="true", says=says)]
        if by_clock(settings):
            says = "a clock is never the same twice; schedule over env_steps or updates"
            return [Problem(path="schedules", given="over: seconds", says=says)]
        if prefetch:
            says = "a thread draws when it can, which is never the same twice; set it to 0"
            return [Problem(path="replay.prefetch", given=str(prefetch), says=says)]
        return []


class Checkpointer:
    """Saves and restores the checkpoints of one run."""

    def __init__(self, folder: Path | str, settings: Checkpoint | None) -> None:
        """folder: the run's. settings: None only reads, and changes nothing in the folder.

        A writer clears away what a killed save has left.
        """
        self.run = Path(folder).absolute()
        self.folder = self.run / FOLDER
        self._settings = settings
        if settings is not None:
            self._clear_leftovers()

    def save(
        self,
        env_steps: int,
        *,
        state: Any,
        meta: Mapping[str, Any],
        replay_state: Mapping[str, Any] | None = None,
        segments: Sequence[Mapping[str, Any]] = (),
    ) -> Path:
        """Writes one checkpoint, deletes those that are no longer kept, returns its folder.

        state: a tree of host or device arrays, PRNG keys among them. replay_state: nested dicts
        of arrays and JSON values (tuples come back as lists). segments: the files that hold the
        replay's blocks, of a Snapshots in `segments_folder`.
        """
        name = _name(env_steps)
        with self._written(name) as temporary:
            write_all(temporary, env_steps, state, meta, replay_state, segments, None)
            self._discard_later(name)
        self._keep_last()
        return self.folder / name

    def keep_best(self, state: Any, meta: Mapping[str, Any], score: float) -> None:
        """Writes what was evaluated, unless what is kept has a higher score.

        state: as `save` takes it. meta has its `env_steps`. score: the higher, the better; one
        that is not finite is none.
        """
        before = self.best()
        least = -math.inf if before is None else _score(before)
        if not math.isfinite(score) or (least is not None and score < least):
            return
        name = f"{BEST}{_name(meta['env_steps'])}"
        with self._written(name) as temporary:
            write_all(temporary, meta["env_steps"], state, meta, None, (), score)
        for path in self._bests():
            if path.name != name:
                self._delete(path)
        (self.folder / "best.json").unlink(missing_ok=True)  # of a run that an earlier rlx began

    @contextmanager
    def _written(self, name: str) -> Iterator[Path]:
        """A temporary folder to write into, which is then put in the place of that name."""
        if self._settings is None:
            raise CheckpointError(f"{self.run}: opened for reading; give settings to save.")
        temporary = self.folder / f"{_TEMPORARY}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._put_in_place(temporary, name)

    def restore(
        self, like_state: Any, which: str | Path = "latest", *, with_replay: bool = True
    ) -> Restored:
        """Reads a checkpoint: "latest", "best", or the folder of one.

        like_state: arrays or ShapeDtypeStructs of the expected structure, shapes and dtypes.
        A damaged checkpoint is passed over for the newest whole one, with a warning; one that
        was named by its folder is an error. with_replay=False leaves the replay unread.
        """
        return self._first_whole(
            which,
            with_replay,
            lambda path, manifest: read_all(path, manifest, like_state, with_replay),
        )

    def leaves(self, which: str | Path = "latest") -> tuple[Path, dict[str, np.ndarray]]:
        """(the checkpoint's folder, every leaf of its state by path), as `restore` finds it."""
        return self._first_whole(
            which,
            False,
            lambda path, manifest: (path, read_leaves(path, STATE in manifest["files"])),
        )

    def _first_whole(
        self, which: str | Path, with_replay: bool, read: Callable[[Path, JSON], T]
    ) -> T:
        candidates = self._candidates(which)
        for path in candidates:
            try:
                return read(path, verify(path, with_replay))
            except Damaged as damage:
                if path == candidates[-1]:
                    named = which not in ("latest", "best")
                    more = "It was named, so no other is read." if named else NO_OTHER
                    raise CheckpointError(f"{damage} {more}") from damage
                log.warning("%s Trying another checkpoint.", damage)
        raise AssertionError("unreachable: candidates are never empty")

    @property
    def segments_folder(self) -> Path:
        """Names the folder that holds the blocks of saved replays."""
        return self.folder / SEGMENTS

    def segments_kept(self) -> set[str] | None:
        """The segments that any checkpoint needs, discarded ones too; None if one can't be read."""
        aside = self.folder / DISCARDED
        paths = [*self.paths(), *(aside.iterdir() if aside.is_dir() else ())]
        kept: set[str] = set()
        try:
            for path in paths:
                kept.update(segment["file"] for segment in read_manifest(path)["segments"])
        except Damaged:
            return None
        return kept

    def paths(self) -> list[Path]:
        """The folders of all checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if is_number(p.name) and p.is_dir())

    def best(self) -> Path | None:
        """The checkpoint with the best score; None: no checkpoint has a score."""
        there = [*self.paths(), *self._bests()]  # runs of earlier versions scored any of them
        scored = [(score, path) for path in there if (score := _score(path)) is not None]
        return max(scored)[1] if scored else None

    def _bests(self) -> list[Path]:
        return sorted(self.folder.glob(f"{BEST}[0-9]*"))

    def _candidates(self, which: str | Path) -> list[Path]:
        if which not in ("latest", "best"):
            path = Path(which).absolute()
            if not (path / "manifest.json").is_file():
                raise CheckpointError(
                    f"{path}: no checkpoint: it has no manifest.json; give 'latest', 'best' or a "
                    f"folder such as <run>/{FOLDER}/{_name(50_000)}."
                )
            return [path]
        best = self._best_or_why_not() if which == "best" else None
        first = [] if best is None else [best]
        found = [*first, *(path for path in self.paths()[::-1] if path not in first)]
        if not found:
            raise CheckpointError(
                f"{self.run}: no checkpoint of a run is there ({FOLDER}/ has none to go on from); "
                "give the folder of a run that has saved one."
            )
        return found

    def _best_or_why_not(self) -> Path | None:
        """The checkpoint with the best score; None, and a warning, if there is none."""
        for path in self._bests():
            try:
                read_manifest(path)
            except Damaged as damage:
                log.warning("%s", damage)
        best = self.best()
        if best is None:
            log.warning("%s: no checkpoint has a score; taking the latest.", self.run)
        return best

    def _clear_leftovers(self) -> None:
        if not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            if path.name.startswith(_ASIDE):
                # A kill came between the two renames of `_put_in_place`.
                place = self.folder / path.name.removeprefix(_ASIDE)
                if not place.exists():
                    path.rename(place)
                    continue
            if path.is_file() and path.name.startswith("."):  # of write_json
                path.unlink()
            elif path.name.startswith((_TEMPORARY, _ASIDE)):
                shutil.rmtree(path, ignore_errors=True)

    def _put_in_place(self, temporary: Path, name: str) -> None:
        place, aside = self.folder / name, self.folder / f"{_ASIDE}{name}"
        if place.exists():  # the run came to this env step before
            place.rename(aside)
        temporary.rename(place)
        sync(self.folder)
        shutil.rmtree(aside, ignore_errors=True)

    def _discard_later(self, name: str) -> None:
        """Sets aside what a run that went back to an earlier checkpoint had saved after it.

        They are another history: as the "latest" they would win over this one.
        """
        for path in [*self.paths(), *self._bests()]:
            if path.name.removeprefix(BEST) > name:
                place = self.folder / DISCARDED / path.name
                place.parent.mkdir(exist_ok=True)
                shutil.rmtree(place, ignore_errors=True)
                path.rename(place)
                log.warning("%s: later than env step %d; moved to %s.", path, int(name), place)

    def _keep_last(self) -> None:
        assert self._settings is not None
        best = self.best()
        for path in self.paths()[: -self._settings.keep]:
            if path != best:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        """Renames it first: a kill leaves no half checkpoint under a checkpoint's name."""
        shutil.rmtree(path.rename(self.folder / f"{_TEMPORARY}{path.name}"))


def _name(env_steps: int) -> str:
    if env_steps < 0:
        raise CheckpointError(f"env_steps={env_steps}: must be 0 or more.")
    return f"{env_steps:012d}"


def _score(path: Path) -> float | None:
    try:
        return read_manifest(path)["score"]
    except Damaged:
        return None
