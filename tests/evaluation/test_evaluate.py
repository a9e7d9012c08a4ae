"""Evaluation: which episodes are counted, repeatability, and the command line on a real run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rlx
from rlx import evaluate
from rlx.agents.r2d2 import R2D2
from rlx.config.options import read_options
from rlx.envs.envpool import EnvPool, EnvPoolLanes
from rlx.evaluation import playing, tiles
from rlx.evaluation import video as videos
from rlx.evaluation.playing import run_episodes
from rlx.problems import ConfigError
from rlx.runs import status
from rlx.seeding import spawn_int
from rlx.types import Carry, Episode, NetInput, Timestep, Weights
from tests import parts

ROOT = Path(__file__).resolve().parents[2]
SEED, LANES, EPISODES = 3, 8, 12
CARTPOLE = EnvPool(
    id="CartPole-v1",
    observe=None,
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
# With these weights the greedy policy drops the pole after 8 steps or after 90, as it starts.
INIT_KEY, SCALE = 11, 3


@pytest.fixture(scope="module")
def agent() -> R2D2:
    return parts.agent(parts.network(CARTPOLE.spec()))


@pytest.fixture(scope="module")
def weights(agent) -> Weights:
    params = agent.init(jax.random.PRNGKey(INIT_KEY)).params
    return Weights(version=0, params=jax.tree.map(lambda x: SCALE * np.asarray(x), params))


def play(agent: R2D2, weights: Weights, **changes: Any) -> list[Episode]:
    settings: dict[str, Any] = {
        "family": CARTPOLE,
        "episodes": EPISODES,
        "lanes": LANES,
        "epsilon": 0.0,
        "seed": SEED,
        "purpose": "test",
    }
    return run_episodes(agent=agent, weights=weights, **settings | changes)


def returns(episodes: Sequence[Episode]) -> list[float]:
    return [episode.return_ for episode in episodes]


# --- which episodes count ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Played:
    """An episode of one lane that was played by itself, in steps of the environment."""

    started: int
    lane: int
    ended: int
    env_steps: int


def play_alone(
    act: Callable[..., Any], params: Any, carry: Carry, lane: int, steps: int
) -> list[Played]:
    """The episodes that a lane ends in so many steps, greedily, nothing else beside it."""
    key, greedy = jax.random.PRNGKey(0), np.zeros(1, np.float32)
    env = CARTPOLE.make(lanes=1, seeds=[spawn_int(SEED, "evaluation", lane)])
    timestep, action, time, started = env.reset(), np.full(1, -1, np.int32), 0, 0
    found = []
    for step in range(steps):
        first = bool(timestep.first[0])
        time = 0 if first else time + 1
        inputs = NetInput(
            observation=timestep.observation,
            prev_action=np.full(1, -1, np.int32) if first else action,
            prev_reward=timestep.reward * (not first),
            time=np.full(1, time, np.int32),
            first=timestep.first,
        )
        action, _, carry = act(params, inputs, carry, key, greedy)
        action = np.asarray(action)
        timestep = env.step(action, timestep.lane)
        if timestep.terminated[0] or timestep.truncated[0]:
            found.append(Played(started, lane, step + 1, time + 1))
            started = step + 1
    env.close()
    return found


@pytest.fixture(scope="module")
def alone(agent, weights) -> list[Played]:
    act, carry = jax.jit(agent.act), agent.initial_carry(1)
    lanes = [play_alone(act, weights.params, carry, lane, 200) for lane in range(LANES)]
    return [played for lane in lanes for played in lane]


def test_the_episodes_that_started_first_are_counted(agent, weights, alone):
    by_start = sorted(alone, key=lambda p: (p.started, p.lane))[:EPISODES]
    counted = play(agent, weights)
    assert [(e.lane, e.env_steps) for e in counted] == [(p.lane, p.env_steps) for p in by_start]
    assert max(p.ended for p in by_start) < 200 > by_start[-1].started  # `alone` was long enough


def test_counting_those_that_ended_first_would_be_biased(agent, weights, alone):
    by_end = sorted(alone, key=lambda p: (p.ended, p.lane))[:EPISODES]
    counted = [e.env_steps for e in play(agent, weights)]
    assert np.mean([p.env_steps for p in by_end]) < np.mean(counted) - 5
    assert max(p.env_steps for p in by_end) < max(counted)


def test_fewer_episodes_than_lanes(agent, weights, alone):
    counted = [(e.lane, e.env_steps) for e in play(agent, weights, episodes=3)]
    assert counted == [(p.lane, p.env_steps) for p in alone if p.started == 0][:3]


# --- repeatability -------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_returns(agent, weights):
    assert returns(play(agent, weights)) == returns(play(agent, weights))
    assert returns(play(agent, weights)) != returns(play(agent, weights, seed=SEED + 1))


def test_random_actions_differ_from_greedy_ones_and_repeat_too(agent, weights):
    random = returns(play(agent, weights, epsilon=1.0))
    assert random != returns(play(agent, weights))
    assert random == returns(play(agent, weights, epsilon=1.0))


@pytest.mark.parametrize("batch_size", [3, 50])
def test_the_batch_size_of_training_changes_nothing(agent, weights, batch_size):
    answered = set()

    def watch(env: Any, timestep: Timestep, starts: playing.Starts) -> None:
        answered.add(len(timestep.lane))

    family = dataclasses.replace(CARTPOLE, batch_size=batch_size)
    assert returns(play(agent, weights, family=family, watch=watch)) == returns(
        play(agent, weights)
    )
    assert answered == {LANES}


class Unordered:
    """A family that answers whichever three lanes are ready, and has no field to say so."""

    def spec(self) -> Any:
        return CARTPOLE.spec()

    def make(self, *, lanes: int, seeds: Sequence[int]) -> EnvPoolLanes:
        return dataclasses.replace(CARTPOLE, batch_size=3, threads=2).make(lanes=lanes, seeds=seeds)


def test_an_asynchronous_environment_plays_each_lane_as_it_would_alone(agent, weights, alone):
    counted = play(agent, weights, family=Unordered())
    assert len(counted) == EPISODES
    for lane in range(LANES):
        mine = [e.env_steps for e in counted if e.lane == lane]
        assert mine == [p.env_steps for p in alone if p.lane == lane][: len(mine)]
        assert mine, "every lane's first episode started among the first"


# --- a real run ----------------------------------------------------------------------------------


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def saved(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "evaluation.json").read_text())["evaluations"]


def refused(capsys, *arguments: str) -> list[str]:
    """The lines of standard error of a command that is refused."""
    with pytest.raises(SystemExit) as left:
        evaluate.main(arguments)
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_the_command_plays_other_episodes_than_those_that_ended_the_training(run):
    done = subprocess.run(
        [sys.executable, "-m", "rlx.evaluate", f"run={run}", "episodes=10"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = saved(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["evaluation_return"] != found["mean"] == np.mean(found["returns"])
    assert found["checkpoint"] == str(run / "checkpoints" / f"{summary['env_steps']:012d}")
    for name in ("env_steps", "updates"):
        assert found[name] == summary[name]
    assert (found["episodes"], found["envs"], len(found["returns"])) == (10, 10, 10)
    assert (found["epsilon"], found["seed"], found["env_id"]) == (0.1, 0, "CartPole-v1")
    assert found["min"] <= found["iqm_low"] <= found["iqm"] <= found["iqm_high"] <= found["max"]
    assert found["length_mean"] == found["mean"]  # CartPole pays 1 per env step
    assert f"{found['mean']:.2f}" in done.stdout
    assert str(run / "evaluation.json") in done.stdout.splitlines()


def test_evaluations_are_added_newest_last(run):
    evaluate.main([f"run={run}", "episodes=10"])
    older = sorted((run / "checkpoints").glob("[0-9]*"))[0]
    other = ["episodes=3", f"which={older}", "seed=5", "epsilon=1", "envs=2"]
    evaluate.main([f"run={run}", "output=" + str(run / "evaluation.json"), *other])
    assert [e["episodes"] for e in saved(run)] == [10, 3]
    last = saved(run)[-1]
    assert (last["checkpoint"], last["env_steps"]) == (str(older), int(older.name))
    assert (last["seed"], last["epsilon"], last["envs"], last["video"]) == (5, 1.0, 2, None)
    evaluate.main([f"run={run}", "episodes=2", f"output={run}/other.json"])
    assert len(saved(run)) == 2


def test_a_loaded_run_gives_its_parts(run):
    loaded = rlx.load(run)
    summary = json.loads((run / "summary.json").read_text())
    assert status.params_sha256(loaded.params()) == summary["params_sha256"]
    assert loaded.agent is loaded.agent
    assert loaded.agent.sequence.unroll == 4
    assert loaded.family.spec() == loaded.agent.spec
    assert len(loaded.evaluate(episodes=10)["returns"]) == 10
    assert not (run / "evaluation.json").exists()


def test_record_writes_the_first_episode(run, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(videos, "_has_ffmpeg", lambda: False)
    evaluate.main([f"run={run}", "episodes=10", "record=true", "record_fps=20"])
    (found,) = saved(run)
    video = Path(found["video"])
    assert video == run / "videos" / f"evaluation-{found['env_steps']}.gif"
    assert os.listdir(video.parent) == [video.name]
    frames, duration_ms = [], 0
    with Image.open(video) as image:
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
            duration_ms += image.info["duration"]
    assert duration_ms == 50 * (found["returns"][0] + 1)  # the last observation has a frame too
    assert frames[0].shape == (400, 600, 3)
    moved = (frames[0] != frames[-1]).any(-1)
    assert 500 < moved.sum() < moved.size // 10  # cart and pole, on a still background


# --- what is refused -----------------------------------------------------------------------------


def test_every_option_is_explained_and_has_a_default(capsys):
    names = {field.name for field in dataclasses.fields(evaluate.Options)}
    assert evaluate.Options(run="x").episodes == 100
    evaluate.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {name}=" in shown for name in names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["run: missing; give a string"]),
        (["run=x", "epsiodes=3"], ["epsiodes=3: no such option; did you mean episodes?"]),
        (["run=x", "episodes=1.5"], ["episodes=1.5: accepted: an int >= 1"]),
        (["run=x", "epsilon=2"], ["epsilon=2: accepted: a float >= 0 and <= 1 or null"]),
        (["run=x", "record=maybe"], ["record=maybe: accepted: true or false or grid"]),
        (["run=x", "oops"], ["oops: write key=value; --help lists the keys"]),
        (
            ["run=x", "seed=[1", "envs=0"],
            [
                "seed=[1: cannot be read; write a number, true, false or null",
                "envs=0: accepted: an int >= 1 or null",
            ],
        ),
    ],
)
def test_bad_options_are_told_in_a_line_each(capsys, arguments, said):
    assert refused(capsys, *arguments) == [f"rlx: {line}" for line in said]


def options_of(arguments: list[str]) -> evaluate.Options:
    return read_options(evaluate.Options, arguments)


def test_paths_are_taken_as_they_stand():
    options = options_of(["run=0", "which=000000000200", "epsilon=1", "seed=7"])
    assert (options.run, options.which, options.output) == ("0", "000000000200", None)
    assert (options.epsilon, options.seed) == (1.0, 7)
    assert options_of(["run=seed=0,lr=1"]).run == "seed=0,lr=1"


def test_folders_that_cannot_be_evaluated(capsys, run, tmp_path, monkeypatch):
    monkeypatch.setattr(playing, "run_episodes", lambda **_: pytest.fail("played for nothing"))
    (line,) = refused(capsys, f"run={tmp_path}")
    assert line.startswith(f"rlx: run={tmp_path}: no run is there")
    (line,) = refused(capsys, f"run={run}", "which=lates")
    assert line.startswith("rlx: which=lates: ")
    assert "give 'latest', 'best' or a folder" in line
    (line,) = refused(capsys, f"run={run}", f"output={run}/summary.json")
    assert "is no file of evaluations" in line
    (line,) = refused(capsys, f"run={run}", f"output={run}/nowhere/x.json")
    assert "cannot be written; give output=FILE" in line
    shutil.rmtree(run / "checkpoints")
    (line,) = refused(capsys, f"run={run}")
    assert "no checkpoint of a run is there" in line
    assert not (run / "evaluation.json").exists()


def test_a_damaged_checkpoint_is_named_and_passed_over(capsys, caplog, run):
    older, newest = sorted((run / "checkpoints").glob("[0-9]*"))[-2:]
    with (newest / "meta.json").open("a") as file:
        file.write("x")
    with caplog.at_level(logging.WARNING):
        evaluate.main([f"run={run}", "episodes=1"])
    (kept,) = json.loads((run / "other_evaluations.json").read_text())["evaluations"]
    assert f"{newest / 'meta.json'}: damaged" in caplog.text
    assert kept["checkpoint"] == str(older)
    (line,) = refused(capsys, f"run={run}", f"which={newest}")
    assert f"{newest / 'meta.json'}: damaged" in line


@pytest.mark.parametrize("record", ["true", "grid"])
def test_recording_needs_imageio(capsys, run, monkeypatch, record):
    monkeypatch.setitem(sys.modules, "imageio.v2", None)
    (line,) = refused(capsys, f"run={run}", f"record={record}")
    assert line == "rlx: record: imageio is not installed; pip install rlx[video]"


def test_recording_needs_an_environment_that_draws(agent, weights):
    catch = dataclasses.replace(CARTPOLE, id="Catch-v0")
    with pytest.raises(ConfigError, match=r"record: env.id='Catch-v0' cannot be rendered"):
        play(agent, weights, family=catch, render=True)
    with pytest.raises(ConfigError, match=r"record: .*unexpected keyword argument 'render'"):
        play(agent, weights, family=Unordered(), render=True)


def test_a_failed_recording_leaves_no_file(tmp_path, agent, weights, monkeypatch):
    def render(env: EnvPoolLanes, lane: int) -> np.ndarray:
        if len(drawn) == 2:
            raise ValueError("no picture\nand more")
        drawn.append(np.zeros((8, 8, 3), np.uint8))
        return drawn[-1]

    drawn: list[np.ndarray] = []
    monkeypatch.setattr(EnvPoolLanes, "render", render)
    with (
        pytest.raises(ConfigError, match=r"^record: no picture$"),
        videos.VideoFile(tmp_path, "x", 30.0) as file,
    ):
        play(agent, weights, watch=videos.VideoRecorder(file), render=True)
    assert os.listdir(tmp_path) == []


# --- grids ---------------------------------------------------------------------------------------


def test_a_grid_shows_what_is_played_and_why(agent, weights, tmp_path, monkeypatch):
    from PIL import Image

    family = dataclasses.replace(CARTPOLE, max_episode_steps=15)
    monkeypatch.setattr(videos, "_has_ffmpeg", lambda: False)
    shown: list[tiles.Seen] = []
    draw = tiles.tile
    monkeypatch.setattr(tiles, "tile", lambda seen: (shown.append(seen), draw(seen))[1])
    with videos.VideoFile(tmp_path, "grid", 30.0) as file:
        grid = videos.GridRecorder(file, 3)
        found = run_episodes(
            agent=videos.with_values(agent),
            weights=weights,
            family=family,
            episodes=5,
            lanes=4,
            epsilon=0.0,
            seed=7,
            purpose="test",
            watch=grid,
            acted=grid.acted,
            render=True,
        )
    assert found == play(agent, weights, family=family, episodes=5, lanes=4, seed=7)
    for lane in range(3):
        mine = [seen for seen in shown if seen.title == f"episode {lane}"]
        *before, last = mine
        assert [seen.env_step for seen in mine] == list(range(found[lane].env_steps + 1))
        assert [seen.return_ for seen in mine] == [float(n) for n in range(len(mine))]
        assert last.ended
        assert last.values is None
        assert last.return_ == found[lane].return_
        for seen in before:
            assert seen.values is not None
            assert seen.values.shape == (2,)
            assert seen.action == seen.values.argmax()
            assert not seen.ended
        spreads = [np.abs(s.values - s.values.mean()).max() for s in before if s.values is not None]
        np.testing.assert_allclose([s.spread for s in before], np.maximum.accumulate(spreads))
    assert len({episode.env_steps for episode in found[:3]}) > 1  # one waits for another
    with Image.open(file.path) as image:
        assert image.size == (2 * tiles.WIDTH, 2 * (tiles.HEIGHT + tiles.PANEL))
        duration_ms = 0
        for number in range(image.n_frames):
            image.seek(number)
            duration_ms += image.info["duration"]
        last_picture = np.asarray(image.convert("RGB")).astype(int)
    assert duration_ms == 30 * (max(e.env_steps for e in found[:3]) + 1)  # GIFs count in 10 ms
    distance = np.abs(last_picture - tiles.ENDED).max(-1)
    for row, column in ((0, 0), (0, 1), (1, 0)):  # all have ended
        edge = distance[row * (tiles.HEIGHT + tiles.PANEL), column * tiles.WIDTH :][: tiles.WIDTH]
        assert edge.max() < 40
    assert distance[tiles.HEIGHT + tiles.PANEL, tiles.WIDTH :].min() > 40  # there is no fourth


def test_the_command_records_a_grid_and_cuts_what_is_too_long(run, monkeypatch, caplog):
    monkeypatch.setattr(videos, "_has_ffmpeg", lambda: False)
    monkeypatch.setattr(videos, "VIDEO_FRAMES", 4)
    with caplog.at_level(logging.WARNING):
        evaluate.main([f"run={run}", "episodes=10", "record=grid", "grid=7"])
    (found,) = saved(run)
    assert found["video"] == str(run / "videos" / f"evaluation-{found['env_steps']}-grid.gif")
    assert os.listdir(run / "videos") == [Path(found["video"]).name]
    assert caplog.text.count("cut after 4 frames") == 1
    assert found["returns"] == rlx.load(run).evaluate(episodes=10)["returns"]


def test_an_agent_without_values_has_a_grid_without_bars(agent, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "_has_ffmpeg", lambda: False)
    shown: list[tiles.Seen] = []
    draw = tiles.tile
    monkeypatch.setattr(tiles, "tile", lambda seen: (shown.append(seen), draw(seen))[1])
    family = dataclasses.replace(CARTPOLE, max_episode_steps=3)
    assert videos.with_values(WITHOUT_VALUES) is WITHOUT_VALUES
    with videos.VideoFile(tmp_path, "grid", 30.0) as file:
        grid = videos.GridRecorder(file, 1)
        play(
            agent,
            weights,
            family=family,
            episodes=1,
            lanes=1,
            watch=grid,
            acted=grid.acted,
            render=True,
        )
    assert [seen.values for seen in shown] == [None] * 4
    assert [seen.action is None for seen in shown] == [False, False, False, True]


WITHOUT_VALUES = object()
