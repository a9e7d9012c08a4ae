"""R2D2's update against plain Python in float64, and the rules of sequences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlx import trees
from rlx.agents import common, q_learning
from rlx.agents.optimizers import clip_by_average_norm
from rlx.types import Batch, QActing, Row, TrainState
from tests import parts

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def h(x, e=1e-3):
    return np.sign(x) * (np.sqrt(abs(x) + 1) - 1) + e * x


def h_inverse(x, e=1e-3):
    return np.sign(x) * (((np.sqrt(1 + 4 * e * (abs(x) + 1 + e)) - 1) / (2 * e)) ** 2 - 1)


def q_values(agent, params, batch: Batch) -> np.ndarray:
    """f64[B, L + 1, A]: an unroll from the stored carry."""
    inputs = trees.tree_map(lambda x: np.swapaxes(x, 0, 1), parts.all_inputs(batch))
    q, _ = jax.jit(functools.partial(parts.q_values, agent))(params, inputs, batch.carry)
    return np.swapaxes(np.asarray(q, np.float64), 0, 1)


def oracle_td(agent, state: TrainState, batch: Batch) -> np.ndarray:
    """f64[B, T] signed TD errors, nan where not valid: the paper's equations, row by row."""
    online = q_values(agent, state.params, batch)
    target = q_values(agent, state.target_params, batch)
    rows, n = batch.rows, agent.n_step
    td = np.full((len(online), agent.unroll), np.nan)
    for b in range(len(online)):
        for i in range(agent.unroll):
            t = agent.burn_in + i
            if not rows.valid[b, t]:
                continue
            total, factor, k = 0.0, 1.0, 0
            while k < n and rows.valid[b, t + k]:
                total += factor * float(rows.reward[b, t + k])
                factor *= agent.discount * float(rows.discount[b, t + k])
                k += 1
            best = np.argmax(online[b, t + k] if agent.double_q else target[b, t + k])
            value = h(total + factor * h_inverse(target[b, t + k, best]))
            td[b, i] = value - online[b, t, rows.action[b, t]]
    return td


def scalars_of(rows: Row, last_value: np.ndarray) -> Row:
    """Scalars [B, L + 1] of rows [B, L, ...]: of the row after them only its value matters."""
    scalars = dataclasses.replace(rows, inputs=dataclasses.replace(rows.inputs, observation={}))
    longer: Row = trees.tree_map(lambda x: np.concatenate([x, x[:, -1:]], axis=1), scalars)
    longer.acting.q_max[:, -1] = last_value
    return longer


@pytest.mark.parametrize("double_q", [True, False])
@pytest.mark.parametrize("core", ["lstm", "gru", "none"])
def test_td_and_loss_equal_the_float64_oracle(core, double_q):
    agent = parts.agent(parts.network(core=core), double_q=double_q)
    batch, state = parts.batch(agent, 16), parts.random_state(agent)
    assert not batch.rows.valid.all()
    assert (batch.rows.discount[batch.rows.valid] == 0).any()
    td = oracle_td(agent, state, batch)
    priorities, loss = parts.told(agent, state, batch)
    np.testing.assert_allclose(priorities, np.where(np.isnan(td), -1, abs(td)), atol=2e-5)
    per_sequence = np.nanmean(0.5 * td**2, axis=1)
    np.testing.assert_allclose(loss, np.mean(batch.importance * per_sequence), rtol=1e-4)


def test_images_with_stacks_too():
    agent = parts.agent(
        parts.network(parts.IMAGE), burn_in=2, unroll=3, n_step=2, stride=2, block_rows=2
    )
    batch, state = parts.batch(agent, 4), parts.random_state(agent)
    td = oracle_td(agent, state, batch)
    priorities, _ = parts.told(agent, state, batch)
    np.testing.assert_allclose(priorities, np.where(np.isnan(td), -1, abs(td)), atol=2e-5)


def test_rows_of_a_sequence_over_an_end_are_those_of_their_own_episodes():
    """Cut the batch at the end: what comes after it must not change what was before, and back."""
    agent = parts.agent(burn_in=0, unroll=10, n_step=3)
    state, rng = parts.random_state(agent), np.random.default_rng(0)
    batch = parts.batch(agent, 1)
    end = 5  # x_5 is an episode's last observation, x_6 the next one's first

    def with_end(changes: dict) -> Batch:
        rows = trees.tree_map(np.copy, batch.rows)
        rows.inputs.first[:] = False
        rows.inputs.first[:, end + 1] = True
        rows.valid[:] = True
        rows.valid[:, end] = False
        rows.discount[:] = 1
        rows.discount[:, end - 1 : end + 1] = 0
        for side, (low, high) in {"before": (0, end + 1), "after": (end + 1, 12)}.items():
            if side in changes:
                shape = rows.inputs.observation["observation"][:, low:high].shape
                rows.inputs.observation["observation"][:, low:high] = rng.normal(size=shape)
                rows.reward[:, low:high] = rng.normal(size=(1, high - low))
        rows.reward[:, end] = 0
        return dataclasses.replace(batch, rows=rows)

    plain, _ = parts.told(agent, state, with_end({}))
    for side, same in {"before": slice(end + 1, None), "after": slice(0, end + 1)}.items():
        changed, _ = parts.told(agent, state, with_end({side}))
        np.testing.assert_allclose(plain[:, same], changed[:, same], rtol=1e-4, atol=1e-6)
        assert not np.allclose(plain, changed, atol=1e-3)


