"""Rollouts and weights as they travel: what arrives is what was sent, in fewer bytes."""

from __future__ import annotations

import pickle

import jax
import ml_dtypes
import numpy as np
import pytest

from rlx import trees
from rlx.acting.wire import narrowed, nbytes, pack, unpack, widened
from rlx.types import Rollout, Weights
from tests.acting.test_keystone import CARTPOLE, PONG, family, make_agent, make_pool


def some_rollout(environment: dict) -> Rollout:
    envs = family(**environment)
    agent = make_agent(envs)
    pool = make_pool(envs, agent)
    params = jax.tree.map(np.asarray, agent.init(jax.random.PRNGKey(0)).params)
    pool.publish(Weights(version=3, params=params), 0)
    (rollout,) = pool.collect(10.0, 0)
    pool.close(10.0)
    assert len(rollout.lane)
    return rollout


@pytest.mark.parametrize("environment", [CARTPOLE, PONG], ids=["vector", "pong"])
@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_what_arrives_is_what_was_sent(environment, compression):
    sent = some_rollout(environment)
    packed, raw, wire = pack(sent, compression)
    got = unpack(pickle.loads(pickle.dumps(packed, protocol=5)))
    for part in ("rows", "carry", "next", "lane", "chain", "number", "weights_version"):
        mine, theirs = (trees.flatten(getattr(r, part)) for r in (sent, got))
        assert mine.keys() == theirs.keys()
        for name, array in mine.items():
            assert theirs[name].dtype == array.dtype
            np.testing.assert_array_equal(theirs[name], array)
    assert got.episodes == sent.episodes
    assert (got.env_steps, got.frames) == (sent.env_steps, sent.frames)
    assert raw == nbytes(sent)
    if compression == "lz4" and environment is PONG:
        assert wire < raw / 5
    else:
        assert wire == raw


def test_weights_travel_in_half_the_bytes_and_come_back_rounded():
    params = {"a": np.linspace(-3, 3, 7, dtype=np.float32), "n": np.arange(3, dtype=np.int32)}
    sent = narrowed(Weights(version=5, params=params), "bfloat16")
    assert sent.params["a"].nbytes * 2 == params["a"].nbytes
    got = widened(pickle.loads(pickle.dumps(sent)))
    assert got.version == 5
    assert got.params["a"].dtype == np.float32
    np.testing.assert_array_equal(
        got.params["a"], params["a"].astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    np.testing.assert_array_equal(got.params["n"], params["n"])
    assert narrowed(sent, "float32") is sent


def test_running_statistics_travel_whole():
    x = np.float32([1000.3, 0.1])
    sent = narrowed(
        Weights(version=5, params={"network": x, "statistics": {"mean": x}}), "bfloat16"
    )
    got = widened(pickle.loads(pickle.dumps(sent))).params
    assert (got["network"] != x).all()
    np.testing.assert_array_equal(got["statistics"]["mean"], x)
