"""Every YAML of every group and every experiment: composes, is checked, builds, and is read."""

from __future__ import annotations

import functools
import itertools
import re
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

import rlx
from rlx.bench import measuring as bench_measuring
from rlx.config import build as config
from rlx.config.build import ROLES, check, plain, runtime_names, setting_hints
from rlx.config.targets import resolve
from rlx.interfaces import Prioritizing
from rlx.problems import ConfigError
from rlx.training.assemble import build_agent
from rlx.training.rates import idle_ends

CONF = Path(__file__).parents[2] / "conf"
SOURCE = Path(__file__).parents[2] / "rlx"
OPTIONS = [
    f"{group}={path.stem}" for group in ROLES for path in sorted((CONF / group).glob("*.yaml"))
]
EXPERIMENTS = [
    str(path.relative_to(CONF / "experiment").with_suffix(""))
    for path in sorted((CONF / "experiment").rglob("*.yaml"))
]
# What some options need beside them.
COMPANIONS = {
    "env=atari": ["network=nature_lstm"],
    "env=images": ["env.id=tests.envs.wrapped:rlx-wrapped/Filmed-v0", "network=nature_lstm_small"],
    "env=minigrid_memory": ["network=grid_lstm"],
    "network=nature": ["env=atari"],
    "network=nature_lstm": ["env=atari"],
    "network=nature_lstm_small": ["env=atari"],
    "network=impala_lstm": ["env=atari"],
    "network=grid_lstm": ["env=minigrid_memory"],
}
REFUSED = {"env=mujoco": "discrete"}  # continuous actions: by name


@functools.cache
def built(*overrides: str) -> Any:
    settings = plain(rlx.compose(overrides))
    config.check(settings)
    return settings, *build_agent(settings)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_builds_and_one_update_traces(option):
    overrides = [option, *COMPANIONS.get(option, [])]
    if option in REFUSED:
        with pytest.raises(rlx.problems.ConfigError, match=REFUSED[option]):
            built(*overrides)
        return
    settings, _, agent = built(*overrides)
    trace_update(agent, settings["learner"]["batch_size"])


# Every network with an agent of each kind (of action values, of a policy, of both), and every agent
# with a network of each kind (without memory, with, of images): agents and networks know no more
# of each other. All other pairs are slow tests.
NETWORKS = [o for o in OPTIONS if o.startswith("network=")]
AGENTS = [o for o in OPTIONS if o.startswith("agent=")]
OF_EACH_KIND = {
    *("agent=r2d2_small", "agent=ppo", "agent=sac"),
    *("network=mlp", "network=mlp_lstm", "network=nature_lstm"),
}