def test_first_td_equals_the_learners_when_all_networks_are_one():
    agent = parts.agent()
    batch = parts.batch(agent, 16)
    state = jax.jit(agent.init)(jax.random.PRNGKey(0))
    q = q_values(agent, state.params, batch)
    taken = np.take_along_axis(q[:, :-1], batch.rows.action[..., None], axis=-1)[..., 0]
    largest = q.max(axis=-1).astype(np.float32)
    acting = QActing(q=taken.astype(np.float32), q_max=largest[:, :-1])
    rows = dataclasses.replace(batch.rows, acting=acting)
    priorities, _ = parts.told(agent, state, dataclasses.replace(batch, rows=rows))
    first = agent.initial_priorities(scalars_of(rows, largest[:, -1]))
    assert first.dtype == np.float32
    np.testing.assert_allclose(first, priorities, atol=2e-5)
    assert (first == -1).any()


def test_a_value_that_is_not_known_yet_changes_the_last_trained_rows_first_priority_only():
    agent = parts.agent()
    rows = parts.batch(agent, 64).rows
    known = scalars_of(rows, np.full(64, 9.0, np.float32))
    stands_in = scalars_of(rows, rows.acting.q_max[:, -1])
    first, other = (agent.initial_priorities(scalars) for scalars in (known, stands_in))
    np.testing.assert_array_equal(first[:, :-1], other[:, :-1])
    reaches = rows.valid[:, -3:].all(axis=1) & (rows.discount[:, -3:] > 0).all(axis=1)
    assert (first[reaches, -1] != other[reaches, -1]).all()
    assert reaches.any()
    np.testing.assert_array_equal(first[~reaches, -1], other[~reaches, -1])


def test_starts_inside_a_block_are_for_networks_without_a_recurrent_state():
    with pytest.raises(ValueError, match=r"stride=2 must be a multiple of .*: sequences of a rec"):
        parts.agent(stride=2)
    with pytest.raises(ValueError, match="stride=3 must be a multiple or a divisor"):
        parts.agent(parts.network(core="none"), stride=3)
    assert parts.agent(parts.network(core="none"), stride=2).sequence.start_rows == range(0, 4, 2)


def test_no_gradient_crosses_the_burn_in():
    agent = parts.agent()
    batch, state = parts.batch(agent, 4), parts.random_state(agent)
    after_burn_in = trees.tree_map(lambda x: x[:, agent.burn_in :], batch.rows)
    rows = trees.tree_map(lambda x: np.swapaxes(x[:, : agent.burn_in], 0, 1), batch.rows)
    apply = jax.jit(agent.network.apply)
    _, carry = apply(state.params, rows.inputs, batch.carry)
    _, target_carry = apply(state.target_params, rows.inputs, batch.carry)
    no_burn_in = dataclasses.replace(agent, burn_in=0)
    short = dataclasses.replace(batch, rows=after_burn_in, carry=carry)

    def grads(agent, batch, target_carry):
        net, rows = agent.network, common.time_major(batch.rows)
        given = common.batch_inputs(batch)
        target_features, _ = net.apply(state.target_params, given, target_carry)
        inputs, _ = net.stack_frames(given, batch.carry)
        replayed = q_learning.Replayed(
            rows=common.window(rows, agent.burn_in, None),
            mask=None,
            importance=batch.importance,
            key=state.key,
            target_params=state.target_params,
            target_features=target_features[agent.burn_in :],
        )

        def loss(params):
            core = batch.carry.core
            features = common.features_after(net, params, inputs, core, agent.burn_in)
            return agent.loss(params, features, replayed)[0]

        return jax.jit(jax.grad(loss))(state.params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        grads(agent, batch, batch.carry),
        grads(no_burn_in, short, target_carry),
    )


def test_target_is_copied_every_period_and_not_between():
    agent = parts.agent(target_period_updates=3)
    batch, state = parts.batch(agent, 4), parts.random_state(agent)
    state = dataclasses.replace(state, updates=state.updates + 1)  # one was left out before
    update, old = jax.jit(agent.update), state.target_params
    for count in range(1, 7):
        state, _ = update(state, batch)
        assert int(state.updates) == count + 1
        expected = state.params if count % 3 == 0 else old
        jax.tree.map(np.testing.assert_array_equal, state.target_params, expected)
        old = state.target_params


