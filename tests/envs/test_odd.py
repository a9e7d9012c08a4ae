"""Environments that answer what they did not declare, or what no network can read."""

import logging
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

import rlx
from rlx.acting.plan import Plan
from rlx.envs.envpool import EnvPool
from rlx.envs.gymnasium import Gymnasium
from rlx.evaluation.playing import run_episodes
from rlx.problems import ConfigError, EnvironmentFailed
from rlx.training.nonfinite import NonFiniteAnswer
from rlx.types import ArraySpec, Categories, Request, Weights
from tests import parts
from tests.conftest import SMALL
from tests.envs.odd import SPACES
from tests.envs.test_envpool import family as pooled
from tests.envs.test_gymnasium import family

ROOT = Path(__file__).resolve().parents[2]


def odd(name: str = "Odd", *, observe=None, image="auto", vector="sync", **kwargs) -> Gymnasium:
    env_id = f"tests.envs.odd:rlx-odd/{name}-v0"
    return family(env_id, kwargs=kwargs, observe=observe, image=image, vector=vector)


def played(env, steps: int) -> list:
    """The answers of so many steps, the reset's first."""
    answers = [env.reset()]
    for _ in range(steps):
        lane = answers[-1].lane
        answers.append(env.step(np.zeros(len(lane), np.int32), lane))
    return answers


# --- not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", ["sync", "async"])
@pytest.mark.parametrize("wrong", ["nan reward", "huge reward", "nan observation"])
def test_an_answer_that_is_not_finite_ends_its_episode_uncounted(wrong, vector):
    env = odd(wrong=wrong, vector=vector).make(lanes=2, seeds=[1, 2])
    answers = played(env, 31)
    for answer in answers:
        assert np.isfinite(answer.reward).all()
        assert np.isfinite(answer.observation["observation"]).all()
    firsts = [t for t, answer in enumerate(answers) if answer.first[1]]
    assert firsts == [0, 11, 16, 27]  # the fifth env step of the second episode is the 15th
    assert [e.env_steps for e in env.episodes()] == [10, 10, 10, 10]
    cuts = env.cuts()
    assert [(cut.lane, cut.env_step) for cut in cuts] == [(0, 5), (1, 5)]
    said = {"nan reward": "the reward is nan", "huge reward": "the reward is 1e+39 (rlx carries"}
    assert said.get(wrong, "the observation 'observation' has nan (1 of 3)") in str(cuts[0])
    assert env.cuts() == []
    env.close()


def test_first_observations_that_are_not_finite_are_not_seen_either():
    env = odd("NanUntilStepped").make(lanes=2, seeds=[1, 2])
    answers = played(env, 45)
    assert all(np.isfinite(answer.observation["observation"]).all() for answer in answers)
    assert [t for t, answer in enumerate(answers) if answer.first[0]] == [0, 11, 21, 22, 33, 44]
    assert {cut.env_step for cut in env.cuts()} == {0, 10}


def test_an_environment_that_never_begins_well_fails_in_one_line():
    env = odd(wrong="nan observation", at=0).make(lanes=1, seeds=[1])
    with pytest.raises(EnvironmentFailed, match="not finite 10 times in a row") as error:
        played(env, 40)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_lanes_of_envpool_whose_rewards_overflow_begin_anew(batch_size):
    ant = pooled("Ant-v5", options={"healthy_reward": 1e39}, batch_size=batch_size)
    env = ant.make(lanes=3, seeds=[1, 2, 3])
    step, seen = env.reset(), 0
    for _ in range(30):
        assert np.isfinite(step.reward).all()
        assert step.first.all()  # no answer but a first one is finite
        assert len(step.lane)
        seen += len(step.lane)
        step = env.step(np.zeros((len(step.lane), 8), np.float32), step.lane)
    cuts = env.cuts()
    assert {cut.lane for cut in cuts} == {0, 1, 2}
    assert {cut.env_step for cut in cuts} == {1}
    assert env.episodes() == []
    env.close()


def test_lanes_ended_from_outside_begin_anew_and_count():
    for made in (odd("Endless"), pooled("CartPole-v1"), pooled("CartPole-v1", batch_size=2)):
        env = made.make(lanes=3, seeds=[1, 2, 3])
        step = env.reset()
        for _ in range(4):
            step = env.step(np.zeros(len(step.lane), np.int32), step.lane)
        ended = step.lane[:1].copy()
        env.end(ended)
        (episode,) = env.episodes()
        assert episode.lane == ended[0]
        assert episode.env_steps == episode.return_ > 0
        for _ in range(5):
            step = env.step(np.zeros(len(step.lane), np.int32), step.lane)
            if ended[0] in step.lane:
                assert step.first[list(step.lane).index(ended[0])]
                break
        else:
            pytest.fail("the lane did not answer")
        env.close()


