"""Acme 0.4.0's R2D2 on masked CartPole: its builder, learner and replay, in its local layout.

`recurrent.py` runs it in Acme's own environment, with the sizes as one JSON argument.
It writes a line of progress.jsonl about every so many env steps: env steps and updates.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import jax

# A shim: Acme's modules name types that newer releases of JAX call otherwise.
jax.xla.Device, jax.xla.DeviceArray = jax.Device, jax.Array
jax.pxla.ShardedDeviceArray = jax.Array

import acme  # noqa: E402
import haiku as hk  # noqa: E402
import masked_cartpole  # noqa: E402
from acme import specs, wrappers  # noqa: E402
from acme.agents.jax import r2d2  # noqa: E402
from acme.jax import networks as networks_lib  # noqa: E402
from acme.jax.layouts.local_layout import LocalLayout  # noqa: E402
from acme.utils import counting, loggers  # noqa: E402


class Network(hk.RNNCore):
    """A dense layer, an LSTM and dueling heads, each of 64 units."""

    def __init__(self, actions):
        super().__init__(name="network")
        self.torso = hk.nets.MLP([64], activate_final=True)
        self.core = hk.LSTM(64)
        self.head = networks_lib.DuellingMLP(actions, hidden_sizes=[64])

    def __call__(self, inputs, state):
        out, state = self.core(self.torso(inputs), state)
        return self.head(out), state

    def initial_state(self, batch_size):
        return self.core.initial_state(batch_size)

    def unroll(self, inputs, state):
        out, state = hk.static_unroll(self.core, self.torso(inputs), state)  # as Acme's networks
        return hk.BatchApply(self.head)(out), state


def networks(spec, batch):
    actions = spec.actions.num_values
    return r2d2.make_networks(
        forward_fn=lambda inputs, state: Network(actions)(inputs, state),
        initial_state_fn=lambda batch_size=None: Network(actions).initial_state(batch_size),
        unroll_fn=lambda inputs, state: Network(actions).unroll(inputs, state),
        env_spec=spec,
        batch_size=batch,
    )


def layout(given, spec, counter):
    """Returns Acme's agent, which makes an update each time that so many env steps are made."""
    config = r2d2.R2D2Config(
        batch_size=given["batch"],
        burn_in_length=given["burn_in"],
        trace_length=given["unroll"],
        sequence_period=given["stride"],
        bootstrap_n=given["n_step"],
        target_update_period=given["target_updates"],
        min_replay_size=2 * given["batch"],  # sequences; the layout waits for the warm-up, too
        max_replay_size=given["capacity"] // given["stride"],
        samples_per_insert=0.0,  # the layout keeps the ratio
        variable_update_period=1,
        learning_rate=1e-4,
        num_epsilons=8,
    )
    nets = networks(spec, config.batch_size)
    env_steps_per_update = given["batch"] * given["unroll"] // given["ratio"]
    return LocalLayout(
        seed=0,
        environment_spec=spec,
        builder=r2d2.R2D2Builder(nets, config, logger_fn=loggers.NoOpLogger),
        networks=nets,
        policy_network=r2d2.make_behavior_policy(nets, config),
        workdir=None,
        checkpoint=False,
        min_replay_size=given["warm_up"],
        samples_per_insert=config.batch_size / env_steps_per_update,
        batch_size=config.batch_size,
        counter=counter,
    )


def main(given):
    environment = wrappers.GymWrapper(masked_cartpole.make())
    environment = wrappers.SinglePrecisionWrapper(environment)
    acted, learnt = counting.Counter(), counting.Counter()
    agent = layout(given, specs.make_environment_spec(environment), learnt)
    loop = acme.EnvironmentLoop(environment, agent, counter=acted, logger=loggers.NoOpLogger())
    began, env_steps = time.monotonic(), 0
    with Path("progress.jsonl").open("w") as log:
        while env_steps < given["steps"]:
            loop.run(num_steps=given["log_every"])
            env_steps = acted.get_counts()["steps"]
            row = {"env_steps": env_steps, "updates": learnt.get_counts().get("steps", 0)}
            log.write(json.dumps({**row, "seconds": time.monotonic() - began}) + "\n")
            log.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
