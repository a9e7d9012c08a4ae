"""Actors in threads: the keystone, waiting, real time, and an environment that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlx.acting.acting_thread import Orders
from rlx.acting.thread_pool import OpenThreadPool, ThreadPool
from rlx.cluster.faults import ActingFailed
from rlx.envs.gymnasium import Gymnasium
from rlx.problems import ConfigError
from rlx.types import Rollout, Weights
from tests.acting.drawing import DRAWN, assert_drawn
from tests.acting.faulty_envs import FaultyFamily
from tests.acting.test_keystone import (
    CARTPOLE,
    PONG,
    context,
    difference,
    family,
    make_agent,
    make_replay,
)
from tests.acting.test_ray_pool import (
    OF_THE_RUN,
    assert_in_order_and_once,
    streams,
    wait_for,
    weights_of,
)


@pytest.fixture
def pool() -> Iterator[Callable[..., OpenThreadPool]]:
    made: list[OpenThreadPool] = []

    def make(envs: Any = None, **changes: Any) -> OpenThreadPool:
        envs = family(**CARTPOLE) if envs is None else envs
        settings: dict[str, Any] = {
            "instances": 2,
            "envs_per_actor": 4,
            "env_steps_per_request": 40,
            "requests_per_actor": 2,
            "device": "learner",
            "realtime": False,
            "max_pending": 3,
            "max_weight_age_updates": None,
            "request_timeout_s": 60.0,
        }
        agent = changes.pop("agent", None) or make_agent(envs)
        told = {name: changes.pop(name) for name in OF_THE_RUN if name in changes}
        made.append(ThreadPool(**settings | changes).open(context(envs, agent, **told)))
        return made[-1]

    yield make
    for each in made:
        each.close(2.0)


def collect(pool: OpenThreadPool, env_steps: int, lanes: int = 1) -> list[Rollout]:
    """Rollouts until there are so many env steps, and blocks of so many lanes."""
    rollouts: list[Rollout] = []
    end = time.monotonic() + 60
    while (
        sum(r.env_steps for r in rollouts) < env_steps
        or len({lane for lane, _ in streams(rollouts)}) < lanes
    ):
        assert time.monotonic() < end
        rollouts += pool.collect(0.5, 0)
    return rollouts


@pytest.mark.parametrize("environment", [CARTPOLE, CARTPOLE | {"batch_size": 1}])
def test_lanes_draw_in_threads_what_they_draw_elsewhere(pool, environment):
    envs = family(**environment)
    actors = pool(envs, instances=1, envs_per_actor=6, exploration=DRAWN)
    actors.publish(weights_of(make_agent(envs)), 0)
    rollouts = collect(actors, 600, lanes=6)
    assert assert_drawn(e for rollout in rollouts for e in rollout.episodes) > 1


@pytest.mark.parametrize(
    "environment", [CARTPOLE, PONG, CARTPOLE | {"batch_size": 1}], ids=["vector", "pong", "async"]
)
def test_replayed_q_equals_acting_q_and_blocks_come_in_order_and_once(pool, environment):
    envs = family(**environment)
    agent = make_agent(envs)
    actors = pool(envs, agent=agent)
    weights = weights_of(agent)
    actors.publish(weights, 0)
    replay = make_replay(agent, 8, capacity=320)
    rollouts = collect(actors, 800, lanes=8)
    for rollout in rollouts:
        replay.add(rollout)
    assert_in_order_and_once(rollouts)
    assert {lane for lane, _ in streams(rollouts)} == set(range(8))
    assert difference(agent, weights.params, replay.sample(64).batch) < 1e-4


def test_threads_wait_for_the_loop(pool):
    actors = pool()
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)
    collect(actors, 80, lanes=8)
    arrived = actors._threads._arrived
    wait_for(lambda: arrived.qsize() == 2 * 2, "two requests of two threads")
    time.sleep(0.5)
    waiting = actors.collect(0.0, 0)
    assert len(waiting) == 2 * 2 * 2  # threads, requests, groups of lanes
    assert actors.burst_env_steps == 2 * 2 * 40


def test_orders_are_the_newest_weights_and_the_progress_of_the_run():
    orders, weights = Orders(100), Weights(version=3, params={})
    orders.note(env_steps=50, updates=3)
    orders.publish(weights, 120)  # as of before the last rollouts were counted
    assert orders.read() == (weights, 150, 3)
    orders.publish(weights, 200)
    orders.note(env_steps=5)
    assert orders.read() == (weights, 205, 3)


def test_threads_act_with_weights_of_the_oldest_age_and_with_none_older(pool):
    actors = pool(max_weight_age_updates=5, instances=1)
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)  # of version 0
    wait_for(lambda: actors.collect(0.1, 5), "rollouts of weights that are 5 updates old")
    wait_for(lambda: not actors.collect(1.0, 6), "the end of acting with older ones", 10.0)


def test_in_real_time_what_finds_no_room_is_dropped_and_counted_and_nothing_is_spliced(pool):
    actors = pool(realtime=True, instances=1)
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)
    rollouts = collect(actors, 80)
    end = time.monotonic() + 30
    while not actors.stats()["acting/dropped_env_steps"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(0.5)
    assert len(rollouts + actors.collect(0.0, 0)) >= 3
    rollouts += collect(actors, 400)
    assert_in_order_and_once(rollouts[:2])
    chains = {chain for _, chain in streams(rollouts)}
    assert len(chains) > 1
    for numbers in streams(rollouts).values():
        assert numbers == list(range(len(numbers)))


def test_an_environment_that_hangs_ends_the_run_with_its_name(pool):
    inner = family(**CARTPOLE)
    envs = FaultyFamily(inner=inner, fault="hangs", after=5)
    actors = pool(envs, agent=make_agent(inner), request_timeout_s=1.0)
    actors.publish(weights_of(make_agent(inner)), 0)
    with pytest.raises(ActingFailed, match=r"acting thread \d: its environments have not answered"):
        collect(actors, 10_000)


def test_what_an_environment_raises_ends_the_run(pool):
    inner = family(**CARTPOLE)
    envs = FaultyFamily(inner=inner, fault="raises", after=5)
    actors = pool(envs, agent=make_agent(inner))
    actors.publish(weights_of(make_agent(inner)), 0)
    with pytest.raises(ActingFailed, match=r"acting thread \d ended by ValueError") as failed:
        collect(actors, 10_000)
    assert "out of coal" in str(failed.value)
    assert "faulty_envs.py" in str(failed.value)  # the traceback


def test_environments_that_never_open_end_the_run_too(pool):
    inner = family(**CARTPOLE)
    envs = FaultyFamily(inner=inner, fault="hangs_at_once", after=0)
    actors = pool(envs, agent=make_agent(inner), request_timeout_s=1.0)
    with pytest.raises(ActingFailed, match="its environments have not answered for 1 s"):
        collect(actors, 10_000)


def test_a_long_request_is_no_hang_and_ends_when_the_pool_does(pool):
    envs = family(**CARTPOLE)
    actors = pool(envs, env_steps_per_request=10**9, request_timeout_s=1.0)
    actors.publish(weights_of(make_agent(envs)), 0)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        assert actors.collect(0.2, 0) == []
    actors.close(20.0)
    assert not any(thread._thread.is_alive() for thread in actors._threads.threads)


def test_other_environments_than_envpools_act_in_threads_too(pool):
    envs: Any = Gymnasium(
        id="CartPole-v1", vector="sync", max_episode_steps=None, kwargs={},
        observe=None, components=None, scale=None, action_mask=None, image="auto",
        wrappers=[], restarts=0, per_actor={},
        frames_per_env_step=None,
    )  # fmt: skip
    actors = pool(envs)
    actors.publish(weights_of(make_agent(envs)), 0)
    assert_in_order_and_once(collect(actors, 400, lanes=8))


def test_an_odd_number_of_lanes_makes_no_two_groups(pool):
    with pytest.raises(ConfigError, match=r"acting\.envs_per_actor=5: .* even"):
        pool(envs_per_actor=5)


def test_a_batch_size_that_suits_all_lanes_but_not_a_group_is_refused(pool):
    envs = family(**CARTPOLE | {"batch_size": 3})
    with pytest.raises(ConfigError, match=r"env\.batch_size=3; accepted: 1 \.\. 2 .*each group"):
        pool(envs)
