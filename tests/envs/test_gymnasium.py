"""The gymnasium adapter: the same stream as EnvPool's, from environments written here."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium import spaces

from rlx.envs.envpool import EnvPool
from rlx.envs.gymnasium import Gymnasium
from rlx.types import ArraySpec, BoxSpec, DiscreteSpec, MultiDiscreteSpec

CONF = Path(__file__).parents[2] / "conf" / "env"
SETTINGS = {
    "kwargs": {},
    "vector": "sync",
    "observe": None,
    "components": None,
    "scale": None,
    "action_mask": None,
    "image": "auto",
    "wrappers": [],
    "frames_per_env_step": None,
    "max_episode_steps": None,
    "restarts": 0,
    "per_actor": {},
}


class Counting(gymnasium.Env):
    """Tells the time and the last action; ends after `length` env steps; rewards are the time."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012
    action_space = spaces.Discrete(3, start=5)
    observation_space = spaces.Dict(
        {
            "time": spaces.Discrete(1000),
            "body": spaces.Dict({"last action": spaces.Box(-1, 9, (2,), np.float64)}),
            "seen": spaces.MultiBinary(3),
        }
    )

    def __init__(self, length=4, render_mode=None):
        self.length, self.render_mode = length, render_mode

    def observe(self, action):
        body = {"last action": np.array([action, action], np.float64)}
        return {"time": self.time, "body": body, "seen": np.ones(3, np.int8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(-1), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        ended = self.time == self.length
        return self.observe(action), float(self.time), ended, False, {}

    def render(self):
        return np.full((4, 6, 3), self.time, np.uint8)


class Silent(Counting):
    """Draws nothing, takes a box."""

    metadata = {"render_modes": []}  # noqa: RUF012
    action_space = spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 2.0]), dtype=np.float64)

    def observe(self, action):
        return super().observe(float(np.sum(action)))


class Switching(Counting):
    """Takes two bits."""

    action_space = spaces.MultiBinary(2)

    def observe(self, action):
        return super().observe(action if np.ndim(action) == 0 else 10 * action[0] + action[1])


class Odd(Counting):
    """Takes what rlx does not."""

    def __init__(self, space="tuple"):
        super().__init__()
        self.action_space = {
            "tuple": spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)]),
            "dict": spaces.Dict({"a": spaces.Discrete(2)}),
            "integers": spaces.Box(0, 5, (2,), np.int64),
            "rows": spaces.MultiDiscrete([[2, 2], [3, 3]]),
            "bits": spaces.MultiBinary((2, 2)),
            "nothing": spaces.Box(0, 1, (0,)),
        }[space]


class Blind(Counting):
    """Shows nothing."""

    observation_space = spaces.Dict({})


ENTRIES = {
    "Blind": Blind,
    "Counting": Counting,
    "Silent": Silent,
    "Switching": Switching,
    "Odd": Odd,
}
for _name, _entry in ENTRIES.items():
    gymnasium.register(f"rlx-test/{_name}-v0", _entry)


def family(env_id: str, **settings) -> Gymnasium:
    return Gymnasium(id=env_id, **(SETTINGS | settings))


def counting(**settings) -> Gymnasium:
    return family("rlx-test/Counting-v0", **settings)


