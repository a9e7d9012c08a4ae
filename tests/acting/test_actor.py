"""The acting loop: what an environment answers is what the rows, lanes and chains say."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from rlx import trees
from rlx.acting.actor import Actor, BlockWriter
from rlx.acting.exploration import Constant, Ladder, Linear
from rlx.acting.local_pool import LocalPool
from rlx.acting.plan import make_plan, row_spec
from rlx.acting.policy import Policy
from rlx.envs.gymnasium import Gymnasium
from rlx.envs.lanes import EpisodeCounter
from rlx.types import Request, Row, Weights
from tests import parts
from tests.acting.drawing import DRAWN, assert_drawn, drawn
from tests.acting.test_keystone import context
from tests.replay.replay_streams import carry_spec, fill
from tests.replay.replay_streams import row_spec as stream_spec

LANES = 5


def ends(**kwargs: Any) -> Gymnasium:
    return Gymnasium(
        id="tests.worlds:rlx-test/Ends-v0",
        kwargs=kwargs,
        vector="sync",
        observe=None,
        components=None,
        scale=None,
        action_mask=None,
        image="auto",
        wrappers=[],
        frames_per_env_step=None,
        max_episode_steps=None,
        restarts=0,
        per_actor={},
    )


def make_agent(family: Gymnasium, core: str = "lstm", block_rows: int = 4) -> Any:
    net = parts.network(family.spec(), core, torso=parts.mlp(8))
    return parts.agent(net, block_rows=block_rows, stride=block_rows)


def weights_of(agent: Any) -> Weights:
    params = jax.jit(agent.init)(jax.random.PRNGKey(0)).params
    return Weights(version=0, params=jax.tree.map(np.asarray, params))


def rows_of_lanes(family: Gymnasium) -> dict[int, Row]:
    """Each lane's rows of some 60 env steps, end to end."""
    agent = make_agent(family)
    settings = LocalPool(
        instances=1, envs_per_actor=LANES, env_steps_per_request=60 * LANES, device="cpu"
    )
    pool = settings.open(context(family, agent, exploration=Constant(value=1.0)))
    pool.publish(weights_of(agent), 0)
    (rollout,) = pool.collect(60.0, 0)
    pool.close(10.0)
    found = {}
    for lane in range(LANES):
        mine = np.flatnonzero(rollout.lane == lane)
        blocks = [trees.tree_map(lambda x, m=m: x[m], rollout.rows) for m in mine]
        assert rollout.number[mine].tolist() == list(range(len(mine)))
        found[lane] = trees.tree_map(lambda *x: np.concatenate(x), *blocks)
    return found


@pytest.mark.parametrize("both", [False, True])
def test_terminations_and_truncations_reach_the_rows(both):
    for rows in rows_of_lanes(ends(both=both)).values():
        episode, time = rows.inputs.observation["observation"].T
        last = time == 2 + episode % 3  # the row whose action ends the episode
        assert last.sum() > 10
        np.testing.assert_array_equal(rows.valid, time < 3 + episode % 3)
        np.testing.assert_array_equal(rows.discount[rows.valid & ~last], 1)
        np.testing.assert_array_equal(rows.discount[last], episode[last] % 2)
        assert set(rows.discount[last]) == {0.0, 1.0}
        np.testing.assert_array_equal(rows.discount[~rows.valid], 0)
        np.testing.assert_array_equal(rows.inputs.first, time == 0)
        reward = 100 * episode + time + 1
        np.testing.assert_array_equal(rows.reward[rows.valid], reward[rows.valid])
        np.testing.assert_array_equal(rows.inputs.time, time)


def test_answers_come_in_the_order_of_the_lanes_that_were_asked():
    """Each lane has another reward and ends at another time."""
    env = ends().make(lanes=4, seeds=range(4))
    env.reset()
    order, seen = np.array([2, 0, 3, 1], np.int32), Counter()
    everyone = np.zeros(4, np.int32)
    for _ in range(9):
        answer = env.step(everyone, order)
        np.testing.assert_array_equal(answer.lane, order)
        episode, time = answer.observation["observation"].T
        assert len(set(answer.reward.tolist())) > 1
        expected = np.where(answer.first, 0, 100 * episode + time)
        np.testing.assert_array_equal(answer.reward, expected)
        ended = time == 3 + episode % 3
        np.testing.assert_array_equal(answer.terminated, ended & (episode % 2 == 0))
        np.testing.assert_array_equal(answer.truncated, ended & (episode % 2 == 1))
        seen.update(answer.terminated.tolist())
    assert seen[True] > 0
    env.close()