def small(name: str, *more: str, **kwargs) -> list[str]:
    given = [f"+env.kwargs.{key}={value}" for key, value in kwargs.items()]
    env = ["env=gymnasium", f"env.id=tests.envs.odd:rlx-odd/{name}-v0", *given]
    return [*env, *SMALL, "total_env_steps=200", *more]


@pytest.mark.parametrize("acting", ["local", "threads"])
def test_a_run_stops_at_such_an_answer_and_keeps_it(tmp_path, acting):
    settings = small("Odd", f"acting={acting}", wrong="nan reward")
    with pytest.raises(NonFiniteAnswer, match=r"lane \d, env step 5 of its.*reward is nan") as e:
        rlx.run(rlx.compose(settings), tmp_path)
    assert "\n" not in str(e.value)
    with np.load(tmp_path / "nonfinite" / "0.npz") as kept:
        assert np.isnan(kept["reward"])
        assert kept["observation/observation"].shape == (3,)
    assert list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("acting", ["local", "threads"])
def test_a_run_may_cut_such_episodes_and_go_on(tmp_path, acting):
    settings = small("NanUntilStepped", f"acting={acting}", "learner.on_nonfinite=skip")
    summary = rlx.run(rlx.compose(settings), tmp_path)
    assert summary["state"] == "finished"
    assert np.isfinite(summary["evaluation_return"])
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"acting/cut_episodes": 0' not in rows[-1]


# --- answers that were not declared --------------------------------------------------------------


@pytest.mark.parametrize("vector", ["sync", "async"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("no reward", r"step\(\) returned the reward None .NoneType.; return a number"),
        ("text reward", r"step\(\) returned the reward 1.0 .str.; return a number"),
        ("two rewards", r"step\(\) returned the reward float64\[2\]; return a number"),
        ("short observation", r"returned the observation as float32\[2\]; declared: float32\[3\]"),
        ("text observation", r"returned the observation as here .str.; declared: float32\[3\]"),
        ("no observation", r"the observation as None .NoneType.; declared: float32\[3\]"),
        ("no flag", r"returned terminated as None .NoneType.; return True or False"),
        ("four values", r"step\(\) returned a tuple of 4; return .observation, reward, terminated"),
        ("raises", r"step\(\) raised RuntimeError: simulator lost .odd.py, line \d+.$"),
        ("exits", r"step\(\) raised SystemExit: 3"),
    ],
)
def test_a_step_that_is_not_as_declared_is_one_line(wrong, says, vector):
    if vector == "async" and wrong not in ("no reward", "exits"):
        pytest.skip("the same code, in another process")
    env = odd(wrong=wrong, vector=vector).make(lanes=2, seeds=[1, 2])
    with pytest.raises(EnvironmentFailed, match=says) as error:
        played(env, 20)
    assert str(error.value).startswith("env.id='tests.envs.odd:rlx-odd/Odd-v0' in lane ")
    assert "\n" not in str(error.value)
    env.close()


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("OldReset", "", r"lane 0: reset\(\) raised TypeError: .*; declare reset\(self, \*, seed"),
        ("Odd", "raises", r"lane 0: reset\(\) raised RuntimeError: no display"),
        ("Odd", "no info", r"lane 0: reset\(\) returned float32\[3\]; return .observation, info"),
    ],
)
def test_a_reset_that_is_not_as_declared_is_one_line(name, wrong, says):
    env = odd(name, wrong=wrong, at=0).make(lanes=2, seeds=[1, 2])
    with pytest.raises(EnvironmentFailed, match=says):
        env.reset()


def test_what_can_be_read_is_read():
    played(odd(wrong="a number in an array").make(lanes=2, seeds=[1, 2]), 20)
    played(odd("Infos").make(lanes=3, seeds=[1, 2, 3]), 20)