def play(env, steps, flip_ignored=False):
    """Rows [t, lane] of (observation, reward, terminated, truncated, first)."""
    step, n = env.reset(), env.spec.action.n
    rows = []
    for t in range(steps):
        leaf = step.observation["observation"]
        flags = zip(step.terminated, step.truncated, step.first, strict=True)
        values = zip(leaf, step.reward, flags, strict=True)
        rows.append([(o.tobytes(), float(r), tuple(map(bool, f))) for o, r, f in values])
        action = ((t // 3 + step.lane) % n).astype(np.int32)
        if flip_ignored:
            ended = step.terminated | step.truncated
            action = np.where(ended, n - 1 - action, action).astype(np.int32)
        step = env.step(action, step.lane)
    return rows


POOL = {
    "observe": None,
    "components": None,
    "scale": None,
    "action_mask": None,
    "image": "auto",
    "batch_size": None,
    "threads": 1,
    "options": {},
    "per_actor": {},
}


@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize(
    "make",
    [
        lambda limit: family("CartPole-v1", max_episode_steps=limit),
        lambda limit: EnvPool(id="CartPole-v1", max_episode_steps=limit, **POOL),
    ],
    ids=["gymnasium", "envpool"],
)
def test_both_families_give_the_same_kind_of_stream(make, limit):
    env = make(limit).make(lanes=3, seeds=[1, 2, 3])
    rows = play(env, 150)
    assert rows == play(make(limit).make(lanes=3, seeds=[1, 2, 3]), 150, flip_ignored=True)
    lengths, kinds = [], set()
    for lane in range(3):
        ended, length = True, 0
        for _, reward, (terminated, truncated, first) in (row[lane] for row in rows):
            assert first == ended
            assert not (terminated and truncated)
            assert reward == (0 if first else 1)
            length = 0 if first else length + 1
            ended = terminated or truncated
            if ended:
                assert truncated == (length == limit)
                lengths.append(length)
                kinds.add(truncated)
    assert sorted(e.env_steps for e in env.episodes()) == sorted(lengths)
    assert kinds == ({True} if limit else {False})


def test_dicts_are_flattened_narrowed_and_selected():
    spec = counting().spec()
    assert spec.observation == {
        "body/last action": ArraySpec(shape=(2,), dtype="float32"),
        "seen": ArraySpec(shape=(3,), dtype="int8"),
        "time": ArraySpec(shape=(), dtype="int32"),
    }
    assert (spec.action, spec.frames_per_env_step) == (DiscreteSpec(n=3), 1)
    step = counting().make(lanes=2, seeds=[1, 2]).reset()
    for name, leaf in spec.observation.items():
        assert step.observation[name].shape == (2, *leaf.shape)
        assert step.observation[name].dtype == leaf.dtype
    part = counting(observe="body/last action", components=[1])
    assert part.spec().observation == {"body/last action": ArraySpec(shape=(1,), dtype="float32")}
    with pytest.raises(ValueError, match=r"env\.observe='body' is no leaf"):
        counting(observe="body").spec()


def test_rows_come_in_the_order_of_the_lanes_and_actions_reach_theirs():
    env = counting().make(lanes=3, seeds=[1, 2, 3])
    env.reset()
    lane = np.array([2, 0, 1], np.int32)
    step = env.step(np.array([0, 1, 2], np.int32), lane)
    np.testing.assert_array_equal(step.lane, lane)
    actions = step.observation["body/last action"][:, 0]
    np.testing.assert_array_equal(actions, [5, 6, 7])  # this environment counts from 5
    assert step.reward.dtype == np.float32


def test_all_lanes_act_together_within_bounds():
    env = counting().make(lanes=2, seeds=[1, 2])
    lane = np.array([0, 1], np.int32)
    with pytest.raises(ValueError, match="reset first"):
        env.step(np.zeros(2, np.int32), lane)
    env.reset()
    with pytest.raises(ValueError, match="an answer takes 2"):
        env.step(np.zeros(1, np.int32), lane[:1])
    with pytest.raises(ValueError, match=r"accepted: 0 \.\. 2"):
        env.step(np.array([0, 5], np.int32), lane)
    assert env.step(np.zeros(2, np.int32), lane).reward.tolist() == [1, 1]


def test_an_end_exactly_at_the_limit_is_terminated():
    env = counting(kwargs={"length": 3}, max_episode_steps=3).make(lanes=1, seeds=[1])
    step, lane = env.reset(), np.zeros(1, np.int32)
    for _ in range(3):
        step = env.step(lane, lane)
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([True], [False])
    (episode,) = env.episodes()
    assert (episode.return_, episode.env_steps, episode.frames) == (6.0, 3, 3)


def test_an_environment_that_shows_nothing_is_refused():
    with pytest.raises(ValueError, match="observation is empty; rlx needs at least one leaf"):
        family("rlx-test/Blind-v0").spec()


def test_box_actions_have_specs_and_bounds():
    silent = family("rlx-test/Silent-v0")
    assert silent.spec().action == BoxSpec(shape=(2,), low=(-1.0, 0.0), high=(1.0, 2.0))
    env = silent.make(lanes=2, seeds=[1, 2])
    env.reset()
    lane = np.array([1, 0], np.int32)
    step = env.step(np.array([[0.5, 2.0], [-1, 0]], np.float32), lane)
    assert step.observation["body/last action"][:, 0].tolist() == [2.5, -1.0]
    step = env.step(np.array([[-7, 1], [0.1, 9]], np.float32), lane)  # clipped, each to its own
    seen = step.observation["body/last action"][:, 0]
    np.testing.assert_array_equal(seen, np.float32([0.0, 2.1]))
    for odd in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            env.step(np.array([[0, 0], [odd, 0]], np.float32), lane)
    with pytest.raises(ValueError, match=r"float32\[2, 3\]; give numpy float32\[n, 2\]"):
        env.step(np.zeros((2, 3), np.float32), lane)


def test_a_bound_is_that_of_the_environments_own_dtype():
    class Narrow(Counting):
        action_space = spaces.Box(-0.1, 0.1, (1,), np.float64)

        def observe(self, action):
            return super().observe(float(np.sum(action)))

    gymnasium.register("rlx-test/Narrow-v0", Narrow)
    env = family("rlx-test/Narrow-v0").make(lanes=1, seeds=[1])
    env.reset()
    assert float(np.float32(0.1)) > 0.1  # its own check would refuse that
    env.step(np.array([[0.1]], np.float32), np.zeros(1, np.int32))


@pytest.mark.parametrize("vector", ["sync", "async"])
def test_several_choices_at_once_have_counts_and_starts(vector):
    choices = family("tests.worlds:rlx-test/Choices-v0", vector=vector)
    assert choices.spec().action == MultiDiscreteSpec(counts=(4, 2))
    assert choices.raw_spaces().action_start == (3, 0)
    env = choices.make(lanes=2, seeds=[1, 2])
    shown = env.reset().observation["observation"]
    lane = np.array([1, 0], np.int32)
    right = np.stack([shown[:, :4].argmax(1), shown[:, 4:].argmax(1)], axis=1)[lane]
    right[1, 1] = 1 - right[1, 1]  # in lane 0, the second choice
    step = env.step(right.astype(np.int32), lane)
    assert step.reward.tolist() == [1.0, 0.5]
    for wrong in ([[0, 1], [4, 0]], [[0, 2], [0, 0]], [[0, -1], [0, 0]]):
        with pytest.raises(ValueError, match=r"accepted: 0 \.\. 3, 0 \.\. 1$"):
            env.step(np.array(wrong, np.int32), lane)
    with pytest.raises(ValueError, match=r"int32\[2\]; give numpy int32\[n, 2\]"):
        env.step(np.zeros(2, np.int32), lane)
    env.close()


def test_bits_are_choices_of_two():
    switching = family("rlx-test/Switching-v0")
    assert switching.spec().action == MultiDiscreteSpec(counts=(2, 2))
    env = switching.make(lanes=1, seeds=[1])
    env.reset()
    step = env.step(np.array([[1, 0]], np.int32), np.zeros(1, np.int32))
    assert step.observation["body/last action"].tolist() == [[10.0, 10.0]]


def test_a_second_reset_starts_again_with_other_episodes():
    env = family("CartPole-v1").make(lanes=1, seeds=[1])
    a, b = env.reset(), env.reset()
    assert b.first.all()
    assert not np.array_equal(a.observation["observation"], b.observation["observation"])


def test_a_lanes_stream_is_a_function_of_its_seed():
    def stream(*seeds):
        return play(family("CartPole-v1").make(lanes=2, seeds=seeds), 60)

    a, b, c = stream(5, 6), stream(5, 6), stream(5, 7)
    assert a == b
    assert [row[0] for row in a] == [row[0] for row in c]
    assert [row[1] for row in a] != [row[1] for row in c]


def test_a_process_per_lane_gives_the_same_stream():
    streams = []
    for vector in ("sync", "async"):
        env = family("CartPole-v1", vector=vector, max_episode_steps=9).make(lanes=2, seeds=[1, 2])
        streams.append(play(env, 40))
        env.close()
    assert streams[0] == streams[1]


def test_pictures_come_from_the_lane_asked_for():
    env = counting().make(lanes=2, seeds=[1, 2], render=True)
    env.reset()
    env.step(np.zeros(2, np.int32), np.arange(2, dtype=np.int32))
    picture = env.render(1)
    assert (picture.shape, picture.dtype, int(picture[0, 0, 0])) == ((4, 6, 3), np.uint8, 1)
    with pytest.raises(ValueError, match="lane=2 does not exist"):
        env.render(2)
    with pytest.raises(ValueError, match="render=True"):
        counting().make(lanes=1, seeds=[1]).render(0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_id_without_pictures_says_so():
    env = family("rlx-test/Silent-v0", kwargs={"length": 2}).make(lanes=1, seeds=[1], render=True)
    env.reset()
    env._vector.envs[0].unwrapped.render = lambda: None
    with pytest.raises(ValueError, match="Silent-v0' draws"):
        env.render(0)


@pytest.mark.parametrize(
    ("env_id", "settings", "message"),
    [
        ("CartPol-v1", {}, "is not registered with gymnasium; nearest: CartPole-v"),
        ("no_such_package:Env-v0", {}, "install the package that registers 'Env-v0'"),
        ("CartPole-v1", {"vector": "vector_entry_point"}, "accepted: sync, async"),
        ("CartPole-v1", {"kwargs": {"max_episode_steps": 3}}, "set env.max_episode_steps"),
        ("CartPole-v1", {"kwargs": {"autoreset_mode": "SameStep"}}, "always NEXT_STEP"),
    ],
)
def test_wrong_settings_are_one_line_each(env_id, settings, message):
    wrong = family(env_id, **settings)
    (problem,) = wrong.problems()
    assert message in problem
    assert "\n" not in problem
    with pytest.raises(ValueError, match="env"):
        wrong.spec()


ACCEPTED = "accepted: Discrete, MultiDiscrete and MultiBinary of one axis, and Box of floats"


@pytest.mark.parametrize(
    ("env_id", "settings", "message"),
    [
        ("rlx-test/Odd-v0", {}, f"takes Tuple.*{ACCEPTED}"),
        ("rlx-test/Odd-v0", {"kwargs": {"space": "dict"}}, f"takes Dict.*{ACCEPTED}"),
        ("rlx-test/Odd-v0", {"kwargs": {"space": "integers"}}, f"takes Box.*{ACCEPTED}"),
        ("rlx-test/Odd-v0", {"kwargs": {"space": "rows"}}, f"takes MultiDiscrete.*{ACCEPTED}"),
        ("rlx-test/Odd-v0", {"kwargs": {"space": "bits"}}, f"takes MultiBinary.*{ACCEPTED}"),
        ("rlx-test/Odd-v0", {"kwargs": {"space": "nothing"}}, r"of shape \[0\] has no elements"),
        ("rlx-test/Counting-v0", {"kwargs": {"size": 2}}, "unexpected keyword argument 'size'"),
    ],
)
def test_what_only_the_environment_can_tell_is_a_clear_line(env_id, settings, message):
    with pytest.raises(ValueError, match=message):
        family(env_id, **settings).make(lanes=1, seeds=[1])


MASKED = "tests.worlds:rlx-test/Masked-v0"


def test_the_mask_of_actions_is_a_leaf_that_comes_with_the_observed_ones():
    spec = family(MASKED, action_mask="action_mask").spec()
    assert spec.action_mask == "action_mask"
    mask = ArraySpec(shape=(5,), dtype="int8")
    assert spec.observation == {
        "sight": ArraySpec(shape=(5,), dtype="float32"),
        "action_mask": mask,
    }
    # What is said of observations is not said of the mask.
    part = family(
        MASKED, action_mask="action_mask", observe="sight", components=[0, 1], scale=[2.0, 3.0]
    )
    found = part.spec().observation
    assert found == {"sight": ArraySpec(shape=(2,), dtype="float32"), "action_mask": mask}
    seen = part.make(lanes=2, seeds=[1, 2]).reset().observation["action_mask"]
    assert set(np.unique(seen)) == {0, 1}
    assert family(MASKED).spec().action_mask is None


@pytest.mark.parametrize(
    ("env_id", "settings", "message"),
    [
        (MASKED, {"action_mask": "mask"}, "env.action_mask='mask' is no leaf of.*action_mask, si"),
        (MASKED, {"action_mask": "sight"}, r"'sight' is float32\[5\]; accepted: .* integers \[5\]"),
        (
            MASKED,
            {"action_mask": "action_mask", "observe": ["action_mask"]},
            r"env.observe=\['action_mask'\] selects nothing beside the mask 'action_mask'",
        ),
        (
            "rlx-test/Counting-v0",
            {"action_mask": "body/last action"},
            r"is float32\[2\]; accepted: a leaf of bools or integers \[3\]",
        ),
        ("rlx-test/Counting-v0", {"action_mask": "time"}, r"is int32\[\]; accepted"),
        ("rlx-test/Silent-v0", {"action_mask": "seen"}, "has no choices to forbid; give null"),
    ],
)
def test_what_is_no_mask_is_refused_in_one_line(env_id, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        family(env_id, **settings).make(lanes=1, seeds=[1])
    assert "\n" not in str(error.value)


def test_a_mask_of_several_choices_has_them_side_by_side():
    class Both(Counting):
        action_space = spaces.MultiDiscrete([2, 1])

        def observe(self, action):
            return super().observe(float(np.sum(action)))

    gymnasium.register("rlx-test/Both-v0", Both)
    assert family("rlx-test/Both-v0", action_mask="seen").spec().action_mask == "seen"


def test_an_action_space_is_refused_in_one_line():
    with pytest.raises(ValueError, match="takes") as error:
        family("rlx-test/Odd-v0", kwargs={"space": "rows"}).spec()
    assert "\n" not in str(error.value)


def test_seeds_are_one_int32_per_lane():
    with pytest.raises(ValueError, match="1 seeds for lanes=2"):
        counting().make(lanes=2, seeds=[1])


def test_the_yaml_is_accepted():
    settings = yaml.safe_load((CONF / "gymnasium.yaml").read_text())
    assert settings.pop("_target_") == "rlx.envs.gymnasium.Gymnasium"
    assert Gymnasium(**settings).problems() == []


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("rlx/Unlucky-v0", "'rlx/Unlucky-v0' does not work here: no display$"),
        (":CartPole-v1", "':CartPole-v1'"),
    ],
)
def test_whatever_a_constructor_or_a_module_name_raises_is_one_line(env_id, message):
    def unlucky():
        raise RuntimeError("no display\nat all")

    gymnasium.register("rlx/Unlucky-v0", unlucky)
    with pytest.raises(ValueError, match=message):
        Gymnasium(id=env_id, **SETTINGS).spec()
