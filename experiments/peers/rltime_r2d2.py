"""rltime 0.1.2 as R2D2: its own trainer, replay and models on masked CartPole and on Pong.

`recurrent.py` runs it in rltime's own environment, with the sizes as one JSON argument. Of its own
it has the two tasks as gym 0.22 speaks them, and a trainer that lets PyTorch have more threads.
"""

from __future__ import annotations

import json
import sys

import gym
import masked_cartpole
import numpy as np
import torch
from rltime.env_wrappers.common import ExtraFeaturesEnvWrapper
from rltime.general.config import load_config
from rltime.train import train_from_config
from rltime.training.torch.dqn import DQN


class Pong(gym.Env):
    """Single frames of Pong by ale-py, which brings the game; rltime's wrappers skip and shrink."""

    metadata = {"render.modes": []}  # noqa: RUF012

    def __init__(self):
        from ale_py import ALEInterface, LoggerMode, roms

        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.ale = ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.rom = roms.get_rom_path("pong")
        self.observation_space = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(18)  # all, as rlx has it
        self.seed(0)

    def seed(self, seed=None):
        self.ale.setInt("random_seed", int(seed or 0))
        self.ale.loadROM(self.rom)
        self.actions = self.ale.getLegalActionSet()
        self._np_random = np.random.RandomState(seed)  # NoopResetEnv asks for its randint
        return [seed]

    def get_action_meanings(self):
        """Returns names of which rltime's wrappers look for two: NOOP, and FIRE, which is off."""
        return ["NOOP"]

    def reset(self):
        self.ale.reset_game()
        return self.ale.getScreenRGB()

    def step(self, action):
        reward = self.ale.act(self.actions[int(action)])
        return self.ale.getScreenRGB(), float(reward), self.ale.game_over(), {}


def trainer(threads: int):
    """Returns rltime's DQN trainer, with so many threads of PyTorch instead of its one."""

    class Threads(DQN):
        def train_init(self, lr):
            super().train_init(lr)
            torch.set_num_threads(threads)

    return Threads


def features(env):
    """Gives the network the last action and the last reward, as rlx has them."""
    return ExtraFeaturesEnvWrapper(env, include_timestep=False, clip_reward=False)


WORKS = {
    "cartpole": {
        "env": masked_cartpole.make,
        "env_args": {"wrappers": [{"type": features}]},
        "model": {
            "type": "sequential",
            "args": {
                "layer_configs": [
                    {"type": "fc", "args": {"fc_size": 64}},
                    {"type": "lstm", "args": {"num_units": 64}},
                    {"type": "fc", "args": {"fc_size": 64}},
                ]
            },
        },
    },
    "pong": {
        "env": Pong,
        "env_args": {
            "max_episode_steps": 108_000,  # frames
            "wrappers": [load_config("env_wrappers/atari_lstm.json")[0], {"type": features}],
        },
        "model": load_config("models/nature_cnn_fc512_lstm512_fc512.json"),
    },
}


def config(given):
    """Returns rltime's configuration of this work and these sizes."""
    exploration = load_config("exploration/per_actor_0.4_factor7.json")
    exploration["args"]["per_actor_exponent_factor"] = 3  # as rlx's ladder has it
    replay = {"size": given["capacity"], "train_frequency": given["ratio"]}
    replay |= {"alpha": 0.9, "beta": 0.6, "overlap": given["unroll"] - given["stride"]}
    return {
        **WORKS[given["work"]],
        "acting": {
            "actor_envs": given["lanes"],
            "exploration": exploration,
            "extra_args": {"use_proc": given["processes"]},
        },
        "policy_args": {"dueling": True, "cuda": False},
        "training": {
            "type": trainer(given["threads"]),
            "args": {
                "total_steps": given["steps"],
                "log_freq": given["log_every"],
                "warmup_steps": given["warm_up"],
                "mbatch_size": given["batch"],
                "burn_in_timesteps": given["burn_in"],
                "nstep_train": given["unroll"],
                "nstep_target": given["n_step"],
                "target_update_freq": given["target_env_steps"],
                "history_mode": {"type": "prioritized_replay", "args": replay},
                "gamma": 0.997,
                "rnn_bootstrap": True,
                "double_q": True,
                "loss_mode": "mse",
                "vf_scale_epsilon": 1e-3,
                "lr": 1e-4,
                "adam_epsilon": 1e-3,
                "clip_grad": 80.0,
            },
        },
    }


if __name__ == "__main__":
    train_from_config(".", "", config(json.loads(sys.argv[1])))
