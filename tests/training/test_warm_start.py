"""Runs that begin with another run's weights, whole or in parts, and frozen parts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rlx
from rlx import trees
from rlx.problems import ConfigError
from rlx.training.checkpoint import Checkpointer
from tests import parts
from tests.training.test_learner_group import two_loops
from tests.training.test_run import checkpoints, run

NOTHING_LEARNT = ["replay.min_sequences=100", "total_env_steps=100"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of another seed."""
    folder = tmp_path_factory.mktemp("other") / "run"
    run(folder, "seed=9", "checkpoint.keep=2")
    return folder


def leaves(folder: Path, which: str = "latest") -> dict[str, np.ndarray]:
    state = rlx.load(folder).restore(which).state
    return {k: np.asarray(v) for k, v in trees.flatten(state.params).items()}


def targets(folder: Path) -> dict[str, np.ndarray]:
    state = rlx.load(folder).restore().state
    return {k: np.asarray(v) for k, v in trees.flatten(state.target_params).items()}


def taken(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> set[str]:
    return {name for name in first if np.array_equal(first[name], second[name])}


def test_a_run_begins_with_all_weights_of_another(other, tmp_path, caplog):
    with caplog.at_level("INFO"):
        summary = run(tmp_path, *NOTHING_LEARNT, f"init_from={other}")
    found, there = leaves(tmp_path), leaves(other)
    assert taken(found, there) == set(there)
    assert taken(targets(tmp_path), there) == set(there)
    assert summary["updates"] == 0
    state = rlx.load(tmp_path).restore().state
    assert int(state.updates) == int(state.gradient_steps) == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(state.opt_state))
    assert f"of {checkpoints(other)[-1]}" in caplog.text


@pytest.mark.parametrize(
    ("patterns", "part"),
    [
        ("[torso/*]", lambda name: name.startswith("torso/")),
        ("['*','!head/*']", lambda name: not name.startswith("head/")),
        ("['*','!*/kernel',core/*]", lambda n: not n.endswith("/kernel") or n.startswith("core/")),
    ],
)
def test_patterns_choose_parts_and_the_rest_is_drawn_from_the_seed(patterns, part, other, tmp_path):
    run(tmp_path / "fresh", *NOTHING_LEARNT)
    run(tmp_path / "warm", *NOTHING_LEARNT, f"init_from={other}", f"init_params={patterns}")
    fresh, warm, there = leaves(tmp_path / "fresh"), leaves(tmp_path / "warm"), leaves(other)
    wanted = {name for name in there if part(name)}
    assert 0 < len(wanted) < len(there)
    assert all(np.array_equal(warm[name], there[name]) for name in wanted)
    assert all(np.array_equal(warm[name], fresh[name]) for name in set(there) - wanted)
    assert all(
        np.array_equal(value, warm[name]) for name, value in targets(tmp_path / "warm").items()
    )


def test_a_checkpoint_may_be_named(other, tmp_path):
    older = checkpoints(other)[0]
    run(tmp_path, *NOTHING_LEARNT, f"init_from={older}")
    assert taken(leaves(tmp_path), leaves(other, str(older))) == set(leaves(other))
    assert taken(leaves(tmp_path), leaves(other)) != set(leaves(other))


