import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import trees
from rlx.networks import cores
from rlx.networks.cores import stack_frames
from rlx.networks.heads import Dueling, Head, Plain
from rlx.networks.torsos import ImpalaResNet, NatureCNN, OneHotMLP
from rlx.types import ArraySpec, DiscreteSpec, EnvSpec, NetInput
from tests import parts

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def rows(inputs: NetInput, t: int) -> NetInput:
    return trees.tree_map(lambda x: x[t : t + 1], inputs)


@pytest.mark.parametrize("core", ["lstm", "gru", "none"])
@pytest.mark.parametrize("spec", [parts.VECTOR, parts.IMAGE], ids=lambda s: s.id)
def test_unroll_of_T_equals_T_unrolls_of_1_with_resets(spec, core):
    net = parts.network(spec, core)
    rng = np.random.default_rng(0)
    params = parts.init(net, jax.random.PRNGKey(0))
    inputs = parts.inputs(spec, 9, 3, rng=rng)
    assert inputs.first[1:].any()
    carry = parts.random_carry(net, 3, rng)
    apply = jax.jit(net.apply)
    whole, whole_carry = apply(params, inputs, carry)
    for t in range(9):
        one, carry = apply(params, rows(inputs, t), carry)
        np.testing.assert_allclose(one[0], whole[t], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), carry, whole_carry)


@pytest.mark.parametrize("core", ["lstm", "gru"])
def test_nothing_crosses_a_reset(core):
    net = parts.network(core=core)
    rng = np.random.default_rng(0)
    params = parts.init(net, jax.random.PRNGKey(0))
    inputs = parts.inputs(parts.VECTOR, 6, 2, rng=rng)
    inputs.first[:] = False
    inputs.first[3] = True
    after = trees.tree_map(lambda x: x[3:], inputs)
    apply = jax.jit(net.apply)
    whole, _ = apply(params, inputs, parts.random_carry(net, 2, rng))
    fresh, _ = apply(params, after, net.initial_carry(2))
    np.testing.assert_allclose(whole[3:], fresh, rtol=1e-5, atol=1e-6)
    inputs.first[3] = False
    crossed, _ = apply(params, inputs, parts.random_carry(net, 2, rng))
    assert np.abs(crossed[3:] - fresh).max() > 1e-3


@pytest.mark.parametrize("core", ["lstm", "gru"])
def test_gradients_through_the_scan_are_those_of_steps_one_by_one(core):
    net, rng = parts.network(core=core), np.random.default_rng(0)
    params = parts.init(net, jax.random.PRNGKey(0))
    inputs, carry = parts.inputs(parts.VECTOR, 7, 3, rng=rng), parts.random_carry(net, 3, rng)
    assert inputs.first[1:].any()
    assert not inputs.first[1:].all()
    step = {"lstm": cores._lstm_step, "gru": cores._gru_step}[core]

    def one_by_one(step, kernel, carry, x, first):
        h = []
        for t in range(len(x)):
            carry = jax.tree.map(lambda c, t=t: jnp.where(first[t][:, None], 0.0, c), carry)
            carry = step(carry, x[t], carry["h"] @ kernel)
            h.append(carry["h"])
        return jnp.stack(h), carry

    kernel = params["core"]["recurrent"]
    given = kernel, carry.core, jnp.asarray(rng.normal(size=(7, 3, kernel.shape[1])), jnp.float32)

    def loss(scan, kernel, carry, x):
        h, last = scan(step, kernel, carry, x, jnp.asarray(inputs.first))
        return jnp.sin(h).sum() + sum(jnp.cos(3 * c).sum() for c in jax.tree.leaves(last))

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, scan), argnums=(0, 1, 2)))(*given)
        for scan in (cores.scan_with_resets, one_by_one)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


def test_no_previous_action_is_all_zeros():
    net = parts.network()
    params = parts.init(net, jax.random.PRNGKey(0))
    inputs = parts.inputs(parts.VECTOR, 1, 1, rng=np.random.default_rng(0))
    carry = net.initial_carry(1)

    def q(prev_action: int) -> np.ndarray:
        changed = NetInput(
            observation=inputs.observation,
            prev_action=np.full((1, 1), prev_action, np.int32),
            prev_reward=inputs.prev_reward,
            time=inputs.time,
            first=inputs.first,
        )
        return np.asarray(net.apply(params, changed, carry)[0])

    kernel = params["core"]["input"]["kernel"]
    action_rows = np.arange(8, 12)  # after the torso's 8 features
    params["core"]["input"]["kernel"] = kernel.at[action_rows].set(0)
    without = q(2)
    params["core"]["input"]["kernel"] = kernel
    np.testing.assert_array_equal(q(-1), without)
    assert np.abs(q(0) - without).max() > 1e-4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_by_hand(x, kernel, carry):
    """The gates are in the order input, forget, cell, output; the forget bias is 1."""
    c, h, seen = carry["c"], carry["h"], []
    for gates in x:
        i, f, g, o = np.split(gates + h @ kernel, 4, axis=-1)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        seen.append(h)
    return np.stack(seen)


