"""`env.wrappers`: what the learner sees, what is reported, and what is refused before a run."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import rlx
from rlx.config import targets
from rlx.envs.gymnasium import Gymnasium
from rlx.envs.wrappers import DelayedEnding, ResizeImage
from rlx.problems import ConfigError
from rlx.types import Categories
from tests.conftest import SMALL
from tests.envs.test_gymnasium import family

LIVES = "tests.envs.wrapped:rlx-wrapped/Lives-v0"
HERE = "tests.envs.wrapped"
OF_GYMNASIUM = "gymnasium.wrappers"
CLIP = {"_target_": f"{OF_GYMNASIUM}.ClipReward", "min_reward": -1.0, "max_reward": 1.0}
SKIP = {"_target_": f"{OF_GYMNASIUM}.MaxAndSkipObservation", "skip": 5}
LIFE = {"_target_": f"{HERE}.LifeIsAnEpisode"}
DELAY = {"_target_": "rlx.envs.wrappers.DelayedEnding", "delay_env_steps": 3}
VECTORS = ["sync", "async"]
# Of the game: its reward and its length.
GAME = (sum(10.0 * n for n in range(1, 13)), 12)


@pytest.fixture(autouse=True)
def _tests_are_allowed(monkeypatch):
    monkeypatch.setattr(targets, "_allowed", {"rlx.", "tests."})


def lives(*wrappers: dict[str, Any], **settings: Any) -> Gymnasium:
    return family(LIVES, wrappers=list(wrappers), **settings)


def played(made: Gymnasium, env_steps: int, lanes: int = 2) -> tuple[list, list]:
    """(the answers of lane 1, the reset's first; its episodes as (return, env steps, frames))."""
    env = made.make(lanes=lanes, seeds=list(range(lanes)))
    answers, episodes = [env.reset()], []
    for _ in range(env_steps):
        answers.append(env.step(np.zeros(lanes, np.int32), answers[-1].lane))
        episodes += [(e.return_, e.env_steps, e.frames) for e in env.episodes() if e.lane == 1]
    env.close()
    return answers, episodes


def of_lane(answers: list, name: str) -> list:
    return [getattr(answer, name)[1].item() for answer in answers]


def shown(answers: list, column: int) -> list[float]:
    return [answer.observation["observation"][1, column].item() for answer in answers]


# --- what is reported ----------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS)
def test_the_learner_sees_wrapped_rewards_and_returns_are_the_true_ones(vector):
    answers, episodes = played(lives(CLIP, vector=vector), 27)
    assert of_lane(answers, "reward") == ([0.0] + [1.0] * 12) * 2 + [0.0, 1.0]
    assert episodes == [(*GAME, 12)] * 2


@pytest.mark.parametrize("vector", VECTORS)
def test_a_life_is_an_episode_of_the_learner_and_the_game_is_reported(vector):
    answers, episodes = played(lives(LIFE, CLIP, vector=vector), 24)
    # Four steps of each life; the first of the second and third life is made by the reset.
    assert shown(answers, 1)[:13] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    ends = [t for t, ended in enumerate(of_lane(answers, "terminated")) if ended]
    assert ends == [4, 8, 12, 17, 21]
    firsts = [t for t, first in enumerate(of_lane(answers, "first")) if first]
    assert firsts == [0, 5, 9, 13, 18, 22]
    # Ten of the game's twelve steps are decisions of the agent.
    assert episodes == [(GAME[0], 10, 10)]
    # Nor are the env steps in which nothing but a delay went on.
    assert played(lives(LIFE, DELAY, vector=vector), 24)[1] == [(GAME[0], 10, 10)]


@pytest.mark.parametrize("vector", VECTORS)
def test_delayed_ends_come_later_and_returns_and_lengths_are_the_true_ones(vector):
    answers, episodes = played(lives(DELAY, vector=vector), 31)
    game = [10.0 * n for n in range(1, 12)] + [0.0, 0.0, 0.0, 120.0]
    assert of_lane(answers, "reward") == [0.0, *game, 0.0, *game]
    assert of_lane(answers, "terminated") == ([False] * 15 + [True]) * 2
    assert shown(answers, 1)[:17] == [*range(13), 12, 12, 12, 0]
    assert episodes == [(*GAME, 12)] * 2


@pytest.mark.parametrize("vector", VECTORS)
def test_an_episode_ended_from_outside_while_its_end_is_delayed_counts_once(vector):
    env = lives(DELAY, vector=vector).make(lanes=2, seeds=[0, 1])
    answer = env.reset()
    for _ in range(13):  # 12 of the game, one of the delay
        answer = env.step(np.zeros(2, np.int32), answer.lane)
    env.end(np.array([1], np.int32))
    assert [(e.lane, e.return_, e.env_steps) for e in env.episodes()] == [(0, *GAME), (1, *GAME)]
    env.close()


def test_delays_of_nothing_and_of_truncations():
    env = DelayedEnding(gymnasium.make(LIVES, max_episode_steps=2), delay_env_steps=0)
    env.reset()
    assert [env.step(0)[1:4], env.step(0)[1:4]] == [(10.0, False, False), (20.0, False, True)]
    env = DelayedEnding(gymnasium.make(LIVES, max_episode_steps=2), delay_env_steps=1)
    for _ in range(2):  # a reset ends a delay
        env.reset()
        assert [env.step(0)[1:4], env.step(0)[1:4]] == [(10.0, False, False), (0.0, False, False)]
    assert env.step(0)[1:4] == (20.0, False, True)
    with pytest.raises(ValueError, match="delay_env_steps=-1; accepted: an int >= 0"):
        DelayedEnding(env, delay_env_steps=-1)


@pytest.mark.parametrize("vector", VECTORS)
def test_skipped_steps_are_frames_and_limits_count_env_steps(vector):
    made = lives(SKIP, vector=vector)
    assert made.spec().frames_per_env_step == 5
    answers, episodes = played(made, 8)
    assert of_lane(answers, "reward") == [0.0, 150.0, 400.0, 230.0] * 2 + [0.0]
    assert episodes == [(GAME[0], 3, 15)] * 2
    answers, episodes = played(lives(SKIP, vector=vector, max_episode_steps=2), 7)
    assert of_lane(answers, "truncated") == [False, False, True] * 2 + [False, False]
    # An end that a limit makes is known as such at the reset after it.
    assert episodes == [(550.0, 2, 10)] * 2


def test_wrappers_multiply_the_skip_of_an_emulator():
    def frames(env_id: str, *wrappers: dict[str, Any], **kwargs: Any) -> int:
        made = family(f"tests.envs.odd:rlx-odd/{env_id}-v0", wrappers=list(wrappers), kwargs=kwargs)
        return made.spec().frames_per_env_step

    repeat = {"_target_": f"{OF_GYMNASIUM}.RepeatAction", "num_repeats": 3}
    assert frames("Emulated", SKIP) == 4 * 5
    assert frames("Emulated", SKIP, repeat) == 4 * 5 * 3
    assert frames("Emulated", CLIP) == 4
    assert frames("Skipping", SKIP) == 2 * 3 * 5
    assert frames("Odd", repeat) == 3
    assert frames("Repeating", repeat) == 3  # its own repeats are no frames of an emulator
    sticky = {"_target_": f"{OF_GYMNASIUM}.StickyAction", "repeat_action_probability": 0.25}
    assert frames("Odd", sticky) == 1


@pytest.mark.parametrize("vector", VECTORS)
def test_the_first_wrapper_is_the_innermost(vector):
    plus = {"_target_": f"{HERE}.Plus", "number": 1}
    times = {"_target_": f"{HERE}.Times", "number": 10}
    assert shown(played(lives(plus, times, vector=vector), 2)[0], 1) == [10, 20, 30]
    assert shown(played(lives(times, plus, vector=vector), 2)[0], 1) == [1, 11, 21]


@pytest.mark.parametrize("vector", VECTORS)
def test_cut_episodes_do_not_count_and_ended_ones_do(vector):
    odd = family(
        "tests.envs.odd:rlx-odd/Odd-v0",
        wrappers=[{"_target_": f"{HERE}.Plus", "number": 0}, CLIP],
        kwargs={"wrong": "nan observation", "at": 15},
        vector=vector,
    )
    env = odd.make(lanes=2, seeds=[1, 2])
    answer = env.reset()
    for _ in range(31):  # 10 env steps, 4 and one that is not finite, 10, 4
        answer = env.step(np.zeros(2, np.int32), answer.lane)
    assert [(cut.lane, cut.env_step) for cut in env.cuts()] == [(0, 5), (1, 5)]
    assert [(e.return_, e.env_steps) for e in env.episodes()] == [(10.0, 10)] * 4
    env.end(np.array([1], np.int32))
    assert [(e.lane, e.return_, e.env_steps) for e in env.episodes()] == [(1, 4.0, 4)]
    answer = env.step(np.zeros(2, np.int32), answer.lane)
    assert answer.first.tolist() == [False, True]
    assert env.episodes() == []
    env.reset()  # starts anew: what was under way is not counted
    assert env.episodes() == []
    env.close()


# --- images --------------------------------------------------------------------------------------


def area_mean(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mean of each new pixel's area, at 60 times the resolution."""
    fine = image.astype(np.float64).repeat(height, axis=0).repeat(width, axis=1)
    old = image.shape
    parts = fine.reshape(height, old[0], width, old[1], *old[2:])
    return parts.mean(axis=(1, 3))


@pytest.mark.parametrize("shape", [(6, 9, 3), (5, 7)])
@pytest.mark.parametrize("size", [(4, 5), (6, 9), (11, 3)])
def test_images_are_resized_by_means_of_areas(shape, size):
    env = ResizeImage(Drawn(shape), *size)
    assert env.observation_space == gymnasium.spaces.Box(0, 255, (*size, *shape[2:]), np.uint8)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    resized = env.observation(image)
    assert resized.dtype == np.uint8
    assert np.abs(resized - area_mean(image, *size)).max() < 0.501


class Drawn(gymnasium.Env):
    """Declares images of a shape."""

    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, shape: tuple[int, ...], dtype: Any = np.uint8) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, dtype)


