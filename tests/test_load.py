"""A loaded run in plain Python: the evaluator's actions, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest

import rlx
from rlx.envs.envpool import EnvPool
from rlx.envs.gymnasium import Gymnasium
from rlx.envs.observations import RawSpaces, raw_spaces_of
from rlx.evaluation.player import Player
from rlx.evaluation.playing import run_episodes
from rlx.seeding import spawn_int
from rlx.types import Weights
from tests import parts

SEED = 3
CARTPOLE = Gymnasium(
    id="CartPole-v1",
    kwargs={},
    vector="sync",
    observe=None,
    components=[0, 2],
    scale=[0.4, 4.8],
    action_mask=None,
    image="auto",
    wrappers=[],
    frames_per_env_step=None,
    max_episode_steps=60,
    restarts=0,
    per_actor={},
)
BREAKOUT = EnvPool(
    id="Breakout-v5",
    observe=None,
    components=None,
    scale=None,
    action_mask=None,
    image="auto",
    max_episode_steps=40,
    batch_size=None,
    threads=1,
    options={},
    per_actor={},
)


@pytest.fixture(scope="module")
def run(trained) -> Any:
    return rlx.load(trained)


def player(family: Any, seed: int = 0, **changes: Any) -> Player:
    """A player has random weights, so its actions change with all that the network reads."""
    agent = parts.agent(parts.network(family.spec(), **changes))
    rng = np.random.default_rng(seed)

    def random(leaf: Any) -> np.ndarray:
        size = 3 / np.sqrt(max(1, np.prod(leaf.shape[:-1]))) * (len(leaf.shape) > 1)
        return (size * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    params = jax.tree.map(random, jax.eval_shape(agent.init, jax.random.PRNGKey(0)).params)
    return Player(agent=agent, raw_spaces=raw_spaces_of(family, agent.spec), params=params)


def evaluated(act: Player, family: Any, *, lanes: int, epsilon: float = 0.0) -> list[list[int]]:
    """The evaluator's actions in the first episode of each lane."""
    actions: list[list[int]] = [[] for _ in range(lanes)]
    ended = np.zeros(lanes, bool)

    def watch(env: Any, timestep: Any, starts: Any) -> None:
        ended[:] = starts.number != np.arange(lanes)

    def acted(action: np.ndarray, acting: Any) -> None:
        for lane in np.flatnonzero(~ended):
            actions[lane].append(int(action[lane]))

    run_episodes(
        agent=act._agent,
        weights=Weights(version=0, params=act._params),
        family=family,
        episodes=lanes,
        lanes=lanes,
        epsilon=epsilon,
        seed=SEED,
        purpose="test",
        watch=watch,
        acted=acted,
    )
    return actions


def play(act: Any, env: gymnasium.Env, seed: int) -> list[int]:
    """One episode, as anybody would play it."""
    observation, _ = env.reset(seed=seed)
    state, reward, ended = None, None, False
    actions = []
    while not ended:
        action, state = act(observation, state, reward=reward)
        assert type(action) is int
        observation, reward, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        actions.append(action)
    return actions


def seeds(lanes: int) -> list[int]:
    return [spawn_int(SEED, "evaluation", lane) for lane in range(lanes)]


# --- the same actions ----------------------------------------------------------------------------


def test_actions_in_gymnasium_are_those_of_the_evaluation():
    act = player(CARTPOLE)
    env = gymnasium.make("CartPole-v1", max_episode_steps=60)
    mine = [play(lambda o, s, reward: act.act(o, s, reward=reward), env, s) for s in seeds(3)]
    assert mine == evaluated(act, CARTPOLE, lanes=3)
    assert len({tuple(actions) for actions in mine}) == 3
    assert {action for actions in mine for action in actions} == {0, 1}


def test_a_loaded_run_plays_as_its_evaluation_does(run):
    found = run.evaluate(episodes=1, envs=1, seed=SEED, epsilon=0.0)["returns"]
    env = run.family.open(lanes=1, seeds=seeds(1))  # EnvPool's own, which gives all four numbers
    observation, _ = env.reset()
    action, state = run.act(observation)
    total, ended = 0.0, np.zeros(1, bool)
    while not ended:
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward[0])
        ended = terminated | truncated
        action, state = run.act(observation, state, reward=reward, first=np.zeros(1, bool))
    env.close()
    assert [total] == found


