import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.replay.ring.sum_tree import SumTree, sum_tree_nbytes

SIZES = st.sampled_from([1, 2, 31, 32, 33, 100, 1024, 1025, 40_000])


def random_history(size: int, seed: int, draw_values) -> tuple[SumTree, np.ndarray]:
    """A tree after many overlapping sets (duplicates too) and its one-by-one twin."""
    rng = np.random.default_rng(seed)
    tree, twin = SumTree(size), np.zeros(size)
    for _ in range(int(rng.integers(1, 40))):
        indices = rng.integers(0, size, int(rng.integers(0, 80)))
        values = draw_values(rng, len(indices))
        tree.set(indices, values)
        for index, value in zip(indices, values, strict=True):
            twin[index] = value
    return tree, twin


@given(size=SIZES, seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_integers_agree_exactly_with_cumsum(size, seed):
    tree, twin = random_history(size, seed, lambda rng, n: rng.integers(0, 9, n).astype(float))
    assert tree.check_valid() == (True, "")
    assert (tree.get(np.arange(size)) == twin).all()
    assert tree.total == twin.sum()
    if tree.total:
        rng = np.random.default_rng(seed + 1)
        targets = np.concatenate([np.arange(tree.total)[:2000], rng.random(200) * tree.total])
        expected = np.searchsorted(np.cumsum(twin), targets, side="right")
        assert (tree.find(targets) == expected).all()


@given(size=SIZES, seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_reals_agree_to_1e_12(size, seed):
    tree, twin = random_history(
        size, seed, lambda rng, n: rng.random(n) * 10.0 ** rng.integers(-6, 7, n)
    )
    assert tree.check_valid() == (True, "")
    assert tree.total == pytest.approx(math.fsum(twin), rel=1e-12)
    if tree.total:
        targets = np.random.default_rng(seed + 1).random(200) * tree.total
        found, ends = tree.find(targets), np.cumsum(twin)
        slack = 1e-12 * tree.total
        assert (targets <= ends[found] + slack).all()
        assert (targets >= ends[found] - twin[found] - slack).all()


@given(size=SIZES, seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_zero_is_never_found(size, seed):
    tree, twin = random_history(
        size, seed, lambda rng, n: rng.random(n) * (rng.random(n) < 0.2) * 10.0 ** -rng.integers(9)
    )
    if tree.total:
        past = tree.total * (1 + np.array([-1e-15, -1e-16, 0.0, 1e-16, 1e-15]))
        targets = np.concatenate([[0.0], past, np.cumsum(twin)[:500]])
        assert (twin[tree.find(targets)] > 0).all()


def test_of_duplicates_the_last_wins():
    tree = SumTree(100)
    tree.set(np.array([7, 7, 3, 7]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert tree.get(np.array([3, 7])).tolist() == [3.0, 4.0]
    assert tree.total == 7.0


@given(size=SIZES, seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_loading_gives_the_same_bits_as_the_history(size, seed):
    tree, twin = random_history(size, seed, lambda rng, n: rng.random(n))
    other = SumTree(size)
    other.set(np.arange(size), 3.0)
    other.load(twin)
    assert other.check_valid() == (True, "")
    for level, other_level in zip(tree._levels, other._levels, strict=True):
        assert (level == other_level).all()


@pytest.mark.parametrize("size", [1, 33, 1025])
def test_a_shorter_state_leaves_zeros_behind_it(size):
    tree, fewer = SumTree(size), size // 3
    tree.set(np.arange(size), 3.0)
    tree.load(np.ones(fewer))
    assert tree.values.tolist() == [1.0] * fewer + [0.0] * (size - fewer)
    assert (tree.total, tree.check_valid()) == (fewer, (True, ""))


def test_check_valid_sees_a_wrong_parent():
    tree = SumTree(100)
    tree.set(np.arange(100), 1.0)
    tree._levels[1][0, 2] += 1e-9
    assert tree.check_valid() == (False, "node 2 of level 1 is not its children's sum")


def test_nbytes_is_known_without_a_tree():
    for size in (1, 32, 33, 1025, 100_000):
        assert sum_tree_nbytes(size) == SumTree(size).nbytes


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_values_are_refused(value):
    tree = SumTree(8)
    with pytest.raises(ValueError, match="finite and >= 0, got"):
        tree.set(np.array([0, 1]), np.array([1.0, value]))
    assert tree.total == 0.0


def test_bad_indices_and_targets_are_refused():
    tree = SumTree(8)
    with pytest.raises(ValueError, match="tree of zeros"):
        tree.find(np.zeros(1))
    for index in (-1, 8):
        with pytest.raises(ValueError, match=r"must lie in \[0, 8\)"):
            tree.set(np.array([index]), 1.0)
    tree.set(np.array([2]), 1.0)
    with pytest.raises(ValueError, match=r"got -0\.5"):
        tree.find(np.array([-0.5]))
    with pytest.raises(ValueError, match="size >= 1"):
        SumTree(0)
