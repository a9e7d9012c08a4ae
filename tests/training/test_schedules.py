"""Settings of the agent that change while a run trains, and weights by env steps."""

from __future__ import annotations

import dataclasses
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rlx
from rlx.acting.exploration import Constant, Piecewise, Redrawn
from rlx.acting.scheduled import scheduled_exploration
from rlx.config.changing import Schedule, replace_settings
from rlx.interfaces import PerEpisode
from rlx.problems import ConfigError
from rlx.runs.folders import read_rows
from rlx.training.schedules import followed
from rlx.training.stages import Stages
from tests import parts
from tests.training.test_run import TINY, run


def schedule(**changes: Any) -> Schedule:
    given: dict[str, Any] = {
        "setting": "agent.discount",
        "over": "env_steps",
        "points": [(100, 0.5), (200, 0.9), (400, 0.7)],
        "between": "linear",
    }
    return Schedule(**given | changes)


@pytest.mark.parametrize(
    ("between", "values"),
    [
        ("linear", {0: 0.5, 100: 0.5, 150: 0.7, 200: 0.9, 300: 0.8, 400: 0.7, 999: 0.7}),
        ("step", {0: 0.5, 100: 0.5, 199: 0.5, 200: 0.9, 399: 0.9, 400: 0.7, 999: 0.7}),
    ],
)
def test_values_between_points(between, values):
    made = schedule(between=between)
    for now, value in values.items():
        assert made.value(env_steps=now, updates=-1, seconds=-1.0) == pytest.approx(value)
    of_updates, of_seconds = (dataclasses.replace(made, over=o) for o in ("updates", "seconds"))
    assert of_updates.value(env_steps=-1, updates=200, seconds=-1.0) == pytest.approx(0.9)
    assert of_seconds.value(env_steps=-1, updates=-1, seconds=200.0) == pytest.approx(0.9)


def node(setting: str, points: str, over: str = "env_steps", between: str = "linear") -> str:
    return f"{{setting:{setting},over:{over},points:{points},between:{between}}}"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (node("agent.discout", "[[0,0.5]]"), "did you mean agent.discount?"),
        (node("agent.unroll", "[[0,8]]"), "schedules.0.setting=agent.unroll: no number that can"),
        (node("replay.capacity", "[[0,8]]"), "replay.capacity: no number that can change; did you"),
        (node("evaluation.epsilon", "[[0,0]]"), "evaluation.epsilon: no number that can change; "),
        (node("replay.priority_exponent", "[[0,0.9]]"), "priority_exponent: no number that can"),
        (
            node("replay.ratio", "[[0,0]]"),
            "points=[[0.0, 0.0]]: 0 is no value of replay",
        ),
        (node("exploration.base", "[[0,2]]"), "2 is no value of exploration.base"),
        (
            node("exploration.base", "[[0,0.2]]", over="updates"),
            "actors know the env steps of the run alone, no updates; accepted: over: env_steps",
        ),
        (node("agent.discount", "[[0,1.5]]"), "1.5 is no value of agent.discount"),
        (node("agent.discount", "[[5,0.9],[5,0.8]]"), "in ascending order of env_steps"),
        (node("agent.discount", "[]"), "give one or more pairs"),
        (
            node("agent.discount", "[[0,0.5]]", over="frames"),
            "accepted: env_steps or updates or seconds",
        ),
        (node("agent.discount", "[[0,0.5,1]]"), "schedules.0.points"),
        ("{setting:agent.discount}", "schedules.0.points (command line): missing"),
        (",".join([node("agent.discount", "[[0,0.9]]")] * 2), "has two schedules"),
    ],
)
def test_what_cannot_be_followed_is_refused(given, says, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, f"schedules=[{given}]")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            [
                "replay.importance_exponent_final=1.0",
                "replay.anneal_env_steps=500",
                f"schedules=[{node('replay.importance_exponent', '[[0,0.4]]')}]",
            ],
            "anneal_env_steps changes it already",
        ),
        (
            ["replay.priority_exponent=0", f"schedules=[{node('replay.priority_eta', '[[0,1]]')}]"],
            "priority_exponent=0 draws uniformly, so nothing reads it",
        ),
        (
            ["replay=uniform", f"schedules=[{node('replay.priority_eta', '[[0,1]]')}]"],
            "did you mean replay.ratio?",
        ),
        (
            [
                *("acting=threads", "replay.ratio=null"),
                f"schedules=[{node('replay.ratio', '[[0,1]]')}]",
            ],
            "replay.ratio: no number that can change",
        ),
    ],
)
def test_what_would_change_nothing_is_refused(given, says, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, *given)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "given", ["replay.ratio=1", "replay.importance_exponent=1", "exploration.base=1"]
)
def test_a_number_may_be_written_without_a_fraction(given, tmp_path):
    name = given.partition("=")[0]
    steps = f"schedules=[{node(name, '[[0,0.5],[200,0.75]]')}]"
    run(tmp_path, given, steps, "stop_after_updates=1")
    assert last_row(tmp_path)[f"schedule/{name}"] >= 0.5


