"""Videos of episodes: of the first one, or of several side by side with their Q-values.

`rlx.evaluation.playing.run_episodes` takes a recorder as `watch`; its Starts say which episode a
lane plays.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rlx.evaluation import tiles
from rlx.interfaces import Agent, ValuesActions
from rlx.machine.packages import import_package
from rlx.problems import ConfigError, refuse
from rlx.types import Array, Carry, NetInput, Timestep

log = logging.getLogger(__name__)

VIDEO_FRAMES = 3000  # a longer episode is cut: a GIF is gathered in memory before it is written


class VideoFile:
    """A video file, one picture per env step; a `with` block puts the whole file in place."""

    def __init__(self, folder: Path, name: str, fps: float) -> None:
        imageio = _imageio()
        suffix, options = ".gif", {"duration": 1000 / fps, "loop": 0}
        if _has_ffmpeg():
            suffix, options = ".mp4", {"fps": fps, "macro_block_size": 2}
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}{suffix}"
        self._temporary = self.path.with_name(f".{self.path.name}")
        self._writer = imageio.get_writer(self._temporary, mode="I", **options)
        self._pictures = 0

    def add(self, picture: np.ndarray) -> bool:
        """Adds a picture uint8[H, W, 3]; returns whether the file is full now."""
        self._writer.append_data(picture)
        self._pictures += 1
        return self._pictures >= VIDEO_FRAMES

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, traceback: TracebackType | None
    ) -> None:
        self._writer.close()
        if kind is None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink(missing_ok=True)


class VideoRecorder:
    """Shows the episode that started first; give it to `run_episodes` as `watch`."""

    def __init__(self, file: VideoFile) -> None:
        self._file, self._complete = file, False

    def __call__(self, env: Any, timestep: Timestep, starts: Any) -> None:
        """Adds a picture while lane 0 plays its first episode, whose number is 0."""
        if self._complete or 0 not in timestep.lane:
            return
        full = self._file.add(_picture(env, 0))
        self._complete = bool(starts.number[0] != 0)
        if full and not self._complete:
            _tell_cut(self._file)
            self._complete = True


class GridRecorder:
    """Shows the episodes that started first, side by side, with the values of their actions.

    Give it to `run_episodes` as `watch`, its `acted` as `acted`, and the agent `with_values`.
    An episode that has ended keeps its last picture until all have.
    """

    def __init__(self, file: VideoFile, count: int) -> None:
        """count: number of episodes, at most one per lane: each is its lane's first."""
        self._file = file
        self._seen: list[tiles.Seen | None] = [None] * count
        self._tiles = [np.zeros((tiles.HEIGHT + tiles.PANEL, tiles.WIDTH, 3), np.uint8)] * count
        self._rows: list[tuple[int, int]] = []  # (lane, its row in the answer), to be acted in
        self._complete = False

    def __call__(self, env: Any, timestep: Timestep, starts: Any) -> None:
        """Takes pictures of the episodes under way; `acted` completes them."""
        self._rows = []
        if self._complete:
            return
        changed = False
        for row, lane in enumerate(timestep.lane.tolist()):
            if lane >= len(self._seen) or _ended(self._seen[lane]):
                continue
            ended = bool(starts.number[lane] != lane)
            self._seen[lane] = self._next(env, lane, float(timestep.reward[row]), ended)
            changed = True
            if ended:
                self._draw(lane)
            else:
                self._rows.append((lane, row))
        if all(map(_ended, self._seen)):
            self._add()
            self._complete = True
        elif changed and not self._rows:
            self._add()

    def acted(self, action: np.ndarray, acting: Any) -> None:
        """Shows action [n, *] and acting: f32[n, A] of `with_values`, or another agent's record."""
        is_choice = action.ndim == 1 and action.dtype.kind == "i"
        for lane, row in self._rows:
            seen = self._seen[lane]
            assert seen is not None
            values = acting[row] if isinstance(acting, np.ndarray) else None
            spread = 0.0 if values is None else float(np.abs(values - values.mean()).max())
            self._seen[lane] = dataclasses.replace(
                seen,
                values=values,
                action=int(action[row]) if is_choice else None,
                spread=max(seen.spread, spread),
            )
            self._draw(lane)
        if self._rows:
            self._add()

    def _next(self, env: Any, lane: int, reward: float, ended: bool) -> tiles.Seen:
        before = self._seen[lane]
        return tiles.Seen(
            picture=_picture(env, lane),
            title=f"episode {lane}",
            return_=before.return_ + reward if before else 0.0,
            env_step=before.env_step + 1 if before else 0,
            values=None,
            action=None,
            spread=before.spread if before else 0.0,
            ended=ended,
        )

    def _draw(self, lane: int) -> None:
        seen = self._seen[lane]
        assert seen is not None
        self._tiles[lane] = tiles.tile(seen)

    def _add(self) -> None:
        if self._file.add(tiles.grid(self._tiles)) and not all(map(_ended, self._seen)):
            _tell_cut(self._file)
            self._complete, self._rows = True, []


def _ended(seen: tiles.Seen | None) -> bool:
    return seen is not None and seen.ended


def _tell_cut(file: VideoFile) -> None:
    log.warning("%s: cut after %d frames.", file.path, VIDEO_FRAMES)


def _picture(env: Any, lane: int) -> np.ndarray:
    try:
        picture: np.ndarray = env.render(lane)
    except ValueError as error:
        raise not_recorded(str(error)) from error
    return picture


@dataclass(frozen=True, kw_only=True, eq=False)
class WithValues:
    """An agent whose record of acting time holds every action's value, f32[N, A]."""

    agent: Any

    def initial_carry(self, batch: int) -> Carry:
        return self.agent.initial_carry(batch)

    def act(
        self, params: Any, inputs: NetInput, carry: Carry, key: Array, exploration: Array
    ) -> tuple[Array, Array, Carry]:
        values, _ = self.agent.values(params, inputs, carry)  # XLA computes what is common once
        action, _, carry = self.agent.act(params, inputs, carry, key, exploration)
        return action, values, carry


def with_values(agent: Agent) -> Any:
    """The same, for acting alone; an agent that has no values of actions as it is."""
    return WithValues(agent=agent) if isinstance(agent, ValuesActions) else agent


def _imageio() -> Any:
    try:
        import imageio.v2
    except ImportError as error:
        raise not_recorded("imageio is not installed; pip install rlx[video]") from error
    return imageio.v2


def _has_ffmpeg() -> bool:
    try:
        return bool(import_package("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError):  # the latter: the package without the program
        return False


def not_recorded(why: str) -> ConfigError:
    """The ConfigError, of one line, that says why nothing can be recorded."""
    says = why.strip().split("\n")[0]
    if "render_mode" in says:
        says += "; docs/using.md says what an environment needs to be filmed"
    return refuse("record", says)