def test_what_is_no_image_is_not_resized():
    for env in (Drawn((3,)), Drawn((3, 3, 3), np.float32)):
        with pytest.raises(ValueError, match=r"accepted: uint8\[H, W\] or uint8\[H, W, C\]"):
            ResizeImage(env, 3, 3)
    with pytest.raises(ValueError, match="width=0; accepted: an int >= 1"):
        ResizeImage(Drawn((3, 3)), 3, 0)


def test_the_yaml_for_images_makes_small_grey_frames_with_channels_first():
    cfg = rlx.compose(["env=images", f"env.id={HERE}:rlx-wrapped/Filmed-v0", "env.vector=sync"])
    made = rlx.make("env=images", id=cfg.env.id, vector="sync")
    spec = made.spec()
    assert (spec.observation["observation"].shape, spec.frames_per_env_step) == ((1, 84, 84), 4)
    answers, episodes = played(made, 3)
    # The picture's bytes are ten times the steps of the game, of which each env step makes four.
    grey = [answer.observation["observation"][1] for answer in answers]
    assert [int(image.min()) for image in grey] == [int(image.max()) for image in grey]
    assert np.abs(np.array([0, 40, 80, 120]) - [int(image.max()) for image in grey]).max() <= 1
    assert episodes == [(GAME[0], 3, 12)]