def test_a_number_by_which_no_lane_explores_otherwise_is_refused(tmp_path):
    idle = node("exploration.final_scale", "[[0,0.5]]")
    with pytest.raises(ConfigError, match="final_scale: no lane explores otherwise by it with"):
        run(tmp_path / "a", f"schedules=[{idle}]")
    own = ["exploration.final_scale=0.9", "exploration.decay_env_steps=500"]
    done = run(tmp_path / "b", f"schedules=[{idle}]", *own, "stop_after_updates=1")
    assert done["updates"] == 1


def test_a_setting_that_decides_how_the_update_is_compiled_is_refused(tmp_path):
    given = [
        "agent.optimizer.rule=rmsprop",
        f"schedules=[{node('agent.optimizer.b1', '[[0,0.5]]')}]",
    ]
    with pytest.raises(ConfigError, match="b1: decides how the update is compiled, so it cannot"):
        run(tmp_path, *given)


def test_a_setting_that_no_update_reads_is_refused(tmp_path):
    by = node("agent.optimizer.final_learning_rate", "[[0,0.0001]]")
    with pytest.raises(ConfigError, match="final_learning_rate: no update reads it with these"):
        run(tmp_path, "agent.optimizer.decay_gradient_steps=null", f"schedules=[{by}]")


def test_an_update_that_follows_is_that_of_an_agent_with_the_value():
    """A setting of the agent and one of its optimiser change at once."""
    agent = parts.agent()
    state, batch = parts.random_state(agent), parts.batch(agent, 4)
    values = {"discount": 0.5, "optimizer.learning_rate": 3e-2}
    told = {name: np.full(4, value, np.float32) for name, value in values.items()}
    update = jax.jit(partial(followed, agent))
    made = update(state, dataclasses.replace(batch, scheduled=told))
    fixed = parts.agent(discount=0.5, optimizer=parts.adam(learning_rate=3e-2))
    expected = jax.jit(fixed.update)(state, batch)
    for one, two in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=2e-5, atol=1e-6)
    plain = jax.jit(agent.update)(state, batch)[1].metrics["learner/loss"]
    assert abs(float(plain) - float(expected[1].metrics["learner/loss"])) > 1e-4


def test_replaced_settings_leave_the_others_and_what_was_computed_of_them():
    agent = parts.agent()
    assert agent.network.is_recurrent  # which is kept in it
    made = replace_settings(agent, {"optimizer.learning_rate": 0.5})
    assert (made.discount, made.optimizer.learning_rate) == (agent.discount, 0.5)
    assert made.network is agent.network
    assert agent.optimizer.learning_rate == 1e-3


def test_a_run_follows_its_schedules_and_tells_their_values(tmp_path):
    given = node("agent.optimizer.learning_rate", "[[0,0.001],[1200,0.0001]]")
    by_updates = node("agent.discount", "[[0,0.9],[10,0.8]]", over="updates", between="step")
    run(tmp_path, f"schedules=[{given},{by_updates}]")
    rows = read_rows(tmp_path / "metrics.jsonl")
    for row in rows:
        name = "schedule/agent.optimizer.learning_rate"
        if row.get(name) is not None:
            middle = row["env_steps"] - 100
            assert row[name] == pytest.approx(1e-3 * (1 - 0.9 * middle / 1200), abs=1e-4)
    assert rows[-1]["schedule/agent.discount"] == pytest.approx(0.8)
    assert rows[0]["schedule/agent.discount"] > 0.8


def test_a_schedule_that_stays_gives_what_a_constant_gives(tmp_path):
    """They are close and not the same bits: XLA folds a constant into its program."""
    held = f"schedules=[{node('agent.discount', '[[0,0.9]]')}]"
    for name, given in {"a": "agent.discount=0.9", "b": held}.items():
        assert run(tmp_path / name, given, "stop_after_updates=1")["updates"] == 1
    first, second = (rlx.load(tmp_path / n).restore().state.params for n in "ab")
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), atol=2e-4)


def test_exploration_goes_from_point_to_point():
    made = Piecewise(points=[(0, 1.0), (100, 0.2), (300, 0.0)])
    lane = np.arange(3)
    for env_steps, amount in {0: 1.0, 50: 0.6, 100: 0.2, 200: 0.1, 300: 0.0, 999: 0.0}.items():
        found = made.amount(lane, 3, env_steps)
        np.testing.assert_allclose(found, [amount] * 3, rtol=1e-6)
        assert found.dtype == np.float32
    with pytest.raises(ValueError, match="ascending order of env steps"):
        Piecewise(points=[(10, 1.0), (10, 0.5)])