def test_an_interrupt_of_the_environments_own_is_its_error(tmp_path):
    """It is raised in a run, where Ctrl-C is handled, and in a thread, which no signal reaches."""
    for acting in ("local", "threads"):
        settings = small("Odd", f"acting={acting}", wrong="interrupts")
        with pytest.raises(EnvironmentFailed, match="raised KeyboardInterrupt"):
            rlx.run(rlx.compose(settings), tmp_path / acting)


def test_the_lane_that_is_named_is_the_runs(tmp_path):
    plan = Plan(
        family=odd(wrong="raises"),
        agent=parts.agent(parts.network(odd().spec())),
        exploration=rlx.make("exploration=ladder"),
        seed=0,
        instances=3,
        envs_per_actor=2,
        device="cpu",
    )
    actor = plan.actor(2, 0)
    params = plan.agent.acting_params(plan.agent.init(jax.random.PRNGKey(0)))
    weights = Weights(version=0, params=jax.tree.map(np.asarray, params))
    request = Request(weights=weights, env_steps=0, want_env_steps=99, want_blocks=None)
    with pytest.raises(EnvironmentFailed, match="in lane 4: step"):
        actor.collect(request)


# --- leaves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "observe", "says"),
    [
        ("text beside", None, r"observe=null reads 'mission', which is Text.* some of: image$"),
        ("tuple beside", "odd/1", r"reads 'odd/1', which is Text.* some of: odd/0, sight$"),
        ("same names", None, r"reads 'a/b', which is there twice"),
        ("nothing", None, r"reads 'observation', which has no elements \[0\]"),
        ("nothing beside", None, r"reads 'none', which has no elements.* some of: some$"),
        ("wide", None, r"'observation', which declares int64 from 0 to 1099511627776; rlx carries"),
    ],
)
def test_leaves_that_are_read_must_be_readable(space, observe, says):
    with pytest.raises(ValueError, match=says) as error:
        odd(space=SPACES[space], observe=observe).spec()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("space", "observe"),
    [
        ("text beside", "image"),
        ("tuple beside", "sight"),
        ("same names", "c"),
        ("nothing beside", "some"),
    ],
)
def test_leaves_that_are_not_read_may_be_anything(space, observe):
    env = odd(space=SPACES[space], observe=observe).make(lanes=2, seeds=[1, 2])
    assert list(played(env, 12)[-1].observation) == [observe]


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        ("within 32 bits", "uint32"),
        ("unsigned", "uint32"),
        ("unbounded", "int32"),
        ("long floats", "float32"),
    ],
)
def test_what_fits_32_bits_is_carried_in_them(space, dtype):
    assert odd(space=SPACES[space]).spec().observation["observation"].dtype == dtype


def test_an_integer_that_does_not_fit_is_told_and_never_wraps():
    env = odd(space=SPACES["unbounded"]).make(lanes=2, seeds=[1, 2])
    with pytest.raises(EnvironmentFailed, match=r"'observation' has .*rlx carries it as int32"):
        env.reset()  # samples of 64 bits


def test_choices_are_one_hot_or_numbers_as_the_network_says():
    spec = odd(space=SPACES["choice"]).spec()
    assert spec.categories == {"observation": Categories(first=(3,), counts=(500,))}
    assert "'observation' is a choice of 500; network.discrete" in spec.said[0]
    both = odd(space=SPACES["choices"]).spec().categories["observation"]
    assert both == Categories(first=(1, 0), counts=(3, 4))
    frozen = EnvPool(**vars(pooled("FrozenLake-v1"))).spec().categories
    assert frozen == {"observation": Categories(first=(0,), counts=(16,))}
    rng, seen = np.random.default_rng(0), {}
    for how, inputs in (("one_hot", 500), ("number", 1)):
        net = parts.network(spec, discrete=how)
        params = parts.init(net, jax.random.PRNGKey(0))
        assert params["torso"]["Dense_0"]["kernel"].shape[0] == inputs
        given = parts.inputs(spec, 1, 2, rng=rng)
        given.observation["observation"][:] = [[3, 502]]
        features, _ = net.apply(params, given, net.initial_carry(2))
        seen[how] = np.asarray(features)
    assert np.isfinite(seen["one_hot"]).all()


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "turned"),
    [
        ((64, 64, 3), (3, 64, 64)),
        ((64, 64, 1), (1, 64, 64)),
        ((72, 96, 4), (4, 72, 96)),
        ((210, 160, 3), (3, 210, 160)),
        ((7, 7, 3), (3, 7, 7)),
        ((9, 9, 17), (17, 9, 9)),
        ((3, 64, 64), (3, 64, 64)),
        ((12, 84, 84), (12, 84, 84)),
        ((3, 210, 160), (3, 210, 160)),
        ((25, 3, 3), (25, 3, 3)),
    ],
)
def test_images_are_channels_first_whatever_their_layout(shape, turned):
    made = odd(space=Box(0, 255, shape, np.uint8))
    spec = made.spec()
    assert spec.observation["observation"] == ArraySpec(shape=turned, dtype="uint8")
    assert ("is read as [height, width, channels]" in "".join(spec.said)) == (shape != turned)
    env = made.make(lanes=2, seeds=[1, 2])
    image = env.reset().observation["observation"]
    assert image.shape == (2, *turned)
    raw = made.raw_spaces().leaves[0]
    given = np.arange(2 * np.prod(shape), dtype=np.uint64).reshape(2, *shape).astype(np.uint8)
    moved = np.moveaxis(given, -1, 1) if shape != turned else given
    np.testing.assert_array_equal(raw.read(given), moved)
    np.testing.assert_array_equal(np.asarray(raw.read(jax.numpy.asarray(given))), moved)