def gru_by_hand(x, kernel, carry):
    """The gates are in the order reset, update, new; the reset comes after the product."""
    h, seen = carry["h"], []
    for gates in x:
        (r, z, n), (r_h, z_h, n_h) = (np.split(part, 3, axis=-1) for part in (gates, h @ kernel))
        z = sigmoid(z + z_h)
        h = (1 - z) * np.tanh(n + sigmoid(r + r_h) * n_h) + z * h
        seen.append(h)
    return np.stack(seen)


@pytest.mark.parametrize(
    ("core", "by_hand"),
    [(cores.LSTM(units=5), lstm_by_hand), (cores.GRU(units=5), gru_by_hand)],
    ids=["lstm", "gru"],
)
def test_cores_are_those_of_the_books(core, by_hand):
    rng = np.random.default_rng(0)
    x, first = rng.normal(size=(4, 2, 3)).astype(np.float32), np.zeros((4, 2), bool)
    carry = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), core.initial_carry(2))
    variables = core.init(jax.random.PRNGKey(0), x, first, carry, jnp.float32)
    found, _ = core.apply(variables, x, first, carry, jnp.float32)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    gates = x @ params["input"]["kernel"] + params["input"]["bias"]
    np.testing.assert_allclose(found, by_hand(gates, params["recurrent"], carry), atol=1e-5)


def test_a_dueling_head_is_its_value_and_advantages_around_0():
    head, action = Dueling(hidden=8, noise=None), DiscreteSpec(n=4)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    params = head.init(jax.random.PRNGKey(0), x, action, jnp.float32)["params"]

    def stream(name):
        hidden = np.maximum(0, x @ params[f"{name}_hidden"]["kernel"])  # biases begin as zeros
        return np.asarray(hidden @ params[name]["kernel"])

    q = np.asarray(head.apply({"params": params}, x, action, jnp.float32))
    advantage = stream("advantage")
    centred = advantage - advantage.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(q, stream("value") + centred, atol=1e-5)


@pytest.mark.parametrize("name", ["prev_action", "prev_reward"])
def test_the_core_reads_the_previous_action_and_reward_if_asked_to(name):
    inputs = parts.inputs(parts.VECTOR, 1, 1, rng=np.random.default_rng(0))
    changed = dataclasses.replace(inputs, **{name: getattr(inputs, name) + 1})
    for asked in (True, False):
        net = parts.network(**{name: asked})
        params = parts.init(net, jax.random.PRNGKey(0))
        one, other = (net.apply(params, x, net.initial_carry(1))[0] for x in (inputs, changed))
        assert np.array_equal(one, other) is not asked


@pytest.mark.parametrize("depth", [2, 4])
def test_stack_equals_a_walk_through_time(depth):
    rng = np.random.default_rng(depth)
    time, lanes = 12, 3
    frames = rng.integers(0, 256, (time, lanes, 1, 2, 2)).astype(np.uint8)
    first = rng.random((time, lanes)) < 0.25
    carried = rng.integers(0, 256, (lanes, depth - 1, 1, 2, 2)).astype(np.uint8)
    got, after = stack_frames(jnp.asarray(frames), jnp.asarray(first), jnp.asarray(carried))
    for lane in range(lanes):
        held = list(carried[lane])
        for t in range(time):
            held = [frames[t, lane]] * depth if first[t, lane] else [*held, frames[t, lane]]
            held = held[-depth:]
            np.testing.assert_array_equal(got[t, lane], np.concatenate(held))
            held = held[-(depth - 1) :]
        np.testing.assert_array_equal(after[lane], np.stack(held))


def test_torsos_and_options_build_and_run():
    grid = EnvSpec(
        id="grid",
        observation={
            "image": ArraySpec(shape=(7, 7, 3), dtype="uint8"),
            "direction": ArraySpec(shape=(), dtype="int32"),
        },
        action=DiscreteSpec(n=7),
        frames_per_env_step=1,
    )
    one_hot = OneHotMLP(categories=(11, 6, 4), layers=(16,))
    resnet = ImpalaResNet(channels=(4, 8), blocks=1, remat=False)
    for spec, changes in [
        (grid, {"torso": one_hot, "stack": {}}),
        (parts.IMAGE, {"torso": resnet, "dense_before_core": 16}),
        (parts.VECTOR, {"layer_norm": True}),
        (parts.IMAGE, {"compute_dtype": "bfloat16"}),
    ]:
        net = parts.network(spec, **changes)
        params = parts.init(net, jax.random.PRNGKey(0))
        if spec is grid:
            observation = {
                "image": np.zeros((2, 3, 7, 7, 3), np.uint8),
                "direction": np.zeros((2, 3), np.int32),
            }
            flat = parts.inputs(parts.VECTOR, 2, 3, rng=np.random.default_rng(0))
            inputs = NetInput(
                observation=observation,
                prev_action=flat.prev_action,
                prev_reward=flat.prev_reward,
                time=flat.time,
                first=flat.first,
            )
        else:
            inputs = parts.inputs(spec, 2, 3, rng=np.random.default_rng(0))
        features, carry = jax.jit(net.apply)(params, inputs, net.initial_carry(3))
        assert features.dtype == jnp.float32
        q = net.read(params, "head", parts.HEAD, features)
        assert q.shape == (2, 3, spec.action.n)
        assert q.dtype == jnp.float32
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(carry.core))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_networks_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"stack names \['pixels'\]"):
        parts.network(stack={"pixels": 4})
    with pytest.raises(ValueError, match="is not an image"):
        parts.network(stack={"observation": 4})
    with pytest.raises(ValueError, match="exactly one leaf of three axes"):
        parts.init(parts.network(torso=parts.SMALL_CNN), jax.random.PRNGKey(0))
    torso = NatureCNN(channels=(4,), kernels=(8, 4), strides=(4, 2), layer_norm=False, remat=False)
    with pytest.raises(ValueError, match="one number per layer"):
        parts.init(parts.network(parts.IMAGE, torso=torso), jax.random.PRNGKey(0))
    assert parts.mlp().layers == ()


