"""Environments and wrappers for `env.wrappers`: `tests.envs.wrapped:rlx-wrapped/<name>-v0`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Tuple


class Lives(gymnasium.Env):
    """A game of 12 steps, four for each of three lives; the n-th step is rewarded with 10 * n.

    It shows (the number of the game, steps in it); the games of a lane are 0, 1, ...
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012
    action_space = Discrete(2)
    observation_space = Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.game, self.time, self.render_mode = -1, 0, render_mode

    @property
    def lives(self) -> int:
        return 3 - self.time // 4

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.game, self.time = self.game + 1, 0
        return self._show(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        return self._show(), 10.0 * self.time, self.time == 12, False, {}

    def _show(self) -> np.ndarray:
        return np.array([self.game, self.time], np.float32)

    def render(self) -> np.ndarray:
        return np.full((6, 9, 3), 10 * self.time, np.uint8)


class Filmed(Lives):
    """Shows pictures of one grey: ten times the steps in the game."""

    observation_space = Box(0, 255, (60, 90, 3), np.uint8)

    def _show(self) -> np.ndarray:
        return np.full((60, 90, 3), 10 * self.time, np.uint8)


class Scene(gymnasium.Env):
    """Parts of every kind, all of which tell the step: tuples in dicts and dicts in tuples."""

    action_space = Discrete(2)
    observation_space = Tuple(
        [
            Box(0, 9, (2,), np.float64),
            Discrete(9),
            Dict({"ears": Tuple([Discrete(9), Box(0, 9, (1,), np.float32)]), "eye": Discrete(9)}),
        ]
    )

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self._show(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        return self._show(), 1.0, self.time == 5, False, {}

    def _show(self) -> Any:
        ears = (self.time + 2, np.full(1, self.time + 3, np.float32))
        return np.full(2, self.time, np.float64), self.time + 1, {"ears": ears, "eye": self.time}


class InADict(Scene):
    """Shows the same as a Dict."""

    observation_space = Dict({"all": Scene.observation_space})

    def _show(self) -> Any:
        return {"all": super()._show()}


class LifeIsAnEpisode(gymnasium.Wrapper):
    """Ends an episode with each life; the game goes on at the reset, after a step of its own."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.is_over = True

    def reset(self, **given: Any) -> Any:
        if self.is_over:
            return self.env.reset(**given)
        observation, _, _, _, info = self.env.step(0)
        return observation, info

    def step(self, action: Any) -> Any:
        before = self.env.unwrapped.lives
        observation, reward, self.is_over, truncated, info = self.env.step(action)
        lost = self.env.unwrapped.lives < before
        return observation, reward, self.is_over or lost, truncated, info


class Plus(gymnasium.ObservationWrapper):
    """Adds a number to the observation."""

    def __init__(self, env: Any, number: int) -> None:
        super().__init__(env)
        self.number = number

    def observation(self, observation: Any) -> Any:
        return observation + np.float32(self.number)


class Times(Plus):
    """Multiplies it instead."""

    def observation(self, observation: Any) -> Any:
        return observation * np.float32(self.number)


class Unlucky(gymnasium.Wrapper):
    """Fails where it is told to."""

    def __init__(self, env: Any, at: str) -> None:
        if at == "init":
            raise RuntimeError("no luck\nat all")
        super().__init__(env)
        self.at = at

    def reset(self, **given: Any) -> Any:
        if self.at == "reset":
            raise RuntimeError("no luck")
        return super().reset(**given)

    def step(self, action: Any) -> Any:
        if self.at == "step":
            raise RuntimeError("no luck")
        return super().step(action)


class MyRewards(gymnasium.wrappers.NormalizeReward):
    """Is one of gymnasium's that are refused."""


class NoWrapper:
    """Is none."""


for _class in (Lives, Filmed, Scene, InADict):
    gymnasium.register(f"rlx-wrapped/{_class.__name__}-v0", _class)