def test_a_layout_that_cannot_be_told_is_said_and_can_be_set():
    cube = Box(0, 255, (8, 8, 8), np.uint8)
    assert "set chw, or hwc if" in "".join(odd(space=cube).spec().said)
    assert odd(space=cube, image="chw").spec().said == ()
    wide = Box(0, 255, (4, 6, 5), np.uint8)
    assert odd(space=wide, image="hwc").spec().observation["observation"].shape == (5, 4, 6)
    assert odd(space=wide, image=None).spec().observation["observation"].shape == (4, 6, 5)


@pytest.mark.parametrize(
    ("low", "high", "given", "dtype", "least", "most"),
    [
        (0, 255, "float32", "float32", 0.0, 1.0),
        (0, 255, "float64", "float32", 0.0, 1.0),
        (-3, 5, "float32", "float32", 0.0, 1.0),
        (0, 65535, "uint16", "float32", 0.0, 1.0),
        (-128, 127, "int8", "float32", 0.0, 1.0),
        (0, 255, "int64", "uint8", 0, 255),
        (0, 1, "uint8", "bool", 0, 1),
        (-1, 1, "float32", "float32", -1.0, 1.0),
        (0, 1, "float64", "float32", 0.0, 1.0),
    ],
)
def test_images_are_bytes_bools_or_small_floats(low, high, given, dtype, least, most):
    leaf = odd(space=Box(low, high, (3, 6, 6), given)).raw_spaces().leaves[0]
    assert leaf.spec == ArraySpec(shape=(3, 6, 6), dtype=dtype)
    ends = np.full((2, 3, 6, 6), low, given)
    ends[1] = high
    for values in (leaf.read(ends), np.asarray(leaf.read(jax.numpy.asarray(ends)))):
        assert values.dtype == dtype
        np.testing.assert_allclose([values.min(), values.max()], [least, most], rtol=1e-6)


def test_images_without_bounds_are_left_and_said():
    spec = odd(space=Dict({"a": Box(-np.inf, np.inf, (3, 6, 6)), "b": Box(0, 1, (2,))})).spec()
    assert "declares no bounds: its values are not scaled" in spec.said[0]


# --- the end -------------------------------------------------------------------------------------


def test_an_episode_without_end_is_ended_counted_and_said(caplog, monkeypatch):
    monkeypatch.setattr("rlx.evaluation.playing.TELL_S", 0.0)
    agent = parts.agent(parts.network(odd("Endless").spec()))
    params = agent.acting_params(agent.init(jax.random.PRNGKey(0)))
    weights = Weights(version=0, params=jax.tree.map(np.asarray, params))
    with caplog.at_level(logging.INFO):
        found = run_episodes(
            agent=agent,
            weights=weights,
            family=odd("Endless"),
            episodes=5,
            lanes=2,
            epsilon=0.0,
            seed=0,
            purpose="test",
            most_env_steps=13,
        )
    assert [(episode.env_steps, episode.return_) for episode in found] == [(13, 13.0)] * 5
    assert "5 of 5 episodes were ended after 13 env steps" in caplog.text
    assert "evaluating, 2 of 5 episodes" in caplog.text