def test_pictures_that_an_environment_draws_are_observations():
    draw = {"_target_": f"{OF_GYMNASIUM}.AddRenderObservation"}
    made = lives(draw)
    assert made.spec().observation["observation"].shape == (3, 6, 9)
    answers, _ = played(made, 2)
    assert [int(a.observation["observation"][1].max()) for a in answers] == [0, 10, 20]


def test_stacked_frames_are_said_to_cost_memory():
    stack = {"_target_": f"{OF_GYMNASIUM}.FrameStackObservation", "stack_size": 3}
    (said,) = lives(stack).spec().said
    assert said.startswith("env.wrappers.0 stacks frames")
    assert lives(CLIP).spec().said == ()


# --- what is refused -----------------------------------------------------------------------------


def refusal(wrapper: Any) -> str:
    (problem,) = lives(wrapper).problems()
    assert problem.startswith("env.wrappers.0")
    assert "\n" not in problem
    with pytest.raises(ValueError, match=r"env\.wrappers\.0"):
        lives(wrapper).make(lanes=1, seeds=[1])
    return problem


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Autoreset", "sees each episode's last observation; leave it out"),
        ("RecordEpisodeStatistics", "counts episodes beneath all wrappers"),
        ("RecordVideo", "videos are made by evaluations"),
        ("HumanRendering", "videos are made by evaluations"),
        ("RenderCollection", "videos are made by evaluations"),
        ("NormalizeObservation", "in no checkpoint, and each lane has others; set env.scale"),
        ("NormalizeReward", "in no checkpoint, and each lane has others; set agent.reward"),
        ("TransformObservation", "takes a function, which no configuration holds"),
        ("TransformReward", "takes a function"),
        ("TransformAction", "takes a function"),
    ],
)
def test_wrappers_that_break_rlx_are_refused_by_name(name, says):
    problem = refusal({"_target_": f"{OF_GYMNASIUM}.{name}"})
    assert problem.startswith(f"env.wrappers.0._target_={OF_GYMNASIUM}.{name}: ")
    assert says in problem


