"""Actors on Ray: real processes, real kills. One small cluster for all tests of this file."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from rlx import trees
from rlx.acting.exploration import Constant, Ladder
from rlx.acting.ray_pool import OpenRayPool, RayPool
from rlx.cluster import logs as ray_logs
from rlx.cluster.faults import ActingFailed, Restarts
from rlx.cluster.fleet import Answered, Deadlines, Fleet, Lost, Ready, cause_of
from rlx.cluster.logs import last_lines_of
from rlx.cluster.whereabouts import whereabouts
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

LANES = 3
PATIENCE_S = 120.0
LADDER = Ladder(base=0.4, exponent=7.0, minimum=0.0, final_scale=1.0, decay_env_steps=None)
RESTARTS = Restarts(
    window_s=600.0, max_raised=3, max_fruitless=30, first_wait_s=0.1, longest_wait_s=1.0
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the head's actors compile; other tests run meanwhile, and have another."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def cluster(programs: Path) -> Iterator[Cluster]:
    """A head with room for the actors of one pool; tests add nodes and take them away."""
    head = {"num_cpus": 4, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))  # its processes inherit it
        made = Cluster(initialize_head=True, head_node_args=head)
    made.connect()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def pool(cluster) -> Iterator[Callable[..., OpenRayPool]]:
    """Makes pools and closes them."""
    made: list[OpenRayPool] = []

    def make(envs: Any = None, **changes: Any) -> OpenRayPool:
        made.append(make_pool(family(**CARTPOLE) if envs is None else envs, **changes))
        return made[-1]

    yield make
    for each in made:
        each.close(10.0)
    wait_for(lambda: not actor_processes(), "the actors' processes to end")


OF_THE_RUN = ("exploration", "seed", "chain", "env_steps", "round_blocks")


def make_pool(envs: Any, **changes: Any) -> OpenRayPool:
    settings: dict[str, Any] = {
        "instances": 2,
        "envs_per_actor": LANES,
        "env_steps_per_request": LANES * 10,
        "requests_per_actor": 2,
        "sync": False,
        "min_instances": 1,
        "inference": "actor",
        "max_batch": 64,
        "max_wait_ms": 2.0,
        "cpus_per_actor": 1.0,
        "gpus_per_actor": 0.0,
        "memory_per_actor": None,
        "resources": {},
        "placement": "PACK",
        "threads_per_actor": 1,
        "address": None,
        "compress": "lz4",
        "weights_dtype": "float32",
        "max_weight_age_updates": None,
        "max_in_flight_bytes": 10_000_000,
        "ingest_threads": 1,
        "start_at_once": 4,
        "start_timeout_s": 90.0,
        "request_timeout_s": 60.0,
        "resource_timeout_s": 60.0,
        "grace_s": 60.0,
        "restarts": RESTARTS,
    }
    agent = changes.pop("agent", None) or make_agent(envs)
    told = {name: changes.pop(name) for name in OF_THE_RUN if name in changes}
    told = {"exploration": LADDER} | told
    return RayPool(**settings | changes).open(context(envs, agent, **told))


def weights_of(agent: Any, version: int = 0) -> Weights:
    state = agent.init(jax.random.PRNGKey(0))
    return Weights(version=version, params=jax.tree.map(np.asarray, state.params))


def actor_processes() -> list[psutil.Process]:
    """Below this process; other programs may have Ray actors, too."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any("ray::Remote" in part for part in process.cmdline()):
                found.append(process)
    return found


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def collect(pool: OpenRayPool, env_steps: int, updates: int = 0, lanes: int = 1) -> list[Rollout]:
    """Rollouts until there are so many env steps, and blocks of so many lanes."""
    rollouts: list[Rollout] = []
    end = time.monotonic() + PATIENCE_S
    while (
        sum(r.env_steps for r in rollouts) < env_steps
        or len({lane for lane, _ in streams(rollouts)}) < lanes
    ):
        assert time.monotonic() < end, f"{len(rollouts)} rollouts in {PATIENCE_S} s"
        rollouts += pool.collect(0.5, updates)
    return rollouts


