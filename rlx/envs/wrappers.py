"""Wrappers for `env.wrappers`, where gymnasium has none."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class DelayedEnding(gymnasium.Wrapper):
    """Delays each episode's end, and its last reward, by some env steps (rltime has it, too).

    In these env steps the last observation is repeated, rewards are 0 and actions do nothing; the
    last of them answers what the environment had answered. So a memory has to hold until then
    what the reward is for.
    """

    def __init__(self, env: Any, delay_env_steps: int) -> None:
        if type(delay_env_steps) is not int or delay_env_steps < 0:
            raise ValueError(f"delay_env_steps={delay_env_steps!r}; accepted: an int >= 0")
        super().__init__(env)
        self._delay, self._left = delay_env_steps, 0
        self._last: Any = None

    def reset(self, **given: Any) -> Any:
        """Resets; a delay that is under way ends."""
        self._left = 0
        return self.env.reset(**given)

    def step(self, action: Any) -> Any:
        """Steps the environment, or waits."""
        if self._left:
            self._left -= 1
            return self._last if not self._left else self._waiting(self._last)
        answer = self.env.step(action)
        _, _, terminated, truncated, _ = answer
        if self._delay and (terminated or truncated):
            self._left, self._last = self._delay, answer
            return self._waiting(answer)
        return answer

    @staticmethod
    def _waiting(answer: Any) -> Any:
        observation, _, _, _, info = answer
        return observation, 0.0, False, False, info


class ResizeImage(gymnasium.ObservationWrapper):
    """Resizes images uint8[H, W] or [H, W, C] by averages over areas; it needs no OpenCV.

    Each new pixel is the mean of the old ones that it covers, each weighted by the part of it that
    is covered, rounded to the nearest integer. This is what `gymnasium.wrappers.ResizeObservation`
    does when it makes an image smaller, but for the last bit.
    """

    def __init__(self, env: Any, height: int, width: int) -> None:
        for name, size in {"height": height, "width": width}.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}={size!r}; accepted: an int >= 1")
        space = env.observation_space
        is_image = isinstance(space, gymnasium.spaces.Box) and space.dtype == np.uint8
        if not is_image or len(space.shape) not in (2, 3):
            raise ValueError(f"the observation is {space}; accepted: uint8[H, W] or uint8[H, W, C]")
        super().__init__(env)
        shape = (height, width, *space.shape[2:])
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self._rows, self._columns = Areas(space.shape[0], height), Areas(space.shape[1], width)

    def observation(self, observation: Any) -> np.ndarray:
        """The image, resized."""
        narrow = self._rows.means(np.asarray(observation, np.float64))
        resized = self._columns.means(narrow.swapaxes(0, 1)).swapaxes(0, 1)
        return np.rint(resized).astype(np.uint8)


class Areas:
    """Makes `new` means of `old` numbers along the first axis, of equal areas.

    Sums up to each edge are subtracted; matrices would be multiplied by threads of a library,
    which wait for each other where many lanes share few cores.
    """

    def __init__(self, old: int, new: int) -> None:
        edges = np.arange(new + 1) * old / new  # of the new areas, in old ones
        self._whole = np.minimum(edges.astype(np.int64), old - 1)
        self._part = edges - self._whole
        self._scale = new / old

    def means(self, array: np.ndarray) -> np.ndarray:
        """f64[new, ...] of f64[old, ...]."""
        before = np.zeros_like(array)
        np.cumsum(array[:-1], axis=0, out=before[1:])
        part = self._part.reshape(-1, *(1 for _ in array.shape[1:]))
        up_to = before[self._whole] + part * array[self._whole]
        means: np.ndarray = np.diff(up_to, axis=0) * self._scale
        return means