@pytest.mark.parametrize(
    ("wrapper", "says"),
    [
        ({"number": 3}, "accepted: {_target_: gymnasium.wrappers.NAME"),
        ({"_target_": "os.system"}, "not allowed; accepted: a public class under gymnasium.wrap"),
        ({"_target_": f"{OF_GYMNASIUM}.ClipRewards"}, "did you mean gymnasium.wrappers.ClipReward"),
        ({"_target_": f"{OF_GYMNASIUM}.vector.ClipReward"}, "is no gymnasium.Wrapper; accepted"),
        ({"_target_": f"{HERE}.NoWrapper"}, "tests.envs.wrapped.NoWrapper is no gymnasium.Wrapper"),
        ({"_target_": f"{HERE}.MyRewards"}, "in no checkpoint"),
        (CLIP | {"max_rewards": 3}, "max_rewards: no such keyword; did you mean"),
        ({"_target_": f"{HERE}.Plus"}, "number: missing; Plus takes number"),
        (CLIP | {"env": 3}, "env: no such keyword"),
    ],
)
def test_unknown_classes_and_keywords_are_one_line(wrapper, says):
    assert says in refusal(wrapper)


@pytest.mark.parametrize("at", ["init", "reset", "step"])
def test_a_wrapper_that_fails_does_so_before_the_run(at, tmp_path):
    with pytest.raises(ConfigError, match="no luck") as error:
        rlx.run(rlx.compose(run_of({"_target_": f"{HERE}.Unlucky", "at": at})), tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.glob("checkpoints/*")) == []


def test_a_package_that_gymnasiums_wrapper_lacks_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    resize = {"_target_": f"{OF_GYMNASIUM}.ResizeObservation", "shape": [3, 3]}
    draw = {"_target_": f"{OF_GYMNASIUM}.AddRenderObservation"}
    with pytest.raises(ValueError, match=r"env.wrappers.1 .ResizeObservation.: opencv .cv2."):
        lives(draw, resize).spec()


# --- runs ----------------------------------------------------------------------------------------


def run_of(*wrappers: dict[str, Any], **settings: Any) -> list[str]:
    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}:{shown(each)}" for key, each in value.items()) + "}"
        return str(value)

    given = f"env.wrappers=[{','.join(map(shown, wrappers))}]"
    more = [f"{key}={value}" for key, value in settings.items()]
    return ["env=gymnasium", f"env.id={LIVES}", given, *SMALL, "total_env_steps=200", *more]


@pytest.mark.parametrize("acting", ["local", "threads"])
def test_a_run_reports_trains_and_is_loaded_with_its_wrappers(tmp_path, acting):
    settings = run_of(LIFE, CLIP, DELAY, acting=acting)
    summary = rlx.run(rlx.compose(settings), tmp_path / "run")
    assert summary["evaluation_return"] == GAME[0]
    loaded = rlx.load(tmp_path / "run")
    evaluated = loaded.evaluate(episodes=2, envs=1, epsilon=0.0, record=True)
    assert evaluated["returns"] == [GAME[0]] * 2
    assert Path(evaluated["video"]).is_file()
    env = loaded.family.open()
    (observation, _), state, rewards = env.reset(), None, []
    for _ in range(4):
        action, state = loaded.act(observation, state, reward=rewards[-1] if rewards else None)
        observation, reward, *_ = env.step(action)
        rewards.append(reward)
    assert rewards == [1.0, 1.0, 1.0, 0.0]  # the life's end is delayed
    env.close()