@pytest.mark.parametrize("promise", ["deterministic=true", "checkpoint.exact=true"])
def test_a_clock_goes_with_no_promise_of_the_same_bits(promise, tmp_path):
    by_clock = node("agent.discount", "[[0,0.9],[9,0.99]]", over="seconds")
    with pytest.raises(ConfigError, match="schedules=over: seconds: a clock is never the same"):
        run(tmp_path, promise, f"schedules=[{by_clock}]")


# --- of the replay and of the exploration -------------------------------------------------------


def last_row(folder: Path) -> dict[str, Any]:
    return read_rows(folder / "metrics.jsonl")[-1]


@pytest.mark.parametrize("where", ["thread", "process"])
def test_a_replay_follows_its_schedules(where, tmp_path):
    exponent = node("replay.importance_exponent", "[[0,0.2],[800,1.0]]")
    run(tmp_path, f"replay.where={where}", f"schedules=[{exponent}]")
    rows = read_rows(tmp_path / "metrics.jsonl")
    # A row has what the replay used last: the value of the last update, or of the turn's begin.
    expected = [min(1.0, 0.2 + 0.8 * (row["env_steps"] - 8) / 800) for row in rows]
    found = [row["replay/importance_exponent"] for row in rows]
    np.testing.assert_allclose(found, expected, atol=0.012)
    assert found[0] < 0.5
    assert found[-1] == 1.0
    assert rows[0]["schedule/replay.importance_exponent"] < found[0]  # a mean over the interval


def test_a_replay_s_priorities_follow(tmp_path):
    """The mean of a sequence's errors is never above the largest of them."""
    means = {}
    for eta in (0.0, 1.0):
        by = node("replay.priority_eta", f"[[0,{eta}]]")
        run(tmp_path / str(eta), f"schedules=[{by}]", "stop_after_updates=1")
        means[eta] = last_row(tmp_path / str(eta))["replay/priority_mean"]
    assert means[0.0] < 0.9 * means[1.0]


@pytest.mark.parametrize("replay", ["prioritized", "uniform"])
def test_updates_follow_a_ratio_that_changes(replay, tmp_path):
    """The rows that are trained are the integral of the ratio over the env steps."""
    given = node("replay.ratio", "[[0,0.4],[600,1.6]]", between="step")
    tiny = [f"replay={replay}", f"schedules=[{given}]"]
    done = run(tmp_path, *tiny)
    opened = 1200 - 600
    trained = done["updates"] * 4 * 4  # batch size and unroll
    most = 0.4 * 600 + 1.6 * opened
    assert most - 16 - 1.6 * 40 <= trained <= most  # the account opens after some 30 env steps
    assert done["updates"] > 1.3 * 0.8 * 1200 / 16 * 0.9  # more than at the ratio of TINY


def test_a_run_that_is_resumed_has_the_ratio_of_then(tmp_path):
    """Stopped and unstopped runs are the same bits, also where a ratio changes by updates."""
    given = [
        node("replay.ratio", "[[0,0.4],[20,1.6]]", over="updates"),
        node("replay.priority_eta", "[[0,1.0],[25,0.0]]", over="updates"),
        node("agent.discount", "[[0,0.9],[25,0.97]]", over="updates"),
    ]
    own = ["checkpoint.exact=true", f"schedules=[{','.join(given)}]"]
    whole = run(tmp_path / "whole", *own)
    first = run(tmp_path / "parts", *own, "total_env_steps=800")
    assert 0 < first["updates"] < whole["updates"]
    last = run(tmp_path / "parts", *own, f"resume={tmp_path / 'parts'}")
    assert last["updates"] == whole["updates"]
    assert last["params_sha256"] == whole["params_sha256"]


def exploring(points: str = "[[0,0.8],[1000,0.2]]", setting: str = "exploration.value") -> str:
    return f"schedules=[{node(setting, points)}]"


def test_exploration_follows_the_env_steps_of_each_request():
    schedules = [Schedule(setting="exploration.value", over="env_steps", between="linear",
                          points=[(0, 0.8), (1000, 0.2)])]  # fmt: skip
    made = pickle.loads(pickle.dumps(scheduled_exploration(Constant(value=0.5), schedules)))
    lane = np.arange(3)
    for env_steps, amount in {0: 0.8, 500: 0.5, 1000: 0.2, 5000: 0.2}.items():
        np.testing.assert_allclose(made.amount(lane, 3, env_steps), [amount] * 3, rtol=1e-6)
    plain = Constant(value=0.5)
    assert scheduled_exploration(plain, [schedule()]) is plain  # which is of the agent