def test_frames_in_a_batch_are_stacked_and_begin_anew_with_their_episodes():
    act = player(BREAKOUT, seed=6)
    env = BREAKOUT.open(lanes=2, seeds=seeds(2))
    observation, _ = env.reset()
    state, ended, actions = None, np.zeros(2, bool), []
    given: dict[str, Any] = {}
    for _ in range(60):  # more than an episode: 40 env steps, and one that resets
        action, state = act.act(observation, state, **given)
        actions.append(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        given = {"reward": reward, "first": ended}
        ended = terminated | truncated
    env.close()

    told: list[np.ndarray] = []

    def acted(action: np.ndarray, acting: Any) -> None:
        told.append(action.copy())

    run_episodes(
        agent=act._agent,
        weights=Weights(version=0, params=act._params),
        family=BREAKOUT,
        episodes=4,
        lanes=2,
        epsilon=0.0,
        seed=SEED,
        purpose="test",
        acted=acted,
    )
    np.testing.assert_array_equal(actions, told[:60])
    assert len(np.unique(actions)) == 3


def test_actions_that_do_not_count_from_zero():
    act = player(CARTPOLE)
    shifted = dataclasses.replace(act._raw_spaces, action_start=5)
    other = Player(agent=act._agent, raw_spaces=shifted, params=act._params)
    observation, state, told = np.ones(4, np.float32), None, None
    for _ in range(4):
        action, state = act.act(observation, state, reward=0.0 if state else None)
        moved, told = other.act(observation, told, reward=0.0 if told else None)
        assert moved == action + 5
        for name, leaf in state.leaves.items():  # the network itself counts from 0
            np.testing.assert_array_equal(leaf, told.leaves[name])


def test_leaves_of_a_dict_are_found_by_name_and_others_left():
    family = EnvPool(
        id="MiniGrid-MemoryS7-v0",
        observe="image",
        components=None,
        scale=None,
        action_mask=None,
        image="auto",
        max_episode_steps=None,
        batch_size=None,
        threads=1,
        options={},
        per_actor={},
    )
    assert "direction" in family.raw_spaces().ignored
    act = player(family, torso=parts.mlp(8), stack={})
    image = np.zeros((7, 7, 3), np.uint8)
    alone, _ = act.act({"image": image}, None)
    assert act.act({"image": image, "direction": 2}, None)[0] == alone
    with pytest.raises(ValueError, match=r"^observation has image, colour; accepted: a dict of im"):
        act.act({"image": image, "colour": 2}, None)
    with pytest.raises(ValueError, match=r"^observation is uint8\[7, 7, 3\]; give a dict of image"):
        act.act(image, None)


# --- state ---------------------------------------------------------------------------------------


def test_a_state_is_never_changed_and_may_be_gone_back_to():
    act, observation = player(CARTPOLE), np.array([0.1, 0, 0.05, 0], np.float32)
    _, state = act.act(observation, None)
    one = act.act(observation, state, reward=1.0)
    two = act.act(observation, state, reward=1.0)
    for name, leaf in one[1].leaves.items():
        np.testing.assert_array_equal(leaf, two[1].leaves[name])
    other = act.act(observation, state, reward=2.0)[1]
    assert not np.array_equal(other.leaves["carry/core/h"], one[1].leaves["carry/core/h"])


def test_random_actions_come_from_the_seed():
    act, observation = player(CARTPOLE), np.zeros(4, np.float32)

    def random(seed: int | None) -> list[int]:
        action, state = act.act(observation, None, epsilon=1.0, seed=seed)
        actions = [action]
        for _ in range(30):
            action, state = act.act(observation, state, reward=1.0, epsilon=1.0)
            actions.append(action)
        return actions

    assert random(1) == random(1)
    assert random(1) != random(2)
    assert random(None) != random(None)
    assert set(random(1)) == {0, 1}


def test_it_is_compiled_once():
    act, observation = player(CARTPOLE), np.zeros(4, np.float64)
    _, state = act.act(observation, None)
    for _ in range(3):
        _, state = act.act(observation, state, reward=1)
    act.act(observation.tolist(), None, epsilon=0.5)
    assert act._compiled._cache_size() == 1


def test_a_checkpoint_is_read_once(run, monkeypatch):
    observation = np.zeros(4, np.float32)
    _, state = run.act(observation)
    monkeypatch.setattr(type(run), "restore", lambda *_: pytest.fail("read again"))
    run.act(observation, state, reward=1.0)
    with pytest.raises(pytest.fail.Exception, match="read again"):
        run.act(observation, which="best")


# --- what is refused -----------------------------------------------------------------------------

ONE = r"accepted: float32\[4\], or float32\[N, 4\] of N environments"


@pytest.mark.parametrize(
    ("observation", "said"),
    [
        (np.zeros(2, np.float32), rf"observation is float32\[2\]; {ONE}"),
        (np.zeros((2, 3, 4), np.float32), rf"observation is float32\[2, 3, 4\]; {ONE}"),
        (np.zeros((0, 4), np.float32), rf"observation is float32\[0, 4\]; {ONE}"),
        (np.zeros(4, np.uint8), rf"observation is uint8\[4\]; {ONE}"),
        ({"image": np.zeros(4)}, "observation has image; accepted: a dict of observation"),
        ({}, "observation has no leaves; accepted: a dict of observation"),
    ],
)
def test_wrong_observations(observation, said):
    with pytest.raises(ValueError, match=f"^{said}") as error:
        player(CARTPOLE).act(observation, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lanes", "given", "said"),
    [
        (None, {}, r"reward is missing; give a number, what the last action earned \(where an ep"),
        (None, {"reward": float("nan")}, "reward is nan; give a number"),
        (None, {"reward": "1"}, "reward is "),
        (None, {"reward": [1.0]}, r"reward is float64\[1\]; give a number"),
        (None, {"reward": 1, "first": True}, "first is for batches; one environment begins with"),
        (None, {"reward": 1, "seed": 3}, "seed is 3, with a state; give it where state=None"),
        (None, {"reward": 1, "epsilon": 2}, r"epsilon is 2; accepted: 0 \.\. 1"),
        (2, {"reward": 1.0}, r"reward is float64\[\]; give 2 numbers"),
        (2, {"reward": [1.0, 0.0]}, r"first is missing; give bool\[2\]"),
        (2, {"reward": [1.0, 0.0], "first": [0, 1]}, r"first is int64\[2\]; give bool\[2\]"),
    ],
)
def test_what_a_state_needs_beside_it(lanes, given, said):
    act = player(CARTPOLE)
    observation = np.zeros((4,) if lanes is None else (lanes, 4), np.float32)
    _, state = act.act(observation, None)
    with pytest.raises(ValueError, match=f"^{said}"):
        act.act(observation, state, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epsilon": "0.1"}, r"epsilon is '0.1'; accepted: 0 \.\. 1"),
        ({"greedy": 1}, r"greedy is 1; accepted: True, False, or None"),
        ({"greedy": True, "epsilon": 0.1}, r"greedy=True and epsilon=0\.1 contradict; give one"),
        ({"greedy": False, "epsilon": 0}, r"greedy=False and epsilon=0 contradict; give one"),
        ({"greedy": False}, r"greedy is False, but R2D2 has no distribution .*; give epsilon="),
        ({"epsilon": np.array([0.1, 0.2])}, r"epsilon is array\(\[0.1, 0.2\]\); accepted"),
        ({"epsilon": float("nan")}, r"epsilon is nan; accepted: 0 \.\. 1"),
        ({"seed": 1.5}, "seed is 1.5; accepted: a whole number"),
        ({"seed": "3"}, "seed is '3'; accepted: a whole number"),
        ({"seed": 2**70}, f"seed is {2**70}; accepted: a whole number"),
    ],
)
def test_what_an_episode_cannot_begin_with(given, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        player(CARTPOLE).act(np.zeros(4, np.float32), None, **given)


def test_a_state_of_something_else():
    act, one, two = player(CARTPOLE), np.zeros(4, np.float32), np.zeros((2, 4), np.float32)
    _, state = act.act(one, None)
    with pytest.raises(ValueError, match=r"^state is of one unbatched environment, observation of"):
        act.act(two, state, reward=[0.0, 0.0], first=[False, False])
    with pytest.raises(ValueError, match=r"^state is of another run or checkpoint"):
        player(CARTPOLE).act(one, state, reward=0.0)
    with pytest.raises(ValueError, match=r"^state is dict; give what act returned, or None"):
        act.act(one, {}, reward=0.0)
    with pytest.raises(ValueError, match=r"^reward is given without a state"):
        act.act(one, None, reward=0.0)


def test_families_that_tell_nothing_are_taken_as_rlx_sees_them():
    class Own:
        def spec(self) -> Any:
            return CARTPOLE.spec()

    told = raw_spaces_of(Own(), CARTPOLE.spec())
    assert isinstance(told, RawSpaces)
    assert [leaf.source.shape for leaf in told.leaves] == [(2,)]
    assert (told.ignored, told.action_start) == ((), 0)


def test_the_first_action_of_gymnasium_is_told():
    class From5(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float64)
        action_space = gymnasium.spaces.Discrete(3, start=5)

    gymnasium.register("From5-v0", From5)
    family = dataclasses.replace(CARTPOLE, id="From5-v0", components=None, scale=None)
    assert family.raw_spaces().action_start == 5
