"""Environments that go wrong, each in one way: `tests.envs.odd:rlx-odd/<name>-v0`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Text

OBSERVATIONS = Box(-1, 1, (3,), np.float32)


class Odd(gymnasium.Env):
    """Ends after ten env steps of reward 1; `wrong` names what it does at the env step `at`.

    Env steps are counted over all episodes; 0 is the reset.
    """

    metadata = {"render_modes": []}  # noqa: RUF012
    action_space = Discrete(2)

    def __init__(self, wrong: str = "", at: int = 15, space: Any = OBSERVATIONS) -> None:
        self.wrong, self.at, self.observation_space = wrong, at, space
        self.steps_ever = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return WRONG_RESETS.get(self.wrong, _reset)(self) if self.at == 0 else _reset(self)

    def step(self, action: Any) -> Any:
        self.time += 1
        self.steps_ever += 1
        ended = self.time == 10
        answer = [self.observe(), 1.0, ended, False, {}]
        if self.steps_ever == self.at and self.wrong in WRONG_STEPS:
            return WRONG_STEPS[self.wrong](answer)
        return tuple(answer)

    def observe(self) -> Any:
        return self.observation_space.sample()


def _reset(env: Odd) -> Any:
    return env.observe(), {}


def _with(index: int, value: Any) -> Any:
    return lambda answer: (*answer[:index], value, *answer[index + 1 :])


def _raises(error: BaseException) -> Any:
    def wrong(given: Any) -> Any:
        raise error

    return wrong


WRONG_STEPS = {
    "nan reward": _with(1, float("nan")),
    "huge reward": _with(1, 1e39),
    "no reward": _with(1, None),
    "text reward": _with(1, "1.0"),
    "two rewards": _with(1, np.ones(2)),
    "a number in an array": _with(1, np.ones(1)),
    "nan observation": _with(0, np.array([0, np.nan, 0], np.float32)),
    "short observation": _with(0, np.zeros(2, np.float32)),
    "text observation": _with(0, "here"),
    "no observation": _with(0, None),
    "no flag": _with(2, None),
    "four values": lambda answer: (*answer[:3], {}),
    "raises": _raises(RuntimeError("simulator lost")),
    "exits": _raises(SystemExit(3)),
    "interrupts": _raises(KeyboardInterrupt()),
}
WRONG_RESETS = {
    "raises": _raises(RuntimeError("no display")),
    "no info": lambda env: env.observe(),
    "nan observation": lambda env: (np.full(3, np.nan, np.float32), {}),
}


class NanUntilStepped(Odd):
    """Shows NaN at its 15th env step, at the reset after it, and until it is stepped again."""

    def observe(self) -> Any:
        return np.full(3, np.nan, np.float32) if self.steps_ever == 20 else super().observe()


class OldReset(Odd):
    """Takes no seed."""

    def reset(self) -> Any:  # type: ignore[override]
        return self.observe()


class Infos(Odd):
    """Tells infos of any kind and length."""

    def step(self, action: Any) -> Any:
        told = {"path": np.zeros(1 + self.steps_ever % 3), "other": object()}
        return (*super().step(action)[:4], told)


class Endless(Odd):
    """Has no end."""

    def step(self, action: Any) -> Any:
        observation, reward, *_ = super().step(action)
        return observation, reward, False, False, {}


SPACES: dict[str, Any] = {
    "text beside": Dict({"image": Box(0, 255, (7, 7, 3), np.uint8), "mission": Text(9)}),
    "tuple beside": Dict(
        {"sight": Box(-1, 1, (2,)), "odd": gymnasium.spaces.Tuple([Discrete(2), Text(3)])}
    ),
    "same names": Dict({"a/b": Discrete(3), "a": Dict({"b": Box(-1, 1, (2,))}), "c": Discrete(2)}),
    "nothing": Box(-1, 1, (0,)),
    "nothing beside": Dict({"none": Box(-1, 1, (0, 3)), "some": Box(-1, 1, (2,))}),
    "wide": Box(0, 2**40, (2,), np.int64),
    "within 32 bits": Box(0, 2**31, (2,), np.int64),
    "unbounded": Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64),
    "unsigned": Box(0, 2**32 - 1, (2,), np.uint64),
    "long floats": Box(-1, 1, (2,), np.float64),
    "choice": Discrete(500, start=3),
    "choices": MultiDiscrete([3, 4], start=[1, 0]),
}


for _class in (Odd, NanUntilStepped, OldReset, Infos, Endless):
    gymnasium.register(f"rlx-odd/{_class.__name__}-v0", _class)


class Emulated(Odd):
    """Skips frames as ALE's environments do, which tell it so."""

    def __init__(self, frameskip: Any = 4) -> None:
        super().__init__()
        self.ale, self._frameskip = object(), frameskip


class Skipping(gymnasium.Wrapper):
    """Repeats each action, as AtariPreprocessing does, which tells it so."""

    def __init__(self, env: Any, frame_skip: int) -> None:
        super().__init__(env)
        self.frame_skip = frame_skip


gymnasium.register("rlx-odd/Emulated-v0", Emulated)
gymnasium.register("rlx-odd/Repeating-v0", lambda: Skipping(Odd(), frame_skip=3))
gymnasium.register("rlx-odd/Skipping-v0", lambda: Skipping(Emulated(frameskip=2), frame_skip=3))
