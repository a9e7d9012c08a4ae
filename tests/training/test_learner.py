"""The learner over 1, 2, 4 and 8 devices (forced host devices)."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rlx.machine import xla
from rlx.training.checkpoint import Checkpoint, Checkpointer
from rlx.training.learner import Learner, OpenLearner
from tests import parts

UPDATES = 4


def learner(devices: int | None = 1, **changes) -> OpenLearner:
    settings = {
        "processes": 1,
        "group": None,
        "batch_size": 8,
        "platform": None,
        "devices": devices,
        "memory_fraction": None,
        "publish_every_updates": 1,
        "publish_every_env_steps": None,
        "on_nonfinite": "stop",
    }
    agent = changes.pop("agent", None) or parts.agent(target_period_updates=3)
    seed = changes.pop("seed", 3)
    return Learner(**settings | changes).open(agent, seed)


def run(devices: int) -> tuple[list[np.ndarray], np.ndarray]:
    """All that updates change, and priorities, after a few of them on the same batches."""
    subject = learner(devices, agent=parts.Watching(r2d2=parts.agent(target_period_updates=3)))
    for seed in range(UPDATES):
        output = subject.update(subject.put(parts.batch(subject._agent, 8, seed=seed)))
    state = subject.state()
    changed = (state.params, state.target_params, state.opt_state, state.statistics)
    leaves = jax.tree.leaves(changed)
    return leaves, subject.priorities(output)


def test_any_number_of_devices_gives_the_same_parameters(tmp_path):
    code = (
        "import sys, numpy as np, jax\n"
        "jax.config.update('jax_default_matmul_precision', 'highest')\n"
        "from tests.training.test_learner import run\n"
        "for devices in map(int, sys.argv[1:]):\n"
        "    leaves, td = run(devices)\n"
        "    np.savez(f'{devices}.npz', *leaves, td=td)\n"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    flags["PYTHONPATH"] = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", code, "2", "4", "8"],
        cwd=tmp_path,
        env={**os.environ, **flags, "JAX_PLATFORMS": "cpu"},
        check=True,
        timeout=300,
    )
    leaves, td = run(1)
    for devices in (2, 4, 8):
        saved = np.load(tmp_path / f"{devices}.npz")
        np.testing.assert_allclose(saved["td"], td, atol=1e-5)
        for i, leaf in enumerate(leaves):
            np.testing.assert_allclose(saved[f"arr_{i}"], leaf, rtol=1e-4, atol=1e-5)


def test_donation_survives_a_target_that_is_the_parameters():
    subject = learner()
    state = subject._agent.init(jax.random.PRNGKey(0))
    assert jax.tree.leaves(state.params)[0] is jax.tree.leaves(state.target_params)[0]
    subject.restore(state)
    for seed in range(2):
        subject.update(subject.put(parts.batch(subject._agent, 8, seed=seed)))
    assert int(subject.state().updates) == 2


def test_published_weights_do_not_move_with_later_updates():
    subject = learner()
    batch = parts.batch(subject._agent, 8)
    subject.update(subject.put(batch))
    published = subject.publish()
    before = jax.tree.map(np.copy, subject.state().params)
    subject.update(subject.put(batch))
    weights = published.weights()
    assert weights.version == 1
    jax.tree.map(np.testing.assert_array_equal, weights.params, before)
    after = subject.state().params
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_a_released_batch_overwritten_with_255_changes_no_loss():
    losses = []
    for overwrite in (False, True):
        subject = learner()
        for seed in range(UPDATES):
            batch = parts.batch(subject._agent, 8, seed=seed)
            output = subject.update(subject.put(batch))
            subject.priorities(output)  # the update has finished: its buffers may be reused
            if overwrite:
                jax.tree.map(lambda x: np.asarray(x).view(np.uint8).fill(255), batch.rows)
        losses.append(float(output.metrics["learner/loss"][0]))
    assert losses[0] == losses[1]


def test_restored_learner_goes_on_bit_for_bit():
    batches = [parts.batch(parts.agent(), 8, seed=seed) for seed in range(4)]
    whole, half = learner(), learner()
    for batch in batches:
        whole.update(whole.put(batch))
    for batch in batches[:2]:
        half.update(half.put(batch))
    resumed = learner(seed=99)
    resumed.restore(half.state())
    for batch in batches[2:]:
        resumed.update(resumed.put(batch))
    assert resumed.updates == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.state(), whole.state())


def test_statistics_are_of_all_rows_learnt_from_and_come_back_from_a_checkpoint(tmp_path):
    subject = learner(agent=parts.Watching(r2d2=parts.agent()))
    batches = [parts.batch(subject._agent, 8, seed=seed) for seed in range(3)]
    for batch in batches:
        subject.update(subject.put(batch))
    seen = np.concatenate([b.rows.inputs.observation["observation"][b.rows.valid] for b in batches])
    settings = Checkpoint(every_env_steps=1, keep=1, replay=False, exact=False)
    Checkpointer(tmp_path, settings).save(9, state=subject.state(), meta={})
    like = jax.tree.map(np.zeros_like, subject.state())
    restored = Checkpointer(tmp_path, None).restore(like, with_replay=False).state
    jax.tree.map(np.testing.assert_array_equal, restored, subject.state())
    moments = restored.statistics["observation"]
    assert moments.count == len(seen)
    np.testing.assert_allclose(moments.mean, seen.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(moments.spread / len(seen), seen.var(axis=0), rtol=1e-4)


@pytest.mark.parametrize("name", ["importance", "reward"])
def test_an_update_that_is_not_finite_changes_nothing_but_the_count(name):
    subject = learner(agent=parts.agent(target_period_updates=2))  # due at the bad one
    subject.update(subject.put(parts.batch(subject._agent, 8)))
    before = subject.state()
    bad = parts.batch(subject._agent, 8, seed=1)
    if name == "importance":
        bad.importance[3] = np.nan
    else:
        bad.rows.reward[2] = np.inf
    output = subject.update(subject.put(bad))
    assert not subject.is_finite(output)
    after = subject.state()
    assert (before.updates, after.updates, subject.updates) == (1, 2, 2)
    for name in ("params", "target_params", "opt_state", "key"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    assert subject.is_finite(subject.update(subject.put(parts.batch(subject._agent, 8))))


def test_statistics_that_would_not_be_finite_stay_as_they_were():
    """Squares of 1e20 are infinite in float32, and an infinite spread would stay for ever."""
    subject = learner(agent=parts.Watching(r2d2=parts.agent()))
    subject.update(subject.put(parts.batch(subject._agent, 8)))
    before, bad = subject.state(), parts.batch(subject._agent, 8, seed=1)
    bad.rows.inputs.observation["observation"][2, 3] = 1e20
    bad.rows.valid[2, 3] = True
    assert not subject.is_finite(subject.update(subject.put(bad)))
    jax.tree.map(np.testing.assert_array_equal, before.statistics, subject.state().statistics)


def test_it_is_busy_until_its_last_update_has_ended():
    subject = learner()
    assert not subject.is_busy
    output = subject.update(subject.put(parts.batch(subject._agent, 8)))
    subject.priorities(output)
    assert not subject.is_busy
    batch = subject.put(parts.batch(subject._agent, 512))
    outputs = [subject.update(batch) for _ in range(3)]
    assert subject.is_busy
    subject.priorities(outputs[-1])
    assert not subject.is_busy


def test_a_platform_that_is_not_there_is_refused():
    assert [d.platform for d in learner(platform="cpu").devices] == ["cpu"]
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match=r"platform=gpu, but this process has cpu devices"):
            learner(platform="gpu")


def test_a_share_of_a_gpus_memory_is_asked_for_before_jax_starts(monkeypatch):
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    settings = {"learner": {"memory_fraction": None}, "deterministic": False, "compile_cache": True}
    xla.prepare(settings)
    assert name not in os.environ
    xla.prepare(settings | {"learner": {"memory_fraction": 0.3}})
    assert os.environ[name] == "0.3"


def test_impossible_devices_and_batches_are_refused():
    with pytest.raises(ValueError, match=r"learner.devices=999, but there are \d+ \(cpu\)"):
        learner(999)
    from rlx.training.learner import choose_devices

    assert len(choose_devices(None, None, 8)) == len(jax.local_devices())
    if len(jax.local_devices()) == 1:
        assert choose_devices(None, 1, 7)


def test_xlas_own_convolutions_are_asked_for_where_they_are_known(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    xla.prepare()
    asked = xla.fast_convolutions()
    assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_to=/nowhere", *asked]
    xla.prepare()  # once is enough
    assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_to=/nowhere", *asked]
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    xla.prepare()  # the user's own choice
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_experimental_ynn_fusion_type="
    if asked:  # in actors on Ray, too, whose environment is given to them
        assert xla.fast_convolutions() == ["--xla_cpu_experimental_ynn_fusion_type="]
    monkeypatch.setattr(xla, "version", lambda _: "9.9")
    assert xla.fast_convolutions() == []


def test_flags_in_a_file_are_kept(monkeypatch, tmp_path):
    """XLA takes what does not begin with a flag for a file's name, and ends if there is none."""
    path = tmp_path / "flags"
    path.write_text("--xla_dump_to=/nowhere\n--xla_a=1\n")
    monkeypatch.setenv("XLA_FLAGS", str(path))
    xla.add_flag("--xla_a=2")
    assert os.environ["XLA_FLAGS"] == str(path)
    xla.add_flag("--xla_b=2")
    assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_to=/nowhere", "--xla_a=1", "--xla_b=2"]
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "none"))
    xla.add_flag("--xla_b=2")  # it is XLA that says what is wrong
    assert os.environ["XLA_FLAGS"] == str(tmp_path / "none")


def test_the_flag_does_what_it_is_for():
    code = (
        "from rlx.machine import xla; xla.prepare(); import jax, jax.numpy as jnp;"
        "from rlx.networks.convolution import _convolve;"
        "f = jax.jit(_convolve, static_argnums=2);"
        "x, k = jnp.ones((16, 20, 20, 32)), jnp.ones((4, 4, 32, 64));"
        "print('ynn' in f.lower(x, k, 2).compile().as_text())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False" or not xla.fast_convolutions()