def test_a_run_goes_on_with_its_wrappers(tmp_path):
    rlx.run(rlx.compose(run_of(CLIP, **{"env.vector": "async"})), tmp_path)
    again = ["total_env_steps=300", f"resume={tmp_path}"]
    summary = rlx.run(rlx.compose(run_of(CLIP, **{"env.vector": "async"}) + again), tmp_path)
    assert (summary["env_steps"] >= 300, summary["evaluation_return"]) == (True, GAME[0])


def test_a_run_whose_wrappers_are_not_allowed_is_not_loaded(tmp_path, monkeypatch):
    rlx.run(rlx.compose(run_of({"_target_": f"{HERE}.Plus", "number": 0})), tmp_path)
    monkeypatch.setattr(targets, "_allowed", {"rlx."})
    with pytest.raises(ConfigError, match=r"env\.wrappers\.0\._target_.*not allowed; accepted"):
        rlx.load(tmp_path)


def test_another_process_needs_no_permission_of_its_own(tmp_path):
    """An actor gets settings that were checked where the run was started."""
    made = lives({"_target_": f"{HERE}.Plus", "number": 3})
    (tmp_path / "family.pickle").write_bytes(pickle.dumps(made))
    code = (
        "import pickle, sys, numpy as np\n"
        "made = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(made.make(lanes=1, seeds=[1]).reset().observation['observation'].tolist())"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "family.pickle")],
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "[[3.0, 3.0]]", done.stderr
    monkey = dataclasses.replace(made, wrappers=[{"_target_": "no_such_package.W"}])
    sent = pickle.loads(pickle.dumps(monkey))
    with pytest.raises(ValueError, match="not in this process of its actors"):
        sent.spec()


# --- tuples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize(("name", "prefix"), [("Scene", ""), ("InADict", "all/")])
def test_tuples_and_dicts_in_each_other_are_leaves_by_name(vector, name, prefix):
    made = family(f"tests.envs.wrapped:rlx-wrapped/{name}-v0", vector=vector)
    spec = made.spec()
    assert {k: (v.shape, v.dtype) for k, v in spec.observation.items()} == {
        f"{prefix}0": ((2,), "float32"),
        f"{prefix}1": ((), "int32"),
        f"{prefix}2/ears/0": ((), "int32"),
        f"{prefix}2/ears/1": ((1,), "float32"),
        f"{prefix}2/eye": ((), "int32"),
    }
    assert spec.categories[f"{prefix}2/ears/0"] == Categories(first=(0,), counts=(9,))
    env = made.make(lanes=2, seeds=[1, 2])
    answer = env.reset()
    for time in (0, 1, 2, 3):
        found = {k.removeprefix(prefix): v[1].tolist() for k, v in answer.observation.items()}
        assert found == {"0": [time, time], "1": time + 1, "2/ears/0": time + 2,
                         "2/ears/1": [time + 3], "2/eye": time}  # fmt: skip
        answer = env.step(np.zeros(2, np.int32), answer.lane)
    env.close()


def test_tuples_flattened_by_gymnasium_and_real_ones():
    flat = {"_target_": f"{OF_GYMNASIUM}.FlattenObservation"}
    made = family("tests.envs.wrapped:rlx-wrapped/Scene-v0", wrappers=[flat])
    assert made.spec().observation["observation"].shape == (2 + 9 + 9 + 1 + 9,)
    blackjack = family("Blackjack-v1").spec()
    assert list(blackjack.observation) == ["0", "1", "2"]
    part = family("Blackjack-v1", observe="1").make(lanes=1, seeds=[1])
    assert list(part.reset().observation) == ["1"]


@pytest.mark.parametrize("name", ["Scene", "InADict"])
def test_an_agent_in_use_reads_what_the_environment_gives(tmp_path, name):
    settings = ["env=gymnasium", f"env.id=tests.envs.wrapped:rlx-wrapped/{name}-v0", *SMALL]
    rlx.run(rlx.compose([*settings, "total_env_steps=200"]), tmp_path)
    loaded = rlx.load(tmp_path)
    env = loaded.family.open()
    (observation, _), state = env.reset(), None
    action, state = loaded.act(observation, state)
    observation, reward, *_ = env.step(action)
    assert loaded.act(observation, state, reward=reward)[0] in (0, 1)
    two = gymnasium.vector.SyncVectorEnv([loaded.family.open] * 2)
    assert loaded.act(two.reset()[0], None)[0].shape == (2,)
    assert json.loads((tmp_path / "summary.json").read_text())["state"] == "finished"