def test_lanes_have_seeds_of_their_own_however_many_actors_there_are():
    family = ends()
    agent = make_agent(family)

    def seeds(instances: int, chain: int) -> list[int]:
        each = 12 // instances
        told = context(family, agent)
        plan = make_plan(told, instances=instances, envs_per_actor=each, device="cpu")
        return [seed for i in range(instances) for seed in plan.seeds(i, chain)]

    for chain in (0, 1, 7):
        assert seeds(1, chain) == seeds(3, chain) == seeds(12, chain)
    every = [seed for chain in range(20) for seed in seeds(4, chain)]
    assert len(set(every)) == len(every)


def test_an_actor_explores_as_its_lanes_of_the_run_do_by_then():
    family, ladder = (
        ends(),
        Ladder(base=0.4, exponent=3.0, minimum=0.0, final_scale=0.5, decay_env_steps=1000),
    )
    agent = make_agent(family)
    plan = make_plan(
        context(family, agent, exploration=ladder), instances=2, envs_per_actor=3, device="cpu"
    )
    actor: Actor = plan.actor(1, 0)
    amounts = ladder.amount(np.arange(6), 6, 500)
    request = Request(weights=weights_of(agent), env_steps=500, want_env_steps=60, want_blocks=None)
    rollout = actor.collect(request)
    assert set(rollout.lane.tolist()) == {3, 4, 5} == {e.lane for e in rollout.episodes}
    for episode in rollout.episodes:
        assert episode.epsilon == pytest.approx(amounts[episode.lane])
    actor.close()


def test_an_actor_draws_where_an_episode_begins_and_acts_by_it(monkeypatch):
    """Many episodes end within a request, and some go on from one to the next."""
    family = ends()
    agent = make_agent(family)
    plan = make_plan(
        context(family, agent, exploration=DRAWN), instances=2, envs_per_actor=3, device="cpu"
    )
    actor: Actor = plan.actor(1, 2)
    told, start = [], actor._policy.start

    def spy(inputs: Any, lane: Any, exploration: np.ndarray) -> Any:
        told.append((np.array(inputs.first), np.array(exploration)))
        return start(inputs, lane, exploration)

    monkeypatch.setattr(actor._policy, "start", spy)
    episodes: list[Any] = []
    for turn in range(4):
        weights = weights_of(agent) if turn == 0 else None
        request = Request(weights=weights, env_steps=0, want_env_steps=50, want_blocks=None)
        episodes += actor.collect(request).episodes
    assert {episode.chain for episode in episodes} == {2}
    assert assert_drawn(episodes) > 4
    number = np.full(3, -1)
    for first, exploration in told:
        number += first
        assert exploration.tolist() == [drawn(3 + i, 2, number[i]) for i in range(3)]
    actor.close()


def test_what_a_lost_lane_has_ended_is_of_its_old_chain():
    """An actor in a server is lost between an episode's last answer and the next first one."""
    family = ends()
    agent = make_agent(family)
    plan = make_plan(
        context(family, agent, exploration=DRAWN), instances=1, envs_per_actor=3, device="cpu"
    )
    actor: Actor = plan.actor(0, 0)
    weights = weights_of(agent)
    actor.begin(Request(weights=weights, env_steps=0, want_env_steps=9**9, want_blocks=None))
    while not actor._env._tracker._counter._ended:
        actor.advance()
        actor._env._tracker.count()
    lanes = [ended.lane for ended in actor._env._tracker._counter._ended]
    actor.restart(np.array(lanes))
    episodes = actor.end().episodes
    assert {episode.chain for episode in episodes} == {0}
    assert_drawn(episodes)
    actor.close()


def test_a_local_pool_tells_its_actors_how_far_the_run_is():
    """Until the learner has begun there are no new weights, and schedules go on."""
    family, line = ends(), Linear(start=1.0, final=0.0, decay_env_steps=200)
    agent = make_agent(family)
    settings = LocalPool(instances=2, envs_per_actor=3, env_steps_per_request=30, device="cpu")
    pool = settings.open(context(family, agent, exploration=line, env_steps=20))
    pool.publish(weights_of(agent), 20)
    env_steps, seen = 20, []
    for turn in range(5):
        (rollout,) = pool.collect(60.0, 0)
        assert set(rollout.lane.tolist()) == ({0, 1, 2} if turn % 2 == 0 else {3, 4, 5})
        seen = [episode.epsilon for episode in rollout.episodes]
        np.testing.assert_allclose(seen, 1 - env_steps / 200, rtol=1e-6)
        env_steps += rollout.env_steps
    assert seen
    pool.close(10.0)


