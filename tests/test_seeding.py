"""Numbers by counters: a stream that is published, and numbers that depend on nothing else."""

from __future__ import annotations

import numpy as np

from rlx.seeding import split_mix, uniforms

LANES = np.arange(40_000, dtype=np.int32)


def test_the_stream_is_split_mix_64():
    """These are the five numbers that its authors' code gives for the state 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = split_mix(np.array([1234567], np.uint64), np.arange(5))
    assert found.tolist() == expected


def test_a_number_depends_on_its_own_counters_alone():
    whole = uniforms(3, "x", LANES, LANES % 7)
    some = np.array([17, 3, 39_999], np.int64)
    np.testing.assert_array_equal(uniforms(3, "x", some, some % 7), whole[some])


def test_numbers_are_spread_evenly_over_0_to_1_and_over_pairs():
    """Chi-square with 99 degrees of freedom is below 150 with a chance of 0.9993."""
    for found in (uniforms(3, "x", LANES), uniforms(3, "x", LANES * 0, LANES)):
        assert 0 <= found.min() < found.max() < 1
        counts = np.bincount((found * 100).astype(int), minlength=100)
        assert ((counts - 400) ** 2 / 400).sum() < 150
    pairs = 10 * np.floor(uniforms(3, "x", LANES) * 10) + np.floor(
        uniforms(3, "x", LANES, LANES * 0) * 10
    )
    counts = np.bincount(pairs.astype(int), minlength=100)
    assert ((counts - 400) ** 2 / 400).sum() < 150


def test_seeds_names_and_the_order_of_counters_give_other_numbers():
    first, second = LANES[:50], LANES[50:100]
    streams = [
        uniforms(3, "x", first, second),
        uniforms(4, "x", first, second),
        uniforms(3, "y", first, second),
        uniforms(3, "x", second, first),
        uniforms(3, "x", first),
    ]
    assert len(set(np.concatenate(streams).tolist())) == 5 * 50
