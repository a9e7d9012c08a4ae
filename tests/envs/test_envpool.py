"""The EnvPool adapter against EnvPool itself: one test per trap, and what the settings refuse."""

import threading
from collections import defaultdict
from pathlib import Path

import envpool
import numpy as np
import pytest
import yaml

from rlx.envs.envpool import EnvPool, EnvPoolLanes
from rlx.types import ArraySpec, BoxSpec, DiscreteSpec, MultiDiscreteSpec, Timestep

CONF = Path(__file__).parents[2] / "conf" / "env"
SETTINGS = {
    "observe": None,
    "components": None,
    "scale": None,
    "action_mask": None,
    "image": "auto",
    "max_episode_steps": None,
    "batch_size": None,
    "threads": 2,
    "options": {},
    "per_actor": {},
}
ATARI = {"noop_max": 30, "use_fire_reset": True, "episodic_life": False, "reward_clip": False}


def family(env_id: str, **settings) -> EnvPool:
    return EnvPool(id=env_id, **(SETTINGS | settings))


def from_yaml(name: str) -> EnvPool:
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert settings.pop("_target_") == "rlx.envs.envpool.EnvPool"
    return EnvPool(**settings)


def rule(lane: np.ndarray, t: np.ndarray, n: int) -> np.ndarray:
    """An action that depends on the lane and its own time alone: i32[n]."""
    return ((lane * 7919 + t * 104729 + t // 3) % 65521 % n).astype(np.int32)


def play(env: EnvPoolLanes, answers: int, flip_ignored: bool = False) -> dict[int, list[tuple]]:
    """lane -> rows of (observation, reward, terminated, truncated, first), by `rule`."""
    rows, times = defaultdict(list), np.zeros(env.lanes, np.int64)
    step, n = env.reset(), env.spec.action.n
    for _ in range(answers):
        names = sorted(step.observation)
        for i, lane in enumerate(step.lane.tolist()):
            observation = tuple(step.observation[k][i].tobytes() for k in names)
            flags = (step.terminated[i], step.truncated[i], step.first[i])
            rows[lane].append((observation, float(step.reward[i]), *map(bool, flags)))
        action = rule(step.lane, times[step.lane], n)
        times[step.lane] += 1
        if flip_ignored:
            ended = step.terminated | step.truncated
            action = np.where(ended, n - 1 - action, action).astype(np.int32)
        step = env.step(action, step.lane)
    return rows


class Spy:
    """A pool that remembers what it answered."""

    def __init__(self, pool, seen: list) -> None:
        self.async_reset, self._send = pool.async_reset, pool._send
        self._pool, self._seen = pool, seen

    def _recv(self):
        answer = self._pool._recv()
        self._seen.append(dict(zip(self._pool._state_keys, answer, strict=True)))
        return answer


def lanes_of(env: EnvPoolLanes) -> np.ndarray:
    return np.arange(env.lanes, dtype=np.int32)


# --- resets (traps 1, 2, 5) ----------------------------------------------------------------------


def test_a_row_after_an_end_is_a_reset_whose_action_is_ignored():
    runs = [
        play(family("CartPole-v1").make(lanes=3, seeds=[1, 2, 3]), 200, flip_ignored=flip)
        for flip in (False, True)
    ]
    assert runs[0] == runs[1]
    ends = 0
    for rows in runs[0].values():
        ended = True  # the very first row is a reset, too
        for _, reward, terminated, truncated, first in rows:
            assert first == ended
            assert not first or (reward == 0 and not terminated and not truncated)
            ended = terminated or truncated
            ends += ended
    assert ends > 20


def test_the_row_of_the_end_holds_the_true_last_observation():
    env = family("CartPole-v1").make(lanes=4, seeds=[1, 2, 3, 4])
    step, ends = env.reset(), 0
    for t in range(200):
        x, angle = step.observation["observation"][:, 0], step.observation["observation"][:, 2]
        outside = (abs(x) > 2.4) | (abs(angle) > 12 * np.pi / 180)
        np.testing.assert_array_equal(outside, step.terminated)
        ends += outside.sum()
        step = env.step(rule(step.lane, np.full(4, t), 2), step.lane)
    assert ends > 20


def test_episodes_count_real_env_steps_and_their_frames():
    options = ATARI | {"frame_skip": 3}
    env = family("Pong-v5", max_episode_steps=20, options=options).make(lanes=2, seeds=[1, 2])
    rows = play(env, 60)
    episodes = env.episodes()
    assert env.spec.frames_per_env_step == 3
    assert [(e.env_steps, e.frames) for e in episodes] == [(20, 60)] * 4
    assert env.episodes() == []
    assert sum(first for lane in rows.values() for *_, first in lane) == 6


def test_episode_returns_are_the_sums_of_the_rewards_of_their_lane():
    env = family("Pong-v5", options=ATARI, max_episode_steps=90).make(lanes=2, seeds=range(2))
    rows, sums = play(env, 280), defaultdict(list)
    for lane, stream in rows.items():
        total = 0.0
        for _, reward, terminated, truncated, _ in stream:
            total += reward
            if terminated or truncated:
                sums[lane].append(total)
                total = 0.0
    found = defaultdict(list)
    for episode in env.episodes():
        found[episode.lane].append(episode.return_)
    assert found == sums
    assert [len(returns) for returns in sums.values()] == [3, 3]
    assert all(r != 0 for returns in sums.values() for r in returns)


def test_a_second_reset_starts_every_lane_and_forgets_unfinished_episodes():
    env = family("CartPole-v1", max_episode_steps=6).make(lanes=2, seeds=[1, 2])
    play(env, 3)
    rows = play(env, 9)
    assert all(stream[0][-1] and not stream[1][-1] for stream in rows.values())
    assert [e.env_steps for e in env.episodes()] == [6, 6]


# --- ends (traps 3, 4, 6, 8) ---------------------------------------------------------------------


def test_a_time_limit_truncates_and_is_no_termination():
    env = family("CartPole-v1", max_episode_steps=5).make(lanes=2, seeds=[1, 2])
    for stream in play(env, 12).values():
        flags = [row[2:] for row in stream]
        episode = [(False, False, True)] + [(False, False, False)] * 4 + [(False, True, False)]
        assert flags == episode * 2


def play_until(env: EnvPoolLanes, end) -> tuple[int, Timestep]:
    """The first (env step, answer) for which `end(env step, answer)` holds, by `rule`."""
    step = env.reset()
    for t in range(1, 600):
        step = env.step(rule(step.lane, np.full(env.lanes, t), env.spec.action.n), step.lane)
        if end(t, step):
            return t, step
    raise AssertionError("never")


@pytest.mark.parametrize("episodic_life", [False, True])
def test_a_game_or_life_that_ends_exactly_at_the_limit_is_terminated(episodic_life):
    options = ATARI | {"use_fire_reset": False, "episodic_life": episodic_life}
    seeds = [3, 4]
    free = family("Breakout-v5", options=options).make(lanes=2, seeds=seeds)
    limit, end = play_until(free, lambda t, step: step.terminated.any())
    assert end.terminated.sum() == 1

    limited = family("Breakout-v5", options=options, max_episode_steps=limit)
    env = limited.make(lanes=2, seeds=seeds)
    pool, seen = env._pool, []
    env._pool = Spy(pool, seen)
    _, step = play_until(env, lambda t, step: t == limit)
    assert seen[-1]["trunc"].all()  # EnvPool says of both lanes: truncated
    np.testing.assert_array_equal(step.terminated, end.terminated)
    np.testing.assert_array_equal(step.truncated, ~end.terminated)
    assert [(e.lane, e.env_steps) for e in env.episodes()] == [(0, limit), (1, limit)]


def test_a_lost_life_ends_for_learning_but_episodes_are_whole_games():
    options = ATARI | {"noop_max": 1, "episodic_life": True}
    env = family("Breakout-v5", options=options).make(lanes=2, seeds=[1, 2])
    rows = play(env, 800)
    episodes = env.episodes()
    assert len(episodes) >= 4
    for lane, stream in rows.items():
        terminated = np.array([row[2] for row in stream])
        first = np.array([row[4] for row in stream])
        np.testing.assert_array_equal(first[1:], terminated[:-1])
        mine = [e for e in episodes if e.lane == lane]
        games = np.flatnonzero(terminated)[4::5]  # five lives
        assert len(games) == len(mine)
        assert [e.env_steps for e in mine] == np.diff(np.cumsum(~first)[games], prepend=0).tolist()
        assert min(e.env_steps for e in mine) > 50


def test_rewards_and_returns_are_raw_even_where_envpool_clips():
    def rewards(clip):
        options = ATARI | {"reward_clip": clip}
        family_ = family("Qbert-v5", max_episode_steps=70, options=options)
        env = family_.make(lanes=2, seeds=[1, 2])
        rows = play(env, 75)
        return [row[1] for stream in rows.values() for row in stream], env.episodes()

    assert rewards(True) == rewards(False)
    assert max(rewards(True)[0]) == 25.0


# --- actions and lanes (traps 9 to 13) -----------------------------------------------------------


def test_the_atari_settings_are_the_papers():
    atari = from_yaml("atari")
    assert atari.problems() == []
    spec = atari.spec()
    assert spec.action == DiscreteSpec(n=18)
    assert spec.observation == {"observation": ArraySpec(shape=(1, 84, 84), dtype="uint8")}
    assert spec.frames_per_env_step == 4
    config = atari.make(lanes=1, seeds=[0])._pool.config
    assert config["max_episode_steps"] * config["frame_skip"] == 108_000
    wanted = {
        "full_action_space": True,
        "use_fire_reset": False,
        "episodic_life": False,
        "repeat_action_probability": 0.0,
        "noop_max": 30,
        "stack_num": 1,
    }
    assert {name: config[name] for name in wanted} == wanted


def test_synchronous_answers_come_in_the_order_of_the_lanes_given():
    env = family("CartPole-v1").make(lanes=5, seeds=range(5))
    env.reset()
    for lanes in ([3, 1, 4], [0, 2], [4, 3, 2, 1, 0]):
        lane = np.array(lanes, np.int32)
        step = env.step(np.zeros(len(lanes), np.int32), lane)
        assert step.lane.tolist() == lanes
    twin = family("CartPole-v1").make(lanes=5, seeds=range(5))
    twin.reset()
    twin.step(np.zeros(5, np.int32), lanes_of(twin))
    expected = twin.step(np.zeros(5, np.int32), lanes_of(twin)).observation["observation"]
    np.testing.assert_array_equal(step.observation["observation"], expected[::-1])


@pytest.mark.parametrize(
    ("env_id", "answers", "settings"),
    [
        ("CartPole-v1", 400, {}),
        ("MiniGrid-MemoryS7-v0", 300, {"observe": ["image", "direction"]}),
        ("Pong-v5", 120, {"options": ATARI, "max_episode_steps": 15}),
    ],
)
def test_asynchronous_and_synchronous_lanes_live_the_same_lives(env_id, answers, settings):
    seeds = [11, 22, 33, 44, 55]
    all_at_once = play(family(env_id, **settings).make(lanes=5, seeds=seeds), answers)
    env = family(env_id, batch_size=2, **settings).make(lanes=5, seeds=seeds)
    some = play(env, answers)
    assert sorted(some) == [0, 1, 2, 3, 4]
    for lane, stream in some.items():
        shared = min(len(stream), len(all_at_once[lane]))
        assert shared > answers / 10
        assert stream[:shared] == all_at_once[lane][:shared]
    finished = sum(row[2] or row[3] for stream in some.values() for row in stream)
    assert len(env.episodes()) >= finished > 0


def test_lanes_that_do_not_wait_are_refused_and_nothing_changes():
    env = family("CartPole-v1").make(lanes=3, seeds=[1, 2, 3])
    zeros, lane = np.zeros(3, np.int32), lanes_of(env)
    with pytest.raises(ValueError, match=r"lanes \[0, 1, 2\] wait for no action; reset first"):
        env.step(zeros, lane)
    env.reset()
    bad = {
        "twice": np.array([0, 1, 1], np.int32),
        "accepted: 0 .. 2": np.array([0, 1, 3], np.int32),
        "lane has -1": np.array([0, 1, -1], np.int32),
        "give numpy int32": np.array([0, 1, 2]),
        "3 actions for 2 lanes": np.array([0, 1], np.int32),
    }
    for message, lanes in bad.items():
        with pytest.raises(ValueError, match=message):
            env.step(zeros, lanes)
    with pytest.raises(ValueError, match="0 actions for 0 lanes"):
        env.step(zeros[:0], lane[:0])
    assert env.step(zeros, lane).lane.tolist() == [0, 1, 2]


def test_asynchronous_calls_that_would_abort_or_wait_for_ever_are_refused():
    env = family("CartPole-v1", batch_size=3).make(lanes=4, seeds=range(4))
    step = env.reset()
    busy = np.setdiff1d(np.arange(4), step.lane).astype(np.int32)
    with pytest.raises(ValueError, match=rf"lanes \[{busy[0]}\] wait for no action"):
        env.step(np.zeros(4, np.int32), lanes_of(env))
    with pytest.raises(ValueError, match="1 busy: an answer takes 3"):
        env.step(np.zeros(1, np.int32), step.lane[:1])
    with pytest.raises(RuntimeError, match="make a new one"):
        env.reset()
    assert len(env.step(np.zeros(2, np.int32), step.lane[:2]).lane) == 3


def test_actions_out_of_bounds_or_of_another_type_are_refused():
    env = family("Pong-v5", options=ATARI).make(lanes=2, seeds=[1, 2])
    env.reset()
    lane = lanes_of(env)
    for value in (99, 6, -1):
        with pytest.raises(ValueError, match=r"accepted: 0 \.\. 5"):
            env.step(np.array([0, value], np.int32), lane)
    for action in (np.zeros(2, np.int64), np.zeros((2, 1), np.int32), [0, 0]):
        with pytest.raises(ValueError, match=r"give numpy int32\[n\]"):
            env.step(action, lane)
    assert env.step(np.array([0, 5], np.int32), lane).lane.tolist() == [0, 1]


def test_box_actions_have_specs_and_bounds():
    ant = from_yaml("mujoco")
    spec = ant.spec()
    assert spec.action == BoxSpec(shape=(8,), low=(-1.0,) * 8, high=(1.0,) * 8)
    env = ant.make(lanes=2, seeds=[1, 2])
    assert env.reset().observation["observation"].dtype == np.float32  # EnvPool gives float64
    lane, action = lanes_of(env), np.zeros((2, 8), np.float32)
    for value in (np.inf, np.nan):
        wrong = action.copy()
        wrong[1, 3] = value
        with pytest.raises(ValueError, match="not finite"):
            env.step(wrong, lane)
    with pytest.raises(ValueError, match=r"float64\[2, 8\]; give numpy float32\[n, 8\]"):
        env.step(action.astype(np.float64), lane)
    np.testing.assert_array_equal(env.step(action + 1, lane).lane, lane)
    car = family("CarRacing-v3").spec().action
    assert (car.low, car.high) == ((-1.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_box_actions_are_clipped_which_envpool_does_not():
    """Hopper's cost of control is that of the action it is given, though its motors are limited."""

    def rewards(env, scale, of):
        env.reset()
        action = np.full((1, 3), scale)
        return [of(env, action) for _ in range(4)]

    def own(env, action):
        return float(env.step(action)[1][0])

    def ours(env, action):
        return float(env.step(action.astype(np.float32), np.zeros(1, np.int32)).reward[0])

    hopper = family("Hopper-v5")
    raw = [rewards(hopper.open(lanes=1, seeds=[3]), scale, own) for scale in (1, 5)]
    assert not np.allclose(raw[0], raw[1], atol=0.01)
    for scale in (1, 5):
        env = hopper.make(lanes=1, seeds=[3])
        np.testing.assert_allclose(rewards(env, scale, ours), raw[0], rtol=1e-6)


def test_the_mask_of_actions_is_kept_as_it_is():
    snake = family("Snake-v1", observe="grid", action_mask="action_mask")
    assert snake.problems() == []
    spec = snake.spec()
    assert spec.action_mask == "action_mask"
    assert spec.observation["action_mask"] == ArraySpec(shape=(4,), dtype="bool")
    assert set(spec.observation) == {"grid", "action_mask"}
    mask = snake.make(lanes=3, seeds=[1, 2, 3]).reset().observation["action_mask"]
    assert (mask.dtype, mask.shape, mask.any()) == (bool, (3, 4), True)


def test_a_row_of_integers_is_several_choices():
    tetris = family("Tetris-v0")
    assert tetris.spec().action == MultiDiscreteSpec(counts=(4, 10))
    env = tetris.make(lanes=2, seeds=[1, 2])
    env.reset()
    step = env.step(np.array([[3, 9], [0, 0]], np.int32), lanes_of(env))
    assert step.observation["step_count"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"accepted: 0 \.\. 3, 0 \.\. 9"):
        env.step(np.array([[4, 0], [0, 0]], np.int32), lanes_of(env))
    with pytest.raises(ValueError, match=r"give numpy int32\[n, 2\]"):
        env.step(np.zeros(2, np.int32), lanes_of(env))


def test_two_threads_at_once_are_refused():
    env = family("CartPole-v1").make(lanes=1, seeds=[1])
    entered, release, pool = threading.Event(), threading.Event(), env._pool

    class Slow:
        def async_reset(self):
            entered.set()
            release.wait(10)
            pool.async_reset()

        _recv = staticmethod(pool._recv)

    env._pool = Slow()
    thread = threading.Thread(target=env.reset)
    thread.start()
    assert entered.wait(10)
    try:
        with pytest.raises(RuntimeError, match="two threads"):
            env.reset()
    finally:
        release.set()
        thread.join(10)


# --- seeds and arrays (traps 14, 16) -------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Breakout-v5", "FrozenLake-v1", "Catch-v0"])
def test_a_lanes_stream_is_a_function_of_its_seed(env_id):
    def play_seeds(*seeds):
        return play(family(env_id).make(lanes=len(seeds), seeds=seeds), 12)

    # The same lane, so the same actions: only the seeds differ. Not every pair does: an Atari game
    # without sticky actions knows its seed only by the number of no-ops at its start.
    a, again, *others = [play_seeds(5, seed) for seed in (6, 6, 8, 9)]
    assert a == again
    assert all(a[0] == b[0] for b in others)
    assert any(a[1] != b[1] for b in others)


def test_seeds_are_one_int32_per_lane():
    with pytest.raises(ValueError, match="1 seeds for lanes=2"):
        family("CartPole-v1").make(lanes=2, seeds=[1])
    with pytest.raises(ValueError, match="int32"):
        family("CartPole-v1").make(lanes=1, seeds=[2**31])


def test_answers_keep_their_contents_and_hold_only_what_was_selected():
    env = family("CartPole-v1", components=[0, 2]).make(lanes=2, seeds=[1, 2])
    steps = [env.reset()]
    copies = [steps[0].observation["observation"].copy()]
    for _ in range(50):
        steps.append(env.step(np.ones(2, np.int32), steps[-1].lane))
        copies.append(steps[-1].observation["observation"].copy())
    for step, copy in zip(steps, copies, strict=True):
        np.testing.assert_array_equal(step.observation["observation"], copy)
        assert step.observation["observation"].base is None  # no view into the whole batch


# --- frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["Pong-v5", "Breakout-v5"])
def test_ten_thousand_stacked_single_frames_are_envpools_own_stacks(env_id):
    lanes, limit, seeds = 8, 60, list(range(8))
    env = family(env_id, options=ATARI, max_episode_steps=limit).make(lanes=lanes, seeds=seeds)
    theirs = envpool.make_gymnasium(
        env_id, num_envs=lanes, seed=seeds, stack_num=4, max_episode_steps=limit, **ATARI
    )
    step, (expected, _) = env.reset(), theirs.reset()
    stack, ids = np.zeros((lanes, 4, 84, 84), np.uint8), np.arange(lanes, dtype=np.int32)
    rng = np.random.default_rng(0)
    for _ in range(640):
        frame, first = step.observation["observation"], step.first[:, None, None, None]
        stack = np.where(first, frame, np.concatenate([stack[:, 1:], frame], axis=1))
        np.testing.assert_array_equal(stack, expected)
        action = rng.integers(0, env.spec.action.n, lanes).astype(np.int32)
        step, expected = env.step(action, ids), theirs.step(action, ids)[0]
    assert len(env.episodes()) >= 10 * lanes


@pytest.mark.parametrize(
    ("env_id", "turn"), [("CartPole-v1", 1), ("MiniGrid-MemoryS7-v0", 0), ("Pong-v5", 5)]
)
def test_pictures_are_rgb_and_change_nothing(env_id, turn):
    env = family(env_id).make(lanes=2, seeds=[1, 2], render=True)
    quiet = family(env_id).make(lanes=2, seeds=[1, 2])
    step, other = env.reset(), quiet.reset()
    pictures = []
    for _ in range(19):
        pictures.append(env.render(1))
        action = np.full(2, turn, np.int32)
        step, other = env.step(action, step.lane), quiet.step(action, other.lane)
        for name, leaf in step.observation.items():
            np.testing.assert_array_equal(leaf, other.observation[name])
    assert pictures[0].dtype == np.uint8
    assert pictures[0].ndim == 3
    assert pictures[0].shape[2] == 3
    assert not np.array_equal(pictures[0], pictures[-1])
    with pytest.raises(ValueError, match="render=True"):
        quiet.render(0)
    with pytest.raises(ValueError, match="lane=2 does not exist"):
        env.render(2)


def test_an_id_without_pictures_says_so():
    with pytest.raises(ValueError, match=r"'Catch-v0' cannot be rendered here .*not implemented"):
        family("Catch-v0").make(lanes=1, seeds=[0], render=True)


# --- observations and settings -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "observe", "leaves"),
    [
        ("MiniGrid-MemoryS7-v0", "image", {"image": ((3, 7, 7), "uint8")}),
        (
            "MiniGrid-MemoryS7-v0",
            None,
            {
                "direction": ((), "int32"),
                "image": ((3, 7, 7), "uint8"),
                "mission": ((96,), "uint8"),
            },
        ),
        ("FrozenLake-v1", None, {"observation": ((), "int32")}),
        ("Catch-v0", None, {"observation": ((10, 5), "float32")}),
        ("FetchReach-v4", "desired_goal", {"desired_goal": ((3,), "float32")}),
        ("FrankaKitchen-v1", "desired_goal/top burner", {"desired_goal/top burner": None}),
        ("AlohaHandOver-v1", None, {"observation": None}),
    ],
)
def test_specs_are_those_of_the_arrays(env_id, observe, leaves):
    env = family(env_id, observe=observe).make(lanes=3, seeds=range(3))
    step = env.reset()
    assert list(env.spec.observation) == list(step.observation) == list(leaves)
    for name, given in leaves.items():
        spec, array = env.spec.observation[name], step.observation[name]
        assert array.shape == (3, *spec.shape)
        assert array.dtype == spec.dtype
        assert given is None or (spec.shape, spec.dtype) == given


def test_scale_multiplies_what_was_selected():
    plain = family("CartPole-v1", components=[2, 0]).make(lanes=2, seeds=[1, 2])
    scaled = family("CartPole-v1", components=[2, 0], scale=[10.0, 0.5]).make(lanes=2, seeds=[1, 2])
    expected = plain.reset().observation["observation"] * np.float32([10.0, 0.5])
    np.testing.assert_array_equal(scaled.reset().observation["observation"], expected)
    assert expected.dtype == np.float32


def test_components_select_from_the_last_axis():
    whole = family("CartPole-v1").make(lanes=2, seeds=[1, 2]).reset().observation["observation"]
    memory = from_yaml("cartpole_memory")
    assert memory.spec().observation["observation"].shape == (2,)
    part = memory.make(lanes=2, seeds=[1, 2]).reset().observation["observation"]
    np.testing.assert_array_equal(part, whole[:, [0, 2]] * np.float32(memory.scale))


@pytest.mark.parametrize(
    ("env_id", "settings", "message"),
    [
        ("Pon-v5", {}, "env.id='Pon-v5' is no EnvPool environment; nearest: Pong-v5"),
        ("cartpole-v1", {}, "nearest: CartPole-v1"),
        ("Chess-v1", {}, "has 2 players"),
        ("CartPole-v1", {"observe": "image"}, "env.observe='image' is no leaf"),
        ("Snake-v1", {"action_mask": "mask"}, "env.action_mask='mask' is no leaf"),
        ("Tetris-v0", {"action_mask": "action_mask"}, "is bool[4, 10]; accepted: a leaf of bools"),
        ("CartPole-v1", {"components": [4]}, "env.components=[4] must name elements 0 .. 3"),
        ("Catch-v0", {"components": [0]}, "needs one selected 1-D leaf"),
        ("CartPole-v1", {"scale": [1.0]}, "needs one selected float leaf of 1 elements"),
        ("CartPole-v1", {"batch_size": 0}, "env.batch_size=0; accepted: 1 .."),
        ("Pong-v5", {"options": {"stack_num": 4}}, "frames are single here; set network.stack"),
        ("Ant-v5", {"options": {"frame_stack": 2}}, "frames are single here"),
        ("Pong-v5", {"options": {"noop": 30}}, "is no option of Pong-v5; nearest: noop_max"),
        ("Pong-v5", {"options": {"frame_skip": "4"}}, "is of type str; accepted: int"),
        ("Pong-v5", {"options": {"episodic_life": 1}}, "is of type int; accepted: bool"),
        ("Pong-v5", {"options": {"num_envs": 8}}, "lanes come from acting.envs_per_actor"),
        ("Pong-v5", {"options": {"seed": 8}}, "set the root key seed"),
    ],
)
def test_wrong_settings_are_one_line_each(env_id, settings, message):
    wrong = family(env_id, **settings)
    (problem,) = wrong.problems()
    assert message in problem
    assert "\n" not in problem
    with pytest.raises(ValueError, match="env"):
        wrong.make(lanes=1, seeds=[0])


def test_unknown_ids_raise_and_batches_fit_the_lanes():
    with pytest.raises(ValueError, match="nearest: Breakout-v5"):
        family("Breakot-v5").spec()
    with pytest.raises(ValueError, match=r"env.batch_size=4; accepted: 1 \.\. 2 \(lanes\)"):
        family("CartPole-v1", batch_size=4).make(lanes=2, seeds=[1, 2])
    assert family("Pong-v5", options={"stack_num": 1}).problems() == []


def test_two_problems_are_two_lines():
    options = {"noop": 30, "stack_num": 4}
    assert len(family("Pong-v5", options=options, batch_size=0).problems()) == 3


@pytest.mark.parametrize(
    "name", ["atari", "cartpole", "cartpole_memory", "catch", "minigrid_memory", "mujoco"]
)
def test_every_yaml_is_accepted(name):
    assert from_yaml(name).problems(lanes=4) == []