def collect_until(pool: OpenRayPool, stat: str, value: float) -> list[Rollout]:
    """Rollouts until a figure of `stats` has this value.

    An actor whose answers nobody collects is asked nothing more, so its end is not noticed.
    """
    rollouts: list[Rollout] = []
    end = time.monotonic() + PATIENCE_S
    while pool.stats()[stat] != value:
        assert time.monotonic() < end, f"{stat} is not {value} in {PATIENCE_S} s: {pool.stats()}"
        rollouts += pool.collect(0.5, 0)
    return rollouts


def streams(rollouts: list[Rollout]) -> dict[tuple[int, int], list[int]]:
    """(lane, chain) -> the numbers of its blocks, as they arrived."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rollout in rollouts:
        for lane, chain, number in zip(rollout.lane, rollout.chain, rollout.number, strict=True):
            found[int(lane), int(chain)].append(int(number))
    return found


def assert_in_order_and_once(rollouts: list[Rollout]) -> None:
    newest: dict[int, int] = {}
    for rollout in rollouts:
        for lane, chain in zip(rollout.lane.tolist(), rollout.chain.tolist(), strict=True):
            assert chain >= newest.get(lane, 0), "a block of an older chain came after a newer one"
            newest[lane] = chain
    for numbers in streams(rollouts).values():
        assert numbers == list(range(len(numbers)))


# --- what arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "changes"),
    [
        (PONG, {"env_steps_per_request": 4, "ingest_threads": 3}),
        (CARTPOLE | {"batch_size": 2}, {"instances": 3, "compress": "none"}),
        (CARTPOLE | {"batch_size": 2}, {"inference": "server", "max_batch": 3}),
        (PONG, {"inference": "server"}),
    ],
    ids=["pong-lz4", "async-raw", "server-async", "server-pong"],
)
def test_replayed_q_equals_acting_q_and_blocks_come_in_order_and_once(pool, environment, changes):
    envs = family(**environment)
    agent = make_agent(envs)
    actors = pool(envs, agent=agent, **changes)
    weights = weights_of(agent)
    actors.publish(weights, 0)
    instances = changes.get("instances", 2)
    replay = make_replay(agent, instances * LANES, capacity=360)
    rollouts = collect(actors, 700, lanes=instances * LANES)
    for rollout in rollouts:
        replay.add(rollout)
    assert replay.env_steps > replay.rows  # wrapped around
    assert_in_order_and_once(rollouts)
    assert {lane for lane, _ in streams(rollouts)} == set(range(instances * LANES))
    batch = replay.sample(64).batch
    assert batch.rows.inputs.first[:, 1:].any()
    assert difference(agent, weights.params, batch) < 1e-4


@pytest.mark.parametrize("inference", ["actor", "server"])
def test_a_lane_acts_as_it_does_in_the_process(pool, inference):
    from rlx.acting.local_pool import LocalPool

    envs = family(**CARTPOLE)
    agent = make_agent(envs)
    shared: dict[str, Any] = {
        # A server's random numbers are others than its actors' would be.
        "exploration": Constant(value=0.0) if inference == "server" else LADDER,
        "seed": 5, "chain": 0, "env_steps": 0, "round_blocks": None,
    }  # fmt: skip
    local = LocalPool(
        instances=2, envs_per_actor=LANES, env_steps_per_request=LANES * 10, device="cpu",
    ).open(context(envs, agent, **shared))  # fmt: skip
    weights = weights_of(agent)
    local.publish(weights, 0)
    actors = pool(envs, agent=agent, inference=inference, **shared)
    actors.publish(weights, 0)
    here = [r for _ in range(8) for r in local.collect(1.0, 0)]
    there = collect(actors, 240, lanes=2 * LANES)

    def first_block(rollouts: list[Rollout], lane: int) -> Any:
        for rollout in rollouts:
            at = np.flatnonzero((rollout.lane == lane) & (rollout.number == 0))
            if len(at):
                return trees.tree_map(lambda x, i=at[0]: x[i], rollout.rows)
        raise AssertionError(f"no block of lane {lane}")

    for lane in range(2 * LANES):
        mine, theirs = first_block(here, lane), first_block(there, lane)
        np.testing.assert_array_equal(mine.action, theirs.action)
        np.testing.assert_array_equal(mine.inputs.observation["observation"],
                                      theirs.inputs.observation["observation"])  # fmt: skip
        np.testing.assert_allclose(mine.acting.q, theirs.acting.q, rtol=1e-5)


@pytest.mark.parametrize("inference", ["actor", "server"])
def test_the_action_in_a_row_is_what_its_environment_did(pool, inference):
    """The paddle of Catch shows it: it moves by -1, 0 or 1 cells."""
    envs = family(id="Catch-v0")
    agent = make_agent(envs)
    actors = pool(envs, agent=agent, inference=inference, exploration=Constant(value=0.8))
    actors.publish(weights_of(agent), 0)
    moves = 0
    for rollout in collect(actors, 600, lanes=2 * LANES):
        rows = rollout.rows
        floor = rows.inputs.observation["observation"][:, :, -1]  # [M, K, 5]
        paddle = floor.argmax(-1)
        expected = np.clip(paddle[:, :-1] + rows.action[:, :-1] - 1, 0, 4)
        known = rows.valid[:, :-1] & (floor.sum(-1)[:, 1:] == 1)  # else the ball is down there, too
        np.testing.assert_array_equal(paddle[:, 1:][known], expected[known])
        moves += int((paddle[:, 1:] != paddle[:, :-1])[known].sum())
    assert moves > 50


# --- weights -------------------------------------------------------------------------------------


def test_the_newest_weights_ride_on_the_next_request(pool):
    actors = pool()
    agent = make_agent(family(**CARTPOLE))
    for version in (0, 7, 30):
        actors.publish(weights_of(agent, version), 0)
        versions: list[int] = []
        while version not in versions:
            for rollout in collect(actors, 30):
                versions += rollout.weights_version.tolist()
        assert versions == sorted(versions) or version == 0
    actors.collect(0.0, updates=35)
    stats = actors.stats()
    assert 0 < stats["weights/publish_to_used_s"] < 60
    assert 5 <= stats["weights/used_age_updates"] <= 35


def test_actors_wait_rather_than_act_with_older_weights(pool):
    actors = pool(max_weight_age_updates=5)
    agent = make_agent(family(**CARTPOLE))
    actors.publish(weights_of(agent, 0), 0)
    collect(actors, 60, updates=5)
    end = time.monotonic() + 3.0
    late: list[Rollout] = []
    while time.monotonic() < end:
        late += actors.collect(0.2, updates=6)
    assert len(late) <= 2  # what was under way
    actors.publish(weights_of(agent, 6), 0)
    fresh = collect(actors, 120, updates=6)
    assert 6 in fresh[-1].weights_version


def test_weights_may_travel_as_bfloat16(pool):
    envs = family(**CARTPOLE)
    agent = make_agent(envs)
    actors = pool(envs, agent=agent, weights_dtype="bfloat16")
    weights = weights_of(agent)
    actors.publish(weights, 0)
    rollouts = collect(actors, 300)
    replay = make_replay(agent, 2 * LANES)
    for rollout in rollouts:
        replay.add(rollout)
    batch = replay.sample(32).batch
    assert difference(agent, weights.params, batch) > 1e-4
    rounded = jax.tree.map(
        lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), weights.params
    )
    assert difference(agent, rounded, batch) < 1e-4


# --- processes -----------------------------------------------------------------------------------


def test_each_actor_has_a_core_of_its_own_and_finds_what_the_first_one_compiled(pool, programs):
    lanes = LANES + 3  # as no other test has
    before = set(programs.glob("jit_act-*-cache"))
    actors = pool(envs_per_actor=lanes)
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)
    collect(actors, 60, lanes=2 * lanes)
    cores = [process.cpu_affinity() for process in actor_processes()]
    assert sorted(len(each) for each in cores) == [1, 1]
    assert cores[0] != cores[1]
    assert len(set(programs.glob("jit_act-*-cache")) - before) == 1


# --- back-pressure -------------------------------------------------------------------------------


def test_no_more_is_under_way_than_was_allowed(pool):
    actors = pool()
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)
    collect(actors, 60, lanes=2 * LANES)
    time.sleep(3.0)  # nobody collects: every actor ends what it has, and waits
    waiting = actors.collect(0.0, 0)
    assert len(waiting) == 2 * 2
    assert actors.burst_env_steps == 2 * 2 * (LANES * 10 + LANES - 1)
    tight = pool(max_in_flight_bytes=1)  # less than one rollout: one at a time
    assert tight.burst_env_steps == LANES * 10 + LANES - 1


@pytest.mark.parametrize("inference", ["actor", "server"])
def test_lanes_draw_the_same_on_ray_and_a_replacement_as_its_chain(pool, inference):
    """Draws depend on the seed, the lane, the chain and the episode's number alone."""
    actors = pool(inference=inference, exploration=DRAWN)
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)
    rollouts = collect(actors, 600, lanes=2 * LANES)
    actor_processes()[0].send_signal(signal.SIGKILL)
    chains = {0}
    while chains != {0, 1}:
        rollouts += collect(actors, 100)
        chains = {e.chain for rollout in rollouts for e in rollout.episodes}
    assert_drawn(episode for rollout in rollouts for episode in rollout.episodes)


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", ["actor", "server"])
def test_a_killed_actor_is_replaced_and_the_others_go_on(pool, inference):
    actors = pool(instances=3, inference=inference)
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)
    rollouts = collect(actors, 200, lanes=3 * LANES)  # whoever is killed has given blocks before
    wait_for(lambda: actors.stats()["acting/actors_ready"] == 3, "all three actors", 60)
    victim = actor_processes()[0]
    victim.send_signal(signal.SIGKILL)
    rollouts += collect_until(actors, "acting/restarts_died", 1)
    wait_for(lambda: actors.stats()["acting/actors_ready"] == 3, "the replacement", 60)
    rollouts += collect(actors, 600, lanes=3 * LANES)
    assert_in_order_and_once(rollouts)
    chains = {lane: {c for got, c in streams(rollouts) if got == lane} for lane in range(3 * LANES)}
    renewed = [lane for lane, found in chains.items() if found == {0, 1}]
    assert len(renewed) == LANES
    assert renewed == list(range(renewed[0], renewed[0] + LANES))
    assert all(found == {0} for lane, found in chains.items() if lane not in renewed)
    assert actors.chain == 1
    for episode in (episode for rollout in rollouts for episode in rollout.episodes):
        assert episode.epsilon == pytest.approx(ladder_epsilon(episode.lane, 3 * LANES))
        assert episode.chain in chains[episode.lane]
    assert {episode.lane for r in rollouts for episode in r.episodes} == set(range(3 * LANES))
    most = 2 * (LANES * 10 + LANES - 1) if inference == "actor" else LANES
    assert 0 < actors.stats()["acting/lost_env_steps_at_most"] <= most