def test_an_exploration_that_draws_by_episodes_still_does():
    schedules = [Schedule(setting="exploration.lowest", over="env_steps", between="step",
                          points=[(0, 0.5), (1000, 0.001)])]  # fmt: skip
    own = Redrawn(highest=0.5, lowest=0.1, count=64, seed=0)
    made = scheduled_exploration(own, schedules)
    assert isinstance(made, PerEpisode)
    ask = partial(made.episode_amount, np.arange(500), 500)
    zeros = np.zeros(500, np.int64)
    assert (ask(0, zeros, zeros) == 0.5).all()
    expected = dataclasses.replace(own, lowest=0.001)
    later = ask(2000, zeros, zeros)
    np.testing.assert_array_equal(
        later, expected.episode_amount(np.arange(500), 500, 2000, zeros, zeros)
    )
    assert later.min() < 0.01


@pytest.mark.parametrize("acting", ["local", "threads"])
def test_actors_follow_a_schedule_of_the_exploration(acting, tmp_path):
    """All actions are random at first and none is after it, so one action is taken most."""
    given = ["exploration=constant", "exploration.value=0.5", f"acting={acting}"]
    lanes = ["acting.envs_per_actor=4", "acting.env_steps_per_request=8", "learner.batch_size=4"]
    steps = exploring("[[0,1.0],[400,0.0]]").replace("linear", "step")
    run(tmp_path, *given, *lanes, steps, "agent.optimizer.learning_rate=1e-9", "env=catch",
        "agent.target_period_updates=5")  # fmt: skip
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["schedule/exploration.value"] for row in rows][-1] == 0.0
    assert rows[0]["schedule/exploration.value"] == 1.0
    shares = {name for name in rows[0] if name.startswith("acting/action_share/")}
    most = [max(row[name] or 0.0 for name in shares) for row in rows]
    assert most[0] < 0.6  # of three actions
    assert most[-1] > most[0] + 0.1


@pytest.mark.parametrize(
    "given",
    [
        [exploring("[[0,1.0],[100,0.5],[200,1.0]]")],
        ["exploration=piecewise", "exploration.points=[[0,1.0],[100,0.5],[200,1.0]]"],
    ],
    ids=["schedules", "piecewise"],
)
def test_a_dip_in_the_middle_is_none_of_the_policy_s_own_actions(given, tmp_path):
    ppo = ["experiment=cartpole_ppo", "total_env_steps=1000", "logging.console=off"]
    with pytest.raises(ConfigError, match="an agent that learns its policy needs actions that"):
        rlx.run(rlx.compose([*ppo, *given]), tmp_path)


def test_random_actions_for_the_whole_run_are_none_where_a_schedule_ends_them(tmp_path):
    given = ["exploration=constant", "exploration.value=1.0", "stop_after_updates=1"]
    with pytest.raises(ConfigError, match="its amount stays 1"):
        run(tmp_path / "a", *given)
    assert run(tmp_path / "b", *given, exploring("[[0,1.0],[100,0.5],[9999,1.0]]"))["updates"] == 1


# --- weights by env steps ------------------------------------------------------------------------

BY_ENV_STEPS = ["learner.publish_every_updates=null", "learner.publish_every_env_steps=200"]


def test_weights_are_published_by_env_steps(tmp_path, monkeypatch):
    published: list[tuple[int, int]] = []
    publish = Stages.publish

    def noted(self: Stages, given: Any = None) -> None:
        publish(self, given)
        published.append((self._given_env_steps, self._acting_version))

    monkeypatch.setattr(Stages, "publish", noted)
    run(tmp_path, *BY_ENV_STEPS)
    env_steps = [at for at, _ in published]
    assert env_steps[0] == 0
    assert [at // 200 for at in env_steps] == sorted({at // 200 for at in env_steps})
    assert len(published) >= 4  # of 1,200 env steps, the first ones without an update
    versions = [version for _, version in published]
    assert versions == sorted(set(versions))
    rows = read_rows(tmp_path / "metrics.jsonl")
    ages = [row["weights/age_env_steps"] for row in rows if row["weights/age_env_steps"]]
    assert ages
    assert all(0 < age < 450 for age in ages)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["learner.publish_every_env_steps=200"], "one of them says when actors get new weights"),
        (
            ["learner.publish_every_updates=null"],
            "publish_every_updates=null and publish_",
        ),
        (
            [*BY_ENV_STEPS, "acting=threads", "acting.max_weight_age_updates=9"],
            "weights are published by env steps",
        ),
    ],
)
def test_there_is_one_rule_for_publishing(given, says, tmp_path):
    tiny = [s for s in TINY if not (s.startswith(("acting.", "learner.publish")))]
    with pytest.raises(ConfigError) as caught:
        rlx.run(rlx.compose([*tiny, "acting.envs_per_actor=4", *given]), tmp_path)
    assert says in str(caught.value)