def test_relative_paths_start_where_the_run_was_begun(other, tmp_path, monkeypatch):
    monkeypatch.chdir(other.parent)
    run(tmp_path, *NOTHING_LEARNT, f"init_from={other.name}")
    assert rlx.load(tmp_path).cfg["init_from"] == os.path.abspath(other)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["network.core.units=6"], r"core/\S+ is float32\[.*8.*\] there and float32\[.*6.*\] here"),
        (["env=cartpole"], r"torso/Dense_0/kernel is float32\[2, 8\] there and float32\[4, 8\]"),
        (["network=mlp", "network.torso.layers=[8]"], r"core/\S+ is missing there and float32"),
        (
            ["init_params=[tors/*]"],
            r"init_params: 'tors/\*': no parameter has such a name.*torso",
        ),
        (["init_from=/nowhere"], r"init_from=/nowhere: no run is there"),
        (["init_from="], r"init_from='' \(command line\): an empty path; give one, or null"),
        (["init_from=null", "init_params=[torso/*]"], r"init_params=\['?torso/\*'?\]: they choose"),
        (
            ["init_params=['!head/*']"],
            r"init_params: \['!head/\*'\]: they choose no parameter; b",
        ),
        (["init_params=[]"], r"init_params=\[\]: they choose no parameter; give"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, says, other, tmp_path):
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, *NOTHING_LEARNT, f"init_from={other}", *given)
    assert not (tmp_path / "env.json").exists()


def test_a_parameter_that_stands_alone_is_left_out_by_its_name(other, tmp_path):
    sac = ["agent=sac", "env=cartpole", "network=mlp", "logging.console=off"]
    with pytest.raises(ConfigError, match=r"'!log_temperature'\]"):
        rlx.run(rlx.compose([*sac, f"init_from={other}"]), tmp_path)


def test_other_parts_may_differ(other, tmp_path):
    given = ["env=cartpole", "init_params=['*','!torso/Dense_0/kernel']", "agent.n_step=1"]
    run(tmp_path, *NOTHING_LEARNT, f"init_from={other}", *given)
    found, there = leaves(tmp_path), leaves(other)
    same = {name for name in there if name != "torso/Dense_0/kernel"}
    assert all(np.array_equal(found[name], there[name]) for name in same)


def test_a_damaged_checkpoint_is_passed_over_and_a_named_one_refused(tmp_path, caplog):
    run(tmp_path / "other", "seed=9")
    newest = checkpoints(tmp_path / "other")[-1]
    (newest / "state.npz").write_bytes(b"no state")
    run(tmp_path / "run", *NOTHING_LEARNT, f"init_from={tmp_path / 'other'}")
    assert "Trying another checkpoint" in caplog.text
    with pytest.raises(ConfigError, match=r"init_from=.*damaged.* It was named, so no other"):
        run(tmp_path / "again", *NOTHING_LEARNT, f"init_from={newest}")


def test_a_resume_reads_the_run_s_own_checkpoint(other, tmp_path):
    first = run(tmp_path / "run", f"init_from={other}", "total_env_steps=800")
    (tmp_path / "moved").mkdir()
    last = run(
        tmp_path / "run",
        f"init_from={tmp_path / 'gone'}",
        f"resume={tmp_path / 'run'}",
        "total_env_steps=1200",
    )
    assert last["updates"] > first["updates"] > 0


def test_both_learner_processes_begin_alike(other, tmp_path):
    given = ["evaluation.every_env_steps=null", f"init_from={other}", *NOTHING_LEARNT]
    assert two_loops(tmp_path, *given) == ["finished"] * 2
    there, found = (Checkpointer(folder, None).leaves()[1] for folder in (other, tmp_path))
    params = {name for name in there if name.startswith("params/")}
    assert taken(there, found) & params == params