def ladder_epsilon(lane: int, lanes: int) -> float:
    return float(LADDER.amount(np.array([lane]), lanes, 0)[0])


@pytest.mark.parametrize("inference", ["actor", "server"])
def test_what_dies_at_its_first_step_is_not_started_for_ever(pool, inference):
    """A server's actors have been reset by then, which proves nothing."""
    inner = family(**CARTPOLE)
    envs = FaultyFamily(inner=inner, fault="dies", after=0)
    few = dataclasses.replace(RESTARTS, max_fruitless=2, longest_wait_s=0.1)
    actors = pool(envs, agent=make_agent(inner), instances=1, restarts=few, inference=inference)
    actors.publish(weights_of(make_agent(inner)), 0)
    with pytest.raises(ActingFailed, match="ended 2 times within 600 s without any answer"):
        collect(actors, 10_000)


def test_an_environment_that_hangs_costs_its_actor_only(pool, tmp_path):
    inner = family(**CARTPOLE)
    envs = FaultyFamily(inner=inner, fault="hangs", after=30, once=str(tmp_path / "hung"))
    actors = pool(envs, agent=make_agent(inner), request_timeout_s=3.0)
    actors.publish(weights_of(make_agent(inner)), 0)
    rollouts = collect_until(actors, "acting/restarts_hung", 1)
    rollouts += collect(actors, 600)
    assert_in_order_and_once(rollouts)
    assert (tmp_path / "hung").exists()


