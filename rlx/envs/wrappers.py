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
        self._rows = covered(space.shape[0], height)
        self._columns = covered(space.shape[1], width)

    def observation(self, observation: Any) -> np.ndarray:
        """The image, resized."""
        image = np.asarray(observation, np.float32)
        narrow = np.tensordot(self._rows, image, 1)  # [height, W, ...]
        resized = np.einsum("hw...,vw->hv...", narrow, self._columns, optimize=True)
        return np.rint(resized).astype(np.uint8)


def covered(old: int, new: int) -> np.ndarray:
    """f32[new, old]: the part of each new pixel that each old one makes up; rows sum to 1."""
    edges = np.arange(new + 1) * (old / new)  # of the new pixels, in old ones
    left = np.maximum(edges[:-1, None], np.arange(old)[None])
    right = np.minimum(edges[1:, None], np.arange(1, old + 1)[None])
    return (np.maximum(right - left, 0) * (new / old)).astype(np.float32)
