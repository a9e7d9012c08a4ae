from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_streams import IN_MEMORY, carry_spec, making, rollout, row_spec, sequence_spec

from rlx.replay.uniform import Uniform
from rlx.training.quota import Quota

RATIOS = st.sampled_from([0.01, 0.1, 0.25, 0.8, 1.0, 1.5, 4.0, 32.0, 1 / 3])


@given(
    ratio=RATIOS,
    rows_per_update=st.integers(1, 5120),
    burst=st.integers(0, 2000),
    opened_at=st.integers(0, 10**9),
    steps=st.integers(0, 10**7),
    trained=st.integers(0, 10**7),
    startable=st.integers(0, 10),
    min_sequences=st.integers(1, 10),
)
@settings(deadline=None, max_examples=300)
def test_never_are_both_blocked(
    ratio, rows_per_update, burst, opened_at, steps, trained, startable, min_sequences
):
    quota = Quota(
        ratio=ratio,
        rows_per_update=rows_per_update,
        burst_env_steps=burst,
        min_sequences=min_sequences,
    )
    assert quota.may_act(steps, startable)
    assert not quota.may_learn(steps, startable)
    quota.open(opened_at)
    quota.trained(trained)
    now = opened_at + steps
    assert quota.may_act(now, startable) or quota.may_learn(now, startable)
    if startable < min_sequences:
        assert quota.may_act(now, startable)
        assert not quota.may_learn(now, startable)