def test_frames_are_an_emulators_whoever_skips_them():
    assert odd().spec().frames_per_env_step == 1
    assert odd("Emulated").spec().frames_per_env_step == 4
    assert odd("Skipping").spec().frames_per_env_step == 6
    with pytest.raises(ValueError, match=r"skips .*, by chance; set env.kwargs.frameskip to a"):
        odd("Emulated", frameskip=(2, 5)).spec()
    by_hand = family("tests.envs.odd:rlx-odd/Emulated-v0", frames_per_env_step=3)
    assert by_hand.spec().frames_per_env_step == 3
    env = odd("Emulated").make(lanes=1, seeds=[1])
    played(env, 11)
    assert [episode.frames for episode in env.episodes()] == [40]


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "options", "says"),
    [
        ("Pong-v5", {"frame_skip": 0}, "frame_skip=0; accepted: an int >= 1"),
        ("Pong-v5", {"repeat_action_probability": float("nan")}, "=nan; accepted: a float >= 0"),
        ("Pong-v5", {"repeat_action_probability": 1.5}, "=1.5; accepted: a float >= 0 and <= 1"),
        ("Pong-v5", {"img_height": 0}, "img_height=0; accepted"),
        ("Catch-v0", {"height": -1}, "height=-1; accepted: an int >= 2"),
        ("Catch-v0", {"width": 2**40}, "accepted: an int >= 1"),
        ("Ant-v5", {"healthy_reward": float("inf")}, "=inf; accepted: a float"),
        ("MiniGrid-MemoryS7-v0", {"size": -5}, "cannot be opened .it ends its process by SIGABRT"),
        ("Ant-v5", {"xml_file": "no.xml"}, "cannot be opened .RuntimeError: ParseXML"),
    ],
)
def test_options_of_envpool_are_judged_before_it_sees_them(env_id, options, says):
    (problem,) = pooled(env_id, options=options).problems()
    assert says.partition(" .")[0] in problem
    assert "\n" not in problem


@pytest.mark.parametrize(("setting", "given"), [("threads", 100_000), ("max_episode_steps", 2**31)])
def test_numbers_that_envpool_cannot_hold_are_refused(setting, given):
    with pytest.raises(ConfigError, match=f"env.{setting}={given}.*accepted: an int"):
        rlx.run(rlx.compose([f"env.{setting}={given}", *SMALL]), "/nowhere")


def test_a_network_that_cannot_fit_is_refused_by_arithmetic(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.envs.odd.Odd.action_space", Box)
    from gymnasium.spaces import Discrete

    monkeypatch.setattr("tests.envs.odd.Odd.action_space", Discrete(10**9))
    with pytest.raises(ConfigError, match=r"parameters, with targets .* one of 1,000,000,000"):
        rlx.run(rlx.compose(small("Odd")), tmp_path)
    monkeypatch.setattr("tests.envs.odd.Odd.action_space", Discrete(2**40))
    with pytest.raises(ConfigError, match="accepted: at most 2,147,483,647 choices"):
        rlx.run(rlx.compose(small("Odd")), tmp_path)


SCRIPT = """
import gymnasium, numpy as np
from gymnasium.spaces import Box, Discrete
from rlx.envs.gymnasium import Gymnasium

class Mine(gymnasium.Env):
    observation_space, action_space = Box(-1, 1, (2,)), Discrete(2)
    def reset(self, *, seed=None, options=None): return np.zeros(2, np.float32), {}
    def step(self, action): return np.zeros(2, np.float32), 0.0, False, False, {}

def main():
    gymnasium.register("Mine-v0", Mine)
    env = Gymnasium(id="Mine-v0", kwargs={}, vector="async", observe=None, components=None,
        scale=None, action_mask=None, image="auto", frames_per_env_step=None, wrappers=[],
        max_episode_steps=None, restarts=0, per_actor={})
    env.make(lanes=2, seeds=[1, 2]).reset()

"""


@pytest.mark.parametrize(
    ("guard", "says"),
    [
        (
            "if __name__ == '__main__': main()",
            "not known there: give env.id=module:Mine-v0, with",
        ),
        ("main()", "put the script's calls beneath if __name__ == '__main__':"),
    ],
)
def test_what_a_script_alone_knows_is_told(tmp_path, guard, says):
    (tmp_path / "script.py").write_text(SCRIPT + guard)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    told = done.stderr.splitlines()[-1]
    assert told.startswith("ValueError: env.id='Mine-v0' does not work here: ")
    assert says in told