# --- the policy ----------------------------------------------------------------------------------


def make_policy(agent: Any, lanes: int, pad: bool = False) -> Policy:
    policy = Policy(agent=agent, lanes=lanes, seed=3, path=("p",), device="cpu", pad=pad)
    policy.take(weights_of(agent))
    return policy


@pytest.mark.parametrize("lane", [None, np.arange(2000, dtype=np.int32)], ids=["all", "some"])
def test_the_same_inputs_are_acted_on_anew_each_time(lane):
    agent = make_agent(ends(), core="none")
    policy = make_policy(agent, 2000)
    inputs = parts.inputs(agent.spec, 1, 1, rng=np.random.default_rng(0))
    inputs = trees.tree_map(lambda x: np.repeat(x[0], 2000, axis=0), inputs)
    half = np.full(2000, 0.5, np.float32)
    actions = np.stack([policy.act(inputs, lane, half)[0] for _ in range(4)])
    greedy, _ = policy.act(inputs, lane, np.zeros(2000, np.float32))
    assert len(set(greedy.tolist())) == 1
    share = (actions != greedy).mean(axis=1)
    np.testing.assert_allclose(share, 0.25, atol=0.05)  # half are random, of two actions
    for a, b in itertools.pairwise(actions):
        apart = (a != b).mean()
        assert 0.3 < apart < 0.45  # 2 * 1/4 * 3/4 = 0.375; 0 with a key that stands still
    all_random = policy.act(inputs, lane, np.ones(2000, np.float32))[0]
    np.testing.assert_allclose(all_random.mean(), 0.5, atol=0.06)


def test_actors_and_their_lives_draw_random_actions_of_their_own():
    family = ends()
    agent = make_agent(family)
    plan = make_plan(context(family, agent), instances=2, envs_per_actor=60, device="cpu")
    inputs = parts.inputs(agent.spec, 60, rng=np.random.default_rng(0))

    def drawn(index: int, chain: int) -> bytes:
        policy = plan.policy(index, chain)
        policy.take(weights_of(agent))
        return policy.act(inputs, None, np.ones(60, np.float32))[0].tobytes()

    assert drawn(1, 2) == drawn(1, 2)
    assert len({drawn(index, chain) for index in range(2) for chain in range(2)}) == 4