@pytest.mark.parametrize("shape", [(7, 7, 3), (84, 84, 3), (1, 11, 84), (1, 36, 35)])
def test_images_that_leave_nothing_are_refused(shape):
    spec = dataclasses.replace(
        parts.IMAGE, observation={"image": ArraySpec(shape=shape, dtype="uint8")}
    )
    torso = NatureCNN(
        channels=(32, 64, 64), kernels=(8, 4, 3), strides=(4, 2, 1), layer_norm=False, remat=False
    )
    with pytest.raises(ValueError, match=r"kernels=.*smaller.*height"):
        parts.init(parts.network(spec, stack={}, torso=torso), jax.random.PRNGKey(0))


class Further(Head, kw_only=True):
    """Reads quantile fractions, an action and a key beside the features."""

    @nn.compact
    def __call__(self, x, action, dtype, fractions, taken, key):
        noise = jax.random.normal(key, ())
        cosine = jnp.stack([jnp.cos(k * fractions) for k in range(1, 5)], axis=-1)
        x = jnp.concatenate([x, taken], axis=-1)
        x = x[..., None, :] * nn.Dense(x.shape[-1], name="embedding")(cosine)
        return noise + nn.Dense(action.n, dtype=dtype, name="values")(x)


@pytest.mark.parametrize("core", ["lstm", "none"])
def test_heads_read_further_inputs_and_several_share_a_body(core):
    net, rng = parts.network(core=core), np.random.default_rng(0)
    heads = {"plain": Plain(hidden=None, noise=None), "quantiles": Further()}
    example = (jnp.zeros((1, 1, 3)), jnp.zeros((1, 1, 2)), jax.random.PRNGKey(0))
    params = net.init(jax.random.PRNGKey(0), heads, quantiles=example)
    assert {"torso", "core", "plain", "quantiles"} <= params.keys()
    inputs = parts.inputs(parts.VECTOR, 5, 2, rng=rng)
    features, _ = net.apply(params, inputs, net.initial_carry(2))
    taken, keys = rng.normal(size=(5, 2, 2)), jax.random.split(jax.random.PRNGKey(1))

    def read(fractions, taken, key):
        return net.read(params, "quantiles", heads["quantiles"], features, fractions, taken, key)

    online = read(rng.random((5, 2, 8)), taken, keys[0])
    assert online.shape == (5, 2, 8, 4)  # as many fractions as one asks for
    fractions = rng.random((5, 2, 3))
    one = read(fractions, taken, keys[0])
    assert np.abs(one - read(fractions, taken + 1, keys[0])).max() > 1e-3
    assert np.abs(one - read(fractions, taken, keys[1])).max() > 1e-3
    assert net.read(params, "plain", heads["plain"], features).shape == (5, 2, 4)


def test_two_whole_networks_have_parameters_of_their_own():
    actor, critic = parts.network(core="none"), parts.network(core="lstm")
    head = {"head": Plain(hidden=None, noise=None)}
    first, second = (
        net.init(key, head)
        for net, key in zip((actor, critic), jax.random.split(jax.random.PRNGKey(0)), strict=True)
    )
    assert not actor.is_recurrent
    assert critic.is_recurrent
    assert np.abs(first["head"]["q"]["kernel"] - second["head"]["q"]["kernel"]).max() > 1e-3


def test_whether_it_remembers_is_found_out_once(monkeypatch):
    """The training loop asks at every update, where a trace would be a tenth of a small one."""
    net, traced, trace = parts.network(core="lstm"), [], jax.eval_shape
    monkeypatch.setattr(jax, "eval_shape", lambda *args: traced.append(args) or trace(*args))
    assert [net.is_recurrent, net.is_recurrent] == [True, True]
    assert len(traced) <= 1