@given(ratio=RATIOS, rows=st.integers(1, 200), burst=st.integers(1, 300), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_the_ratio_is_kept_within_one_update(ratio, rows, burst, seed):
    """Random turns; a round of requests brings between nothing and `burst` env steps."""
    rng = np.random.default_rng(seed)
    quota = Quota(ratio=ratio, rows_per_update=rows, burst_env_steps=burst)
    env_steps = opened_at = 1000
    trained, exact = 0, Fraction(ratio)
    quota.open(opened_at)
    for _ in range(500):
        act, learn = quota.may_act(env_steps, 1), quota.may_learn(env_steps, 1)
        assert act or learn
        if act and (not learn or rng.random() < 0.5):
            env_steps += int(rng.integers(0, burst + 1))
        else:
            quota.trained(rows)
            trained += rows
        owed = exact * (env_steps - opened_at) - trained
        assert -1e-6 <= owed <= rows + 2 * exact * burst + 1e-6
    while quota.may_learn(env_steps, 1):
        quota.trained(rows)
        trained += rows
    owed = exact * (env_steps - opened_at) - trained
    assert -1e-6 <= owed < rows + 1e-6
    if env_steps > opened_at:
        assert quota.ratio_so_far(env_steps) == trained / (env_steps - opened_at)


@given(rows=st.integers(1, 200), burst=st.integers(1, 300), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_with_a_ratio_that_changes_its_integral_is_kept(rows, burst, seed):
    """Each env step earns the ratio that held when it was made; a saved account goes on so."""
    rng = np.random.default_rng(seed)
    quota = Quota(ratio=1.0, rows_per_update=rows, burst_env_steps=burst)
    env_steps, trained, earned, ratio = 500, 0, Fraction(0), 1.0
    quota.open(env_steps)
    for _ in range(300):
        if rng.random() < 0.3:
            ratio = float(rng.choice([0.125, 0.75, 3.0, 16.0]))
            quota.change_ratio(ratio, env_steps)
        if rng.random() < 0.05:
            saved, quota = (
                quota.state(),
                Quota(ratio=9.0, rows_per_update=rows, burst_env_steps=burst),
            )
            quota.restore(saved, env_steps, follows=True)
        act, learn = quota.may_act(env_steps, 1), quota.may_learn(env_steps, 1)
        assert act or learn
        if act and (not learn or rng.random() < 0.5):
            made = int(rng.integers(0, burst + 1))
            env_steps, earned = env_steps + made, earned + Fraction(ratio) * made
        else:
            quota.trained(rows)
            trained += rows
        assert earned >= trained
        assert quota.may_learn(env_steps, 1) == (trained + rows <= earned)


def test_a_saved_account_with_another_ratio_is_new_unless_it_follows():
    old = Quota(ratio=0.5, rows_per_update=10, burst_env_steps=4)
    old.open(100)
    old.change_ratio(2.0, 200)  # 50 rows are earned
    new = Quota(ratio=0.5, rows_per_update=10, burst_env_steps=4)
    new.restore(old.state(), 300)
    assert not new.may_learn(319, 1)
    assert new.may_learn(320, 1)
    follows = Quota(ratio=0.5, rows_per_update=10, burst_env_steps=4)
    follows.restore(old.state(), 300, follows=True)
    for _ in range(25):  # 50 of the first hundred env steps, 200 of the second
        assert follows.may_learn(300, 1)
        follows.trained(10)
    assert not follows.may_learn(304, 1)
    assert follows.may_learn(305, 1)


@given(
    lanes=st.integers(1, 6),
    length=st.integers(1, 9),
    blocks_per_stride=st.integers(1, 2),
    spare=st.integers(0, 9),
    batch_size=st.integers(1, 8),
    ratio=st.sampled_from([0.1, 0.8, 3.0]),
    min_sequences=st.integers(1, 8),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=40)
def test_no_deadlock_with_a_replay(
    lanes, length, blocks_per_stride, spare, batch_size, ratio, min_sequences, seed
):
    """Lanes of any speed, chains that break, the smallest rings: both sides always go on."""
    sequence = sequence_spec(block_rows=2, length=length, blocks_per_stride=blocks_per_stride)
    blocks = 2 * lanes * sequence.blocks + spare
    replay = making(
        Uniform,
        capacity=2 * blocks,
        ratio=ratio,
        min_sequences=min(
            min_sequences,
            lanes * ((blocks // lanes - sequence.blocks + 1) // blocks_per_stride) or 1,
        ),
        sequence=sequence,
        row_spec=row_spec(),
        carry_spec=carry_spec(),
        lanes=lanes,
        **IN_MEMORY,
        seed=0,
    )
    quota = Quota(
        ratio=ratio,
        rows_per_update=batch_size,
        burst_env_steps=2 * lanes,
        min_sequences=replay.min_sequences,
    )
    rng, heads, updates, opened_at = np.random.default_rng(seed), [(0, 0)] * lanes, 0, 0
    broken = rng.random() < 0.5
    for _ in range(400):
        startable, env_steps = replay.startable, replay.env_steps
        if startable >= replay.min_sequences and not quota.is_open:
            quota.open(env_steps)
            opened_at = env_steps
        act, learn = quota.may_act(env_steps, startable), quota.may_learn(env_steps, startable)
        assert act or learn
        if learn and (not act or rng.random() < 0.5):
            replay.sample(batch_size)
            quota.trained(batch_size)
            updates += 1
            continue
        some = []
        for lane in rng.permutation(lanes)[: rng.integers(1, lanes + 1)].tolist():
            if broken and rng.random() < 0.02:
                heads[lane] = (heads[lane][0] + 1, 0)
            some.append((lane, *heads[lane]))
            heads[lane] = (heads[lane][0], heads[lane][1] + 1)
        replay.add(rollout(some, sequence))
    while quota.may_learn(replay.env_steps, replay.startable):
        quota.trained(batch_size)
        updates += 1
    if replay.startable >= replay.min_sequences:
        owed = ratio * (replay.env_steps - opened_at) - updates * batch_size
        assert -1e-6 <= owed < batch_size + 1e-6


def test_nothing_before_the_opening_is_owed():
    quota = Quota(ratio=1.0, rows_per_update=10, burst_env_steps=5)
    assert quota.may_act(10**6, 100)
    assert not quota.may_learn(10**6, 100)
    assert quota.ratio_so_far(10**6) == 0.0
    quota.open(10**6)
    quota.open(0)
    assert not quota.may_learn(10**6 + 9, 100)
    assert quota.may_learn(10**6 + 10, 100)
    assert quota.may_act(10**6 + 15, 100)
    assert not quota.may_act(10**6 + 16, 100)
    assert quota.may_act(10**6 + 16, 0)
    quota.trained(10)
    assert quota.ratio_so_far(10**6 + 20) == 0.5


def test_without_a_ratio_each_side_is_free():
    quota = Quota(ratio=None, rows_per_update=10, burst_env_steps=5)
    assert not quota.may_learn(1, 5)
    quota.open(0)
    assert quota.may_learn(1, 5)
    assert not quota.may_learn(1, 0)
    assert quota.may_act(10**9, 5)


def test_saving():
    quota = Quota(ratio=1.0, rows_per_update=10, burst_env_steps=5)
    other = Quota(ratio=1.0, rows_per_update=10, burst_env_steps=5)
    other.restore(quota.state(), 0)
    assert not other.is_open
    quota.open(7)
    quota.trained(10)
    other.restore(quota.state(), 50)
    saved = {"opened_at": 7, "trained_rows": 10, "ratio": 1.0, "changed_at": 7, "earned_rows": 0.0}
    assert other.state() == quota.state() == saved
    assert not other.may_learn(26, 1)
    assert other.may_learn(27, 1)


@pytest.mark.parametrize(("before", "now"), [(1.0, 2.0), (None, 2.0), (2.0, None)])
def test_another_ratio_opens_a_new_account(before, now):
    old = Quota(ratio=before, rows_per_update=10, burst_env_steps=5)
    old.open(7)
    old.trained(500)
    new = Quota(ratio=now, rows_per_update=10, burst_env_steps=5)
    new.restore(old.state(), 1000)
    begun = {"opened_at": 1000, "trained_rows": 0, "changed_at": 1000, "earned_rows": 0.0}
    assert new.state() == begun | {"ratio": now}
    again = Quota(ratio=now, rows_per_update=10, burst_env_steps=5)
    new.trained(10)
    again.restore(new.state(), 1500)
    assert again.state() == new.state()


def test_an_account_that_does_not_tell_its_ratio_goes_on():
    """Checkpoints of an earlier rlx."""
    quota = Quota(ratio=1.0, rows_per_update=10, burst_env_steps=5)
    quota.restore({"opened_at": 7, "trained_rows": 10}, 50)
    told = {"opened_at": 7, "trained_rows": 10, "ratio": 1.0}
    assert quota.state() == told | {"changed_at": 7, "earned_rows": 0.0}


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="above 0 or null"):
        Quota(ratio=0.0, rows_per_update=1, burst_env_steps=1)
    with pytest.raises(ValueError, match="got 0, 1 and 1"):
        Quota(ratio=1.0, rows_per_update=0, burst_env_steps=1)
    with pytest.raises(RuntimeError, match="not open"):
        Quota(ratio=1.0, rows_per_update=1, burst_env_steps=1).trained(1)