@pytest.mark.parametrize("n", [1, 3, 5, 6])
def test_padding_changes_no_action_and_no_carry(n):
    agent, rng = make_agent(ends()), np.random.default_rng(1)
    plain, padded = make_policy(agent, 7), make_policy(agent, 7, pad=True)
    greedy = np.zeros(n, np.float32)
    for _ in range(4):
        lane = rng.permutation(7)[:n].astype(np.int32)
        lane[0] = 0  # lane 0, into which padding might write
        lane = np.unique(np.append(lane, 0)).astype(np.int32)[:n]
        inputs = trees.tree_map(lambda x: x[0], parts.inputs(agent.spec, 1, len(lane), rng=rng))
        one, kept = plain.act(inputs, lane, greedy[: len(lane)])
        other, also = padded.act(inputs, lane, greedy[: len(lane)])
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(kept.q, also.q, rtol=1e-5, atol=1e-6)
        every = np.arange(7)
        for a, b in zip(
            trees.flatten(plain.carry(every)).values(),
            trees.flatten(padded.carry(every)).values(),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- lanes that begin anew -----------------------------------------------------------------------


@pytest.mark.parametrize("open_row", [True, False])
def test_a_writer_that_is_restarted_drops_the_open_block_of_that_lane_only(open_row):
    writer = BlockWriter(lanes=3, block_rows=2, row=stream_spec(), carry=carry_spec())
    inputs, every = fill(stream_spec().inputs, (3,)), slice(None)

    def begin(time: int) -> None:
        starts = writer.next_starts(every)
        if len(starts):
            carry = fill(carry_spec(), (len(starts),))
            carry = trees.tree_map(lambda x: x + time, carry)
            writer.begin(starts, carry, time)
        at = writer.open(every, dataclasses.replace(inputs, time=np.full(3, time, np.int32)))
        acting = fill(stream_spec().acting, (3,))
        writer.decide(at, np.zeros(3, np.int32), acting)

    def close(index: Any) -> np.ndarray:
        zero = np.zeros(3, np.float32)[index]
        return writer.close(index, zero, zero + 1, zero == 0)

    def one_row(time: int) -> np.ndarray:
        begin(time)
        return close(every)

    assert not len(one_row(0))
    assert one_row(1).tolist() == [0, 1, 2]
    assert writer.take(np.arange(3))[2].tolist() == [0, 0, 0]
    begin(2)
    if open_row:
        writer.restart(np.array([1]))  # its answer does not come
        assert not len(close(np.array([0, 2])))
    else:
        assert not len(close(every))
        writer.restart(np.array([1]))  # with one row in its block
    assert one_row(3).tolist() == [0, 2]
    rows, _, number, version = writer.take(np.array([0, 2]))
    assert (number.tolist(), version.tolist()) == ([1, 1], [2, 2])
    assert rows.inputs.time.tolist() == [[2, 3], [2, 3]]
    assert one_row(4).tolist() == [1]
    rows, carry, number, version = writer.take(np.array([1]))
    assert (number.tolist(), version.tolist()) == ([0], [3])
    assert rows.inputs.time.tolist() == [[3, 4]]
    assert (carry.core[0] == 3).all()  # before its first row, not of the one that was dropped


def test_an_actor_s_restarted_lane_begins_a_new_chain():
    family = ends()
    agent = make_agent(family, block_rows=4)
    plan = make_plan(context(family, agent), instances=1, envs_per_actor=3, device="cpu")
    actor: Actor = plan.actor(0, 0)
    request = Request(weights=weights_of(agent), env_steps=0, want_env_steps=18, want_blocks=None)
    before = actor.collect(request)
    assert set(before.chain.tolist()) == {0}
    actor.restart(np.array([1], np.intp))
    after = actor.collect(dataclasses.replace(request, weights=None, want_env_steps=60))
    chains = {lane: sorted(set(after.chain[after.lane == lane].tolist())) for lane in range(3)}
    assert chains == {0: [0], 1: [1], 2: [0]}
    own = after.lane == 1
    assert after.number[own].tolist() == list(range(own.sum()))
    others = after.number[after.lane == 0].tolist()
    assert others[0] == before.number[before.lane == 0].max() + 1
    episode, time = np.moveaxis(after.rows.inputs.observation["observation"], -1, 0)
    goes_on = (np.diff(time) == 1) & (np.diff(episode) == 0)
    assert (goes_on | ((time[:, 1:] == 0) & (np.diff(episode) == 1))).all()  # no row of before
    for lane in range(3):  # lane 1 ends its blocks at other times than the others
        (mine,) = np.nonzero(after.lane == lane)
        following = trees.tree_map(lambda x, m=mine: x[m[:-1]], after.next)
        first = trees.tree_map(lambda x, m=mine: x[m[1:], 0], after.rows.inputs)
        trees.tree_map(np.testing.assert_array_equal, following, first)
    actor.close()


def test_blocks_after_dropped_ones_are_of_a_new_chain():
    family = ends()
    agent = make_agent(family, block_rows=4)
    plan = make_plan(context(family, agent), instances=1, envs_per_actor=3, device="cpu")
    actor: Actor = plan.actor(0, 0)
    request = Request(weights=weights_of(agent), env_steps=0, want_env_steps=40, want_blocks=None)
    before = actor.collect(request)
    actor.new_chains()
    after = actor.collect(dataclasses.replace(request, weights=None))
    assert (set(before.chain.tolist()), set(after.chain.tolist())) == ({0}, {1})
    assert actor.chain == 1
    for lane in range(3):
        numbers = after.number[after.lane == lane].tolist()
        assert numbers == list(range(len(numbers)))
    first = after.rows.inputs.time[after.number == 0, 0]
    assert (first > 0).any()  # the episodes go on
    actor.close()


def test_returns_are_exact_where_float32_sums_are_not():
    counter = EpisodeCounter(lanes=1, frames_per_env_step=4)
    lane, no = np.zeros(1, np.int32), np.zeros(1, bool)
    rewards = [2.0**24, *[1.0] * 5]
    for i, reward in enumerate(rewards):
        ended = np.array([i == len(rewards) - 1])
        given = np.float32([reward])
        counter.add(index=slice(None), lane=lane, reward=given, first=no, ended=ended)
    (episode,) = counter.take()
    assert episode.return_ == 2.0**24 + 5
    assert (episode.env_steps, episode.frames) == (6, 24)


def test_rows_of_an_actor_are_of_the_spec_that_the_replay_is_told():
    family = ends()
    agent = make_agent(family)
    spec = row_spec(agent.spec, agent.acting_spec)
    for rows in rows_of_lanes(family).values():
        for path, leaf in trees.flatten(rows).items():
            told = trees.flatten(spec)[path]
            assert (leaf.shape[1:], str(leaf.dtype)) == (told.shape, told.dtype), path
