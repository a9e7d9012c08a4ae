"""CartPole without its velocities, as gym 0.22 speaks it: for the peers that need that gym."""

from __future__ import annotations

import gym
import numpy as np

KEPT = np.array([0, 2])  # cart position and pole angle
SCALE = np.array([1.0, 10.0], np.float32)  # the angle is ten times smaller than the position


class Positions(gym.ObservationWrapper):
    """CartPole without its velocities."""

    def __init__(self, env):
        super().__init__(env)
        limit = np.full(2, np.inf, np.float32)
        self.observation_space = gym.spaces.Box(-limit, limit, dtype=np.float32)

    def observation(self, observation):
        return observation[KEPT].astype(np.float32) * SCALE


def make():
    """Returns the environment."""
    return Positions(gym.make("CartPole-v1"))