def test_one_exception_costs_one_life(pool, tmp_path):
    inner = family(**CARTPOLE)
    envs = FaultyFamily(inner=inner, fault="raises", after=30, once=str(tmp_path / "raised"))
    actors = pool(envs, agent=make_agent(inner))
    actors.publish(weights_of(make_agent(inner)), 0)
    rollouts = collect(actors, 600)
    assert actors.stats()["acting/restarts_raised"] == 1
    assert_in_order_and_once(rollouts)


@pytest.mark.parametrize("fault", ["raises", "raises_at_once"])
def test_what_raises_always_ends_the_run_with_its_traceback(pool, fault):
    inner = family(**CARTPOLE)
    envs = FaultyFamily(inner=inner, fault=fault, after=3)
    actors = pool(envs, agent=make_agent(inner))
    actors.publish(weights_of(make_agent(inner)), 0)
    with pytest.raises(ActingFailed) as failed:
        collect(actors, 10_000)
    text = str(failed.value)
    assert "raised what every other actor raised: " in text
    assert "faulty_envs.py" in text  # the traceback of the actor
    if fault == "raises":
        assert "out of coal" in text
        assert "about to: raises" in text  # the last line of its log
    else:
        assert "licence expired" in text


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ray.exceptions.ObjectLostError("0" * 56, "", ""), "lost_object"),
        (ray.exceptions.OwnerDiedError("0" * 56, "", ""), "lost_object"),
        (ray.exceptions.GetTimeoutError(), "lost_object"),
        (ray.exceptions.OutOfMemoryError("killed"), "died"),
        (ray.exceptions.NodeDiedError("gone"), "died"),
        (ray.exceptions.ActorUnavailableError("gone", None), "died"),
        (ray.exceptions.RayTaskError("f", "traceback", ValueError("x")), "raised"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_what_ray_may_say_instead_of_an_answer_has_a_cause(error, cause):
    assert cause_of(error) == cause


class Big:
    """An actor whose answer is too large to travel with the reply: it stays on its node."""

    def hello(self) -> Any:
        return whereabouts()

    def prepare(self, cores: tuple[int, ...] | None) -> None:
        pass

    def answer(self, done: str) -> np.ndarray:
        Path(done).touch()
        return np.ones(1_000_000)

    def log(self) -> None:
        print("its last words", flush=True, file=sys.stderr)


@pytest.fixture
def fleet(cluster) -> Iterator[Fleet]:
    """One actor of `Big`, on a node of its own."""
    cluster.add_node(num_cpus=1, resources={"far": 1})
    cluster.wait_for_nodes()
    made = Fleet(
        check=lambda: None,
        cls=Big,
        arguments=lambda index, chain: {},
        count=1,
        least=1,
        first_chain=0,
        options={"resources": {"far": 1}},
        threads=None,
        at_once=1,
        restarts=RESTARTS,
        deadlines=Deadlines(prepare_s=60.0, request_s=20.0, resource_s=60.0, grace_s=60.0),
    )
    yield made
    made.close()
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)