@pytest.mark.parametrize(
    ("agent", "network"),
    [
        pytest.param(*pair, marks=[] if OF_EACH_KIND.intersection(pair) else pytest.mark.slow)
        for pair in itertools.product(AGENTS, NETWORKS)
    ],
)
def test_any_network_goes_with_any_agent(agent, network):
    settings, _, made = built(agent, network, *COMPANIONS.get(network, []))
    trace_update(made, settings["learner"]["batch_size"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds_and_one_update_traces(name):
    settings, _, agent = built(f"experiment={name}")
    trace_update(agent, settings["learner"]["batch_size"])
    config.build(settings["exploration"], "exploration", seed=0)
    assert list(idle_ends(agent, settings, 1)) == []


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("cartpole_ppo", ["optimizer"]),
        ("cartpole_impala", ["optimizer"]),
        ("cartpole_dqn", ["optimizer"]),
        ("mountaincar_continuous_sac", ["actor_optimizer", "critic_optimizer"]),
        ("pendulum_sac", []),
    ],
)
def test_a_rate_that_is_0_long_before_the_end_is_told(name, names):
    settings, _, agent = built(f"experiment={name}")
    total = settings["total_env_steps"]
    longer = {**settings, "total_env_steps": 2 * total}
    lines = list(idle_ends(agent, longer, 1))
    assert [line.split(".")[1] for line in lines] == names
    for line in lines:
        after = int(re.search("after about ([0-9,]+) of", line)[1].replace(",", ""))
        assert 0.9 * total < after < 1.1 * total
    slotted = types.new_class("Slotted", (), {}, lambda own: own.update(__slots__=("sequence",)))()
    slotted.sequence = agent.sequence
    assert list(idle_ends(slotted, longer, 1)) == []
    learner, replay = settings["learner"], settings["replay"]
    share = {"learner": {**learner, "batch_size": learner["batch_size"] // 2}}
    share["replay"] = {**replay, "min_env_steps": (replay.get("min_env_steps") or 0) // 2}
    assert list(idle_ends(agent, {**longer, **share}, 2)) == lines


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_opens_with_its_command(name):
    first, second = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith(f"# python -m rlx.train experiment={name}")


def trace_update(agent: Any, batch_size: int) -> None:
    """Shapes only: nothing is compiled or computed."""
    batch = jax.eval_shape(lambda: bench_measuring.zero_batch(agent, batch_size))
    state = jax.eval_shape(agent.init, jax.random.PRNGKey(0))
    new, output = jax.eval_shape(agent.update, state, batch)
    if isinstance(agent, Prioritizing):
        assert output.priorities.shape == (batch_size, agent.sequence.unroll)
    else:
        assert output.priorities is None
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, new)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_setting_of_a_yaml_is_explained_and_read(option):
    """Each key has a comment on its line or above its block, and some code reads it."""
    group, _, name = option.partition("=")
    text = (CONF / group / f"{name}.yaml").read_text()
    assert text.startswith("#")
    source = "".join(path.read_text() for path in SOURCE.rglob("*.py"))
    for cls, settings in targets(yaml.safe_load(text)):
        assert set(settings) == set(setting_hints(cls)) - set(runtime_names(cls))
        for key in settings:
            uses = re.findall(rf"(?<![\w.])(?:\w+\.)*{key}\b(?!\s*:)", source)
            assert uses, f"nothing reads {group}.{key}"


def targets(node: Any) -> Any:
    """(class, its settings) of every node that has a `_target_`."""
    if isinstance(node, dict):
        if "_target_" in node:
            cls, why = resolve(node["_target_"])
            assert cls is not None, why
            yield cls, {k: value for k, value in node.items() if k not in ("_target_", "defaults")}
        for child in node.values():
            yield from targets(child)


def test_the_paper_agent_has_the_papers_numbers():
    settings, _, agent = built("experiment=atari_r2d2")
    spec = agent.sequence
    assert (spec.burn_in, spec.unroll, spec.n_step, spec.stride) == (40, 80, 5, 40)
    assert (agent.discount, agent.rescale_epsilon) == (0.997, 1e-3)
    assert agent.target_period_updates == 2500
    assert (agent.optimizer.learning_rate, agent.optimizer.epsilon) == (1e-4, 1e-3)
    assert (settings["learner"]["batch_size"], settings["replay"]["ratio"]) == (64, 0.8)
    replay = settings["replay"]
    assert (replay["priority_exponent"], replay["importance_exponent"]) == (0.9, 0.6)
    assert replay["priority_eta"] == 0.9
    params = jax.eval_shape(agent.init, jax.random.PRNGKey(0)).params
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    assert 8.0e6 < count < 8.2e6  # 8.1 million with 18 actions


def test_numbers_of_numpy_are_numbers():
    cfg = rlx.compose()
    tree = OmegaConf.to_container(cfg, resolve=True)
    tree["seed"], tree["deterministic"] = np.int64(3), np.bool_(False)
    tree["agent"]["optimizer"]["learning_rate"] = np.float64(0.001)
    tree["env"]["components"] = [np.int32(0), np.int64(2)]
    check(tree)
    assert type(plain(tree)["agent"]["optimizer"]["learning_rate"]) is float
    tree["seed"] = np.float64(0.5)
    with pytest.raises(ConfigError, match=r"seed=0\.5: accepted: an int"):
        check(tree)