def test_padding_like_sequences_give_no_nan():
    agent = parts.agent()
    batch, state = parts.batch(agent, 2), parts.random_state(agent)
    rows = dataclasses.replace(batch.rows, valid=np.zeros_like(batch.rows.valid))
    _, output = jax.jit(agent.update)(state, dataclasses.replace(batch, rows=rows))
    assert (np.asarray(output.priorities) == -1).all()
    assert all(np.isfinite(value) for value in output.metrics.values())


def test_zero_state_ablation_forgets_the_stored_state():
    agent = parts.agent(stored_state=False)
    batch, state = parts.batch(agent, 4), parts.random_state(agent)
    forgetful, _ = parts.told(agent, state, batch)
    plain = parts.agent(agent.network)
    same, _ = parts.told(plain, state, dataclasses.replace(batch, carry=agent.initial_carry(4)))
    np.testing.assert_allclose(forgetful, same, atol=1e-6)
    stored, _ = parts.told(plain, state, batch)
    assert not np.allclose(forgetful, stored, atol=1e-3)


@pytest.mark.parametrize("core", ["lstm", "none"])
def test_the_zero_state_ablation_leaves_the_carried_frames(core):
    net = parts.network(parts.IMAGE, core)
    batch = parts.batch(parts.agent(net), 4)
    nothing = net.initial_carry(4)

    def unrolled(batch, *, stored_state):
        inputs, state = common.stacked_inputs(net, batch, reward="raw", stored_state=stored_state)
        return np.asarray(inputs.observation["observation"]), state

    frames, state = unrolled(batch, stored_state=False)
    assert jax.tree.all(jax.tree.map(np.array_equal, state, nothing.core))
    np.testing.assert_array_equal(frames, unrolled(batch, stored_state=True)[0])
    forgotten = dataclasses.replace(batch, carry=nothing)
    assert (frames != unrolled(forgotten, stored_state=True)[0]).any()


def test_reward_transform_reaches_targets_and_inputs_alike():
    clipped, raw = parts.agent(reward="clip"), parts.agent()
    state, batch = parts.random_state(raw), parts.batch(raw, 4)
    big = dataclasses.replace(batch.rows, reward=batch.rows.reward * 100)
    big = dataclasses.replace(
        big, inputs=dataclasses.replace(big.inputs, prev_reward=big.inputs.prev_reward * 100)
    )
    by_hand = dataclasses.replace(
        big,
        reward=np.clip(big.reward, -1, 1),
        inputs=dataclasses.replace(big.inputs, prev_reward=np.clip(big.inputs.prev_reward, -1, 1)),
    )
    after = batch.next.prev_reward * 100
    batch = dataclasses.replace(batch, next=dataclasses.replace(batch.next, prev_reward=after))
    clip = dataclasses.replace(batch.next, prev_reward=np.clip(after, -1, 1))
    got, _ = parts.told(clipped, state, dataclasses.replace(batch, rows=big))
    expected, _ = parts.told(raw, state, dataclasses.replace(batch, rows=by_hand, next=clip))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_acting_reads_the_previous_reward_as_learning_does():
    clipped, raw = parts.agent(reward="clip"), parts.agent()
    params, carry = parts.random_state(raw).params, raw.initial_carry(6)
    rng = np.random.default_rng(0)
    inputs = trees.tree_map(lambda x: x[0], parts.inputs(raw.spec, 1, 6, rng=rng))
    big = dataclasses.replace(inputs, prev_reward=inputs.prev_reward * 100)
    small = dataclasses.replace(inputs, prev_reward=np.clip(big.prev_reward, -1, 1))
    given, by_hand = (np.asarray(clipped.values(params, x, carry)[0]) for x in (big, small))
    np.testing.assert_array_equal(given, by_hand)
    assert not np.allclose(given, raw.values(params, big, carry)[0], atol=1e-3)


def test_losses_are_added_over_time_if_it_is_asked_for():
    net, short = parts.network(core="none"), {"burn_in": 0, "unroll": 3, "n_step": 1}
    mean, added = parts.agent(net, **short), parts.agent(net, **short, loss_over_time="sum")
    state, batch = parts.random_state(mean), parts.batch(mean, 4)
    rows = dataclasses.replace(batch.rows, valid=np.ones_like(batch.rows.valid))
    batch = dataclasses.replace(batch, rows=rows)
    one, other = (parts.told(agent, state, batch)[1] for agent in (mean, added))
    np.testing.assert_allclose(other, mean.unroll * one, rtol=1e-5)