# IQN begins as the R2D2 of the tests above does.
@pytest.mark.parametrize("agent", ["sac", "ppo", pytest.param("iqn", marks=pytest.mark.slow)])
def test_any_agent_begins_warm(agent, tmp_path):
    own = {
        "sac": ["agent=sac", "env=cartpole", "network=mlp", "network.torso.layers=[8]"],
        "ppo": ["agent=ppo", "env=cartpole", "network=mlp", "network.torso.layers=[8]",
                "agent.normalize_observation=true", "acting.envs_per_actor=4",
                "learner.batch_size=4", "agent.unroll=16", "agent.minibatches=2"],
        "iqn": ["agent=iqn", "network=mlp_lstm", "network.torso.layers=[8]"],
    }[agent]  # fmt: skip
    more = ["evaluation.final_episodes=0", "logging.console=off", "logging.tensorboard=false"]
    settings = [*own, *more, "total_env_steps=600"]
    rlx.run(rlx.compose([*settings, "seed=4"]), tmp_path / "first")
    stop = ["stop_after_updates=1", f"init_from={tmp_path / 'first'}"]
    rlx.run(rlx.compose([*settings, *stop]), tmp_path / "second")
    before = rlx.load(tmp_path / "first").restore().state
    after = rlx.load(tmp_path / "second").restore().state
    for one, two in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        # After one update, which PPO makes in 8 gradient steps of at most the learning rate.
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), atol=2e-2)
    of_targets = before.params["network"]["critic"] if agent == "sac" else before.params
    found = after.target_params["critic"] if agent == "sac" else after.target_params
    if after.target_params:
        for one, two in zip(jax.tree.leaves(of_targets), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(np.asarray(one), np.asarray(two), atol=2e-2)


# --- network.frozen ------------------------------------------------------------------------------


def test_frozen_parts_stay_to_the_bit_and_the_others_learn(tmp_path):
    run(tmp_path / "fresh", *NOTHING_LEARNT)
    run(tmp_path / "run", "network.frozen=[torso/*,core/*]")
    before, after = leaves(tmp_path / "fresh"), leaves(tmp_path / "run")
    same = taken(before, after)
    assert {name for name in before if name.startswith(("torso/", "core/"))} <= same
    assert not any(name.startswith("head/") and name.endswith("kernel") for name in same)


def gradients(frozen: list[str]) -> tuple[dict[str, np.ndarray], float]:
    """(the changes of one update with a plain rate, the norm of its gradients)."""
    agent = parts.agent(parts.network(frozen=frozen), optimizer=parts.adam(max_grad_norm=1e-3))
    state = parts.random_state(agent)
    after, output = jax.jit(agent.update)(state, parts.batch(agent, 4))
    before, now = trees.flatten(state.params), trees.flatten(after.params)
    changes = {name: np.asarray(now[name]) - np.asarray(before[name]) for name in before}
    return changes, float(output.metrics["learner/grad_norm"])


def test_what_is_frozen_does_not_count_for_the_norm_that_is_clipped():
    _, whole = gradients([])
    changes, part = gradients(["torso/*", "core/*"])
    _, rest = gradients(["head/*"])
    assert part**2 + rest**2 == pytest.approx(whole**2, rel=1e-4)
    assert all((changes[name] == 0).all() for name in changes if not name.startswith("head/"))
    assert all((changes[name] != 0).any() for name in changes if name.startswith("head/"))


def test_values_are_those_of_the_network_that_is_not_frozen():
    rng = np.random.default_rng(0)
    free, frozen = parts.network(), parts.network(frozen=["*"])
    params: Any = parts.init(free, jax.random.PRNGKey(0))
    inputs, carry = parts.inputs(parts.VECTOR, 3, 2, rng=rng), free.initial_carry(2)
    for one, two in zip(
        jax.tree.leaves(free.apply(params, inputs, carry)),
        jax.tree.leaves(frozen.apply(params, inputs, carry)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_a_pattern_that_fits_nothing_is_refused(tmp_path):
    says = r"network.frozen: 'toros/\*': no parameter has such a name.*core, head.*torso"
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, "network.frozen=[toros/*]")
    with pytest.raises(ConfigError, match=r"network.frozen: \['!torso/\*'\]: they choose no"):
        run(tmp_path, "network.frozen=['!torso/*']")


def test_frozen_parts_of_a_warm_start_are_the_other_run_s(other, tmp_path):
    run(tmp_path, f"init_from={other}", "init_params=[torso/*]", "network.frozen=[torso/*]")
    found, there = leaves(tmp_path), leaves(other)
    torso = {name for name in there if name.startswith("torso/")}
    assert taken(found, there) & torso == torso
    assert not any(name.startswith("head/") and "kernel" in name for name in taken(found, there))