def events_until(fleet: Fleet, kind: type) -> Any:
    """The next event of this kind; every other one on the way is an error."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        for event in fleet.poll(0.1):
            assert isinstance(event, kind), event
            return event
    raise AssertionError(f"no {kind.__name__} in {PATIENCE_S} s")


def test_an_answer_that_is_lost_with_its_node_costs_one_life(cluster, fleet, tmp_path):
    events_until(fleet, Ready)
    fleet.request(0, "answer", str(tmp_path / "done"))
    wait_for((tmp_path / "done").exists, "the answer to be made")
    made, _ = ray.wait(list(fleet.slots[0].requests), timeout=20, fetch_local=False)
    assert made  # in its node's store, and nobody has fetched it
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    assert events_until(fleet, Lost) == Lost(index=0, requests=1, cause="lost_object")
    cluster.add_node(num_cpus=1, resources={"far": 1})
    assert events_until(fleet, Ready) == Ready(index=0, chain=1)


def test_an_actors_last_lines_are_read_where_it_was(fleet, monkeypatch):
    events_until(fleet, Ready)
    fleet.request(0, "log")
    events_until(fleet, Answered)
    where = fleet.slots[0].where
    assert where is not None
    assert last_lines_of(where).endswith("its last words")
    monkeypatch.setattr(ray_logs.socket, "gethostname", lambda: "another")
    assert last_lines_of(where).endswith("its last words")  # read by a task on that node
    assert last_lines_of(dataclasses.replace(where, host="gone")) == ""


# --- room ----------------------------------------------------------------------------------------


def test_a_cluster_that_stays_short_starts_with_what_fits(pool):
    actors = pool(instances=3, cpus_per_actor=2.0)  # two of them fit
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)
    rollouts = collect(actors, 200)
    assert {lane for lane, _ in streams(rollouts)} <= set(range(3 * LANES))
    time.sleep(1.0)
    assert actors.stats()["acting/actors_ready"] <= 2


def test_a_cluster_without_room_says_so_after_a_while(pool):
    actors = pool(cpus_per_actor=8.0, resource_timeout_s=3.0)
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)
    with pytest.raises(ActingFailed) as failed:
        collect(actors, 100)
    text = str(failed.value)
    assert "acting.resource_timeout_s=3" in text
    assert "0/2 actors ready" in text
    assert "CPU 4" in text


def test_a_round_that_has_no_room_for_all_actors_says_so(pool):
    """One fits into the cluster and acting.min_instances is 1, but a round needs both."""
    actors = pool(sync=True, round_blocks=2, cpus_per_actor=3.0, resource_timeout_s=3.0)
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)
    with pytest.raises(ActingFailed, match=r"min_instances=2 actors for .* [01]/2 actors ready"):
        collect(actors, 10**9)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"min_instances": 3}, "acting.min_instances=3: more than acting.instances=2"),
        ({"gpus_per_actor": 1.0}, "acting.gpus_per_actor=1: the cluster has 0 GPUs"),
        ({"resources": {"simulator": 1.0}}, "acting.resources.simulator=1: no node offers it"),
    ],
)
def test_what_no_waiting_helps_is_refused(pool, changes, says):
    with pytest.raises(ConfigError) as refused:
        pool(**changes)
    assert says in str(refused.value)


def test_an_environment_that_cannot_be_pickled_is_refused(pool):
    inner = family(**CARTPOLE)
    lock: Any = threading.Lock()
    envs = FaultyFamily(inner=inner, fault="hangs", after=1, once=lock)
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pool(envs, agent=make_agent(inner))


# --- nodes ---------------------------------------------------------------------------------------


@pytest.mark.slow  # half a minute; a node goes and comes back in the lost answer's test, too
def test_a_spot_machine_goes_and_another_comes(cluster, pool):
    """The head node has 4 CPUs, room for one of these actors; the spot machine has two."""
    first = cluster.add_node(num_cpus=8)
    cluster.wait_for_nodes()
    actors = pool(instances=3, cpus_per_actor=4.0)
    actors.publish(weights_of(make_agent(family(**CARTPOLE))), 0)
    rollouts = collect(actors, 200)
    wait_for(lambda: actors.stats()["acting/actors_ready"] == 3, "all three actors", 90)
    cluster.remove_node(first, allow_graceful=False)
    rollouts += collect_until(actors, "acting/restarts_died", 2)
    wait_for(lambda: actors.stats()["acting/actors_ready"] == 1, "the rest", 60)
    rollouts += collect(actors, 300)
    cluster.add_node(num_cpus=8)
    rollouts += collect(actors, 300)
    wait_for(lambda: actors.stats()["acting/actors_ready"] == 3, "the new machine's actors", 90)
    rollouts += collect(actors, 1000, lanes=3 * LANES)
    assert_in_order_and_once(rollouts)
    assert sum(chain == 1 for _, chain in streams(rollouts)) == 2 * LANES