def test_act_is_greedy_at_epsilon_0_random_at_1_and_keeps_its_q():
    agent = parts.agent()
    params = jax.jit(agent.init)(jax.random.PRNGKey(0)).params
    inputs = parts.inputs(parts.VECTOR, 4000, rng=np.random.default_rng(0))
    carry, key = agent.initial_carry(4000), jax.random.PRNGKey(1)
    one_row = trees.tree_map(lambda x: x[None], inputs)
    q = np.asarray(parts.q_values(agent, params, one_row, carry)[0][0])
    greedy, acting, _ = agent.act(params, inputs, carry, key, jnp.zeros(4000))
    np.testing.assert_array_equal(greedy, q.argmax(-1))
    np.testing.assert_allclose(acting.q, acting.q_max)
    action, acting, _ = agent.act(params, inputs, carry, key, jnp.ones(4000))
    counts = np.bincount(action, minlength=4)
    assert (abs(counts - 1000) < 5 * np.sqrt(750)).all()
    np.testing.assert_allclose(acting.q, q[np.arange(4000), action], rtol=1e-5)
    np.testing.assert_allclose(acting.q_max, q.max(-1), rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    optimizer = parts.adam(max_grad_norm=1.0).build()
    params = {"w": jnp.zeros(3)}
    grads = {"w": jnp.array([300.0, 0.0, 400.0])}
    small = {"w": grads["w"] / 500}
    first, _ = optimizer.update(grads, optimizer.init(params), params)
    second, _ = optimizer.update(small, optimizer.init(params), params)
    np.testing.assert_allclose(first["w"], second["w"], rtol=1e-5)
    plain = parts.adam(max_grad_norm=None, decay_gradient_steps=10).build()
    assert isinstance(plain, optax.GradientTransformation)


def test_gradients_are_clipped_by_the_moving_average_of_their_norm():
    clip = clip_by_average_norm(2.0)
    state, norms = clip.init({}), []
    for norm in (1.0, 1.0, 1.5, 50.0, 50.0):
        clipped, state = clip.update(
            {"a": jnp.array([0.6 * norm]), "b": jnp.array(0.8 * norm)}, state
        )
        norms.append(float(optax.tree.norm(clipped)))
    weights = [0.99**2, 0.99, 1.0]
    third = 2 * (weights[0] * 1.0 + weights[1] * 1.0 + weights[2] * 1.5) / sum(weights)
    np.testing.assert_allclose(norms[:4], [1.0, 1.0, 1.5, third], rtol=1e-5)
    assert third < norms[4] < 1.5 * third
    state, norms = clip.init({}), []
    for norm in (0.0, 0.0, 3.0, 50.0):  # as long as nothing was seen nothing is clipped
        clipped, state = clip.update({"a": jnp.array([norm])}, state)
        norms.append(float(clipped["a"][0]))
    assert norms[2] == 3.0
    assert 0 < norms[3] < 50
    moved, _ = (
        parts.adam(max_grad_norm_ratio=2.0)
        .build()
        .update(
            {"w": jnp.ones(3)}, parts.adam(max_grad_norm_ratio=2.0).build().init({"w": jnp.ones(3)})
        )
    )
    assert np.isfinite(moved["w"]).all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 1.0, 1000: 1.0}),
        ({"decay_gradient_steps": 100}, {0: 1.0, 50: 0.5, 100: 0.0, 1000: 0.0}),
        (
            {"decay_gradient_steps": 100, "decay": "cosine", "final_learning_rate": 1e-4},
            {0: 1.0, 50: 0.55, 100: 0.1, 1000: 0.1},
        ),
        ({"warmup_gradient_steps": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 1000: 1.0}),
        (
            {"warmup_gradient_steps": 10, "decay_gradient_steps": 100},
            {5: 0.5, 10: 1.0, 60: 0.5, 110: 0.0},
        ),
    ],
)
def test_the_rate_rises_and_falls_as_it_is_told(changes, expected):
    rate = parts.adam(**changes).rate()
    found = {n: float(rate(n) if callable(rate) else rate) / 1e-3 for n in expected}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("changes", [{"final_learning_rate": 1e-4}, {"decay": "cosine"}])
def test_a_fall_of_the_rate_without_its_steps_is_refused(changes):
    with pytest.raises(
        ValueError,
        match=r"^(final_learning_rate=0\.0001|decay=cosine) says .* set decay_gr",
    ):
        parts.adam(**changes)


def test_wrong_settings_say_so():
    for stride in (3, 6):
        with pytest.raises(ValueError, match=r"multiple of agent\.block_rows=4: .* recurrent"):
            parts.agent(stride=stride)
    with pytest.raises(ValueError, match=r"multiple or a divisor of agent\.block_rows=4"):
        parts.agent(parts.network(core="none"), stride=6)
    with pytest.raises(ValueError, match="acts in discrete action spaces; box has BoxSpec"):
        parts.agent(parts.network(parts.BOX))
