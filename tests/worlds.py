"""Small real environments, registered with gymnasium: `tests.worlds:rlx-test/<name>-v0`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces


class Choices(gymnasium.Env):
    """Two choices at once, the first from 3 on; each is rewarded where it is what was shown."""

    action_space = spaces.MultiDiscrete([4, 2], start=[3, 0])
    observation_space = spaces.Box(0, 1, (6,), np.float32)

    def __init__(self, length: int = 7) -> None:
        self.length = length

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.time += 1
        reward = float((np.asarray(action) == self.shown).mean())
        return self._show(), reward, self.time == self.length, False, {}

    def _show(self) -> np.ndarray:
        choices = self.np_random.integers(0, [4, 2])
        self.shown = np.add(choices, [3, 0])
        return np.concatenate([np.eye(4)[choices[0]], np.eye(2)[choices[1]]]).astype(np.float32)


class Masked(gymnasium.Env):
    """Some of five actions are forbidden, others each time; a forbidden one is an error.

    The rewarded one is the first that is allowed; `sight` tells which that is.
    """

    action_space = spaces.Discrete(5, start=2)
    observation_space = spaces.Dict(
        {
            "sight": spaces.Box(0, 1, (5,), np.float32),
            "action_mask": spaces.MultiBinary(5),
        }
    )

    def __init__(self, length: int = 9) -> None:
        self.length = length

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        if not self.mask[action - 2]:
            raise ValueError(f"action {action} is forbidden, the mask is {self.mask}")
        self.time += 1
        reward = float(action - 2 == np.flatnonzero(self.mask)[0])
        ended = self.time == self.length
        return self._show(), reward, ended, False, {}

    def _show(self) -> dict[str, np.ndarray]:
        self.mask = self.np_random.random(5) < 0.5
        self.mask[self.np_random.integers(5)] = True
        sight = np.eye(5, dtype=np.float32)[np.flatnonzero(self.mask)[0]]
        return {"sight": sight, "action_mask": self.mask.astype(np.int8)}


class Ends(gymnasium.Env):
    """Episodes of 3, 4, 5, 3, ... env steps that end in turn by termination and by truncation.

    The first one's number is the seed's rest by 7. It shows (the number, env steps in it); the
    reward is 100 * the number + env steps. With `both` it sets both flags at a termination, as a
    time limit that falls on the game's end does.
    """

    action_space = spaces.Discrete(2)
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, both: bool = False) -> None:
        self.episode, self.both = -1, both

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.episode = self.episode + 1 if seed is None else seed % 7  # lanes differ
        self.time = 0
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.time += 1
        ended = self.time == 3 + self.episode % 3
        terminated = ended and self.episode % 2 == 0
        truncated = ended and (self.both or not terminated)
        return self._show(), float(100 * self.episode + self.time), terminated, truncated, {}

    def _show(self) -> np.ndarray:
        return np.float32([self.episode, self.time])


class Flaky(gymnasium.Env):
    """Shows how many environments of its key have begun in this process, and its env steps.

    The n-th of them raises in its `fails[n - 1]`-th step (0: in its first reset; None: never);
    those after the list never do. Episodes have `length` env steps of reward 1. The openings with
    the numbers of `refuses` raise: the first one is that of the spec.
    """

    action_space = spaces.Discrete(2)
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    begun: ClassVar[Counter[str]] = Counter()
    opened: ClassVar[Counter[str]] = Counter()

    def __init__(
        self,
        key: str,
        fails: Sequence[int | None] = (),
        length: int = 5,
        refuses: Sequence[int] = (),
    ) -> None:
        Flaky.opened[key] += 1
        if Flaky.opened[key] in refuses:
            raise OSError("the port is still in use")
        self.key, self.fails, self.length = key, fails, length
        self.number, self.total, self.seed = 0, 0, None

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        if not self.number:
            Flaky.begun[self.key] += 1
            self.number = Flaky.begun[self.key]
            self._fail_at(0)
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.time += 1
        self.total += 1
        self._fail_at(self.total)
        return self._show(), 1.0, self.time == self.length, False, {}

    def _fail_at(self, step: int) -> None:
        if self.number <= len(self.fails) and self.fails[self.number - 1] == step:
            raise RuntimeError(f"simulator {self.number} has crashed")

    def _show(self) -> np.ndarray:
        return np.array([self.number, self.time], np.float32)


class Sized(gymnasium.Env):
    """Episodes of `length` env steps of reward `reward`; it shows both, in `size` numbers."""

    action_space = spaces.Discrete(2)

    def __init__(self, length: int = 4, reward: float = 1.0, size: int = 2) -> None:
        self.length, self.reward, self.size = length, reward, size
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.time += 1
        return self._show(), self.reward, self.time == self.length, False, {}

    def _show(self) -> np.ndarray:
        return np.resize(np.array([self.length, self.reward], np.float32), self.size)


for _entry in (Choices, Ends, Flaky, Masked, Sized):
    gymnasium.register(f"rlx-test/{_entry.__name__}-v0", _entry)
for _name, _kwargs in {
    "Short": {"length": 3, "reward": 1.0},
    "Middle": {"length": 4, "reward": 2.0},
    "Long": {"length": 7, "reward": 5.0},
    "Wide": {"size": 3},
}.items():
    gymnasium.register(f"rlx-test/{_name}-v0", Sized, kwargs=_kwargs)
