"""RLlib's recurrent DQN on masked CartPole: Ray's new API stack, PyTorch, all in one process.

`recurrent.py` runs it in RLlib's own environment, with the sizes as one JSON argument.
It writes a line of progress.jsonl after each of RLlib's iterations: env steps, what was drawn from
the replay, and trained rows as updates of the size that was asked for.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import ray
import torch
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from ray.tune.registry import register_env

KEPT = np.array([0, 2])  # cart position and pole angle
SCALE = np.array([1.0, 10.0], np.float32)  # the angle is ten times smaller than the position


class CountedEpisodeReplayBuffer(EpisodeReplayBuffer):
    """RLlib's buffer of whole episodes, and how much was drawn from it.

    RLlib cuts sequences at the end of an episode, so rows of an update are counted, not known.
    """

    def __init__(self, *arguments, burn_in=0, **settings):
        super().__init__(*arguments, **settings)
        self.burn_in = burn_in
        self.drawn = {"batches": 0, "sequences": 0, "trained_rows": 0}

    def sample(self, *arguments, **settings):
        found = super().sample(*arguments, **settings)
        self.drawn["batches"] += 1
        self.drawn["sequences"] += len(found)
        self.drawn["trained_rows"] += sum(max(0, len(part) - self.burn_in) for part in found)
        return found


def cartpole(_):
    env = gymnasium.make("CartPole-v1")
    space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    return gymnasium.wrappers.TransformObservation(
        env, lambda row: row[KEPT].astype(np.float32) * SCALE, space
    )


def config(given):
    """Returns RLlib's configuration: env steps of one environment, then one update, in turn."""
    window = given["burn_in"] + given["unroll"]
    model = DefaultModelConfig(
        fcnet_hiddens=[64],
        fcnet_activation="relu",
        use_lstm=True,
        lstm_cell_size=64,
        max_seq_len=window,
        head_fcnet_hiddens=[64],
    )
    return (
        DQNConfig()
        .environment("masked_cartpole")
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=1,  # 2.60.0 cannot explore with more of them and an LSTM
            rollout_fragment_length=given["batch"] * given["unroll"] // given["ratio"],
        )
        .learners(num_learners=0)
        .rl_module(model_config=model)
        .reporting(min_sample_timesteps_per_iteration=given["log_every"])
        .training(
            train_batch_size_per_learner=given["batch"] * (window + 1),  # it counts one row more
            burn_in_len=given["burn_in"],
            n_step=given["n_step"],
            num_steps_sampled_before_learning_starts=given["warm_up"],
            target_network_update_freq=given["target_env_steps"],
            replay_buffer_config={
                "type": "rllib_dqn.CountedEpisodeReplayBuffer",  # it wants a name, not a class
                "capacity": given["capacity"],
                "burn_in": given["burn_in"],
            },
            gamma=0.997,
            lr=1e-4,
            adam_epsilon=1e-3,
            grad_clip=80.0,
            td_error_loss_fn="huber",
            epsilon=[(0, 1.0), (given["steps"], 0.02)],
        )
    )


def main(given):
    torch.set_num_threads(given["threads"])
    ray.init(num_cpus=2, include_dashboard=False)
    register_env("masked_cartpole", cartpole)
    algorithm, began, env_steps = config(given).build_algo(), time.monotonic(), 0
    print(algorithm.get_module(), flush=True)
    with Path("progress.jsonl").open("w") as log:
        while env_steps < given["steps"]:
            told = algorithm.train()
            env_steps = int(told["env_runners"]["num_env_steps_sampled_lifetime"])
            drawn = algorithm.local_replay_buffer.drawn
            updates = drawn["trained_rows"] / (given["batch"] * given["unroll"])
            row = {"env_steps": env_steps, "updates": updates, "seconds": time.monotonic() - began}
            log.write(json.dumps(row | drawn) + "\n")
            log.flush()
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
