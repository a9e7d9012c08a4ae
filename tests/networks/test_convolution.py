"""Convolutions that are written anew for the CPU, against XLA's own."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.networks import convolution
from rlx.networks.convolution import CHUNK, convolve_all, layer, layer_on_cpu
from rlx.networks.torsos import ImpalaResNet, NatureCNN

pytestmark = pytest.mark.usefixtures("quickly_compiled")

RNG = np.random.default_rng(0)
NATURE = {"channels": (32, 64, 64), "kernels": (8, 4, 3), "strides": (4, 2, 1)}


def noise(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kind", ["float32", "uint8"])
@pytest.mark.parametrize(
    ("size", "stride", "high", "wide"),
    [(8, 4, 84, 84), (4, 2, 20, 20), (3, 1, 9, 9), (8, 4, 87, 85), (4, 2, 11, 8), (3, 2, 10, 9)],
)
def test_gradients_are_those_of_xla(size, stride, high, wide, kind, normed):
    kernel, bias = noise(size, size, 5, 7), noise(7)
    norm = (noise(7), noise(7)) if normed else None
    x = noise(3, high, wide, 5)
    if kind == "uint8":  # an image: channels first, and nothing to differentiate
        x = jnp.asarray(RNG.integers(0, 256, (3, 5, high, wide)), jnp.uint8)

    def loss(layer: Any, kernel: Any, bias: Any, x: Any) -> jax.Array:
        return jnp.sin(layer(x, kernel, bias, norm, stride, jnp.float32)).sum()

    of = (1, 2) if kind == "uint8" else (1, 2, 3)
    expected = jax.grad(loss, argnums=of)(layer, kernel, bias, x)
    found = jax.jit(jax.grad(loss, argnums=of), static_argnums=0)(layer_on_cpu, kernel, bias, x)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
    how = (kernel, bias, norm, stride, jnp.float32)
    np.testing.assert_array_equal(layer_on_cpu(x, *how), layer(x, *how))


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("n", [CHUNK, 2 * CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize(("kind", "dtype"), [("uint8", "float32"), ("float32", "float32"),
                                             ("uint8", "bfloat16")])  # fmt: skip
def test_a_few_images_at_a_time_give_what_all_of_them_do(n, kind, dtype, remat):
    images = RNG.integers(0, 256, (n, 2, 36, 36)).astype(kind)
    layers = [0.1 * noise(4, 4, 2, 8), 0.1 * noise(3, 3, 8, 8)], [noise(8), noise(8)]

    def whole(kernels: Any, biases: Any) -> jax.Array:
        layers = list(zip(kernels, biases, [None, None], strict=True))
        how = {"strides": (2, 1), "dtype": jnp.float32, "layer": layer}
        return convolution._stack(images, layers, **how)

    def loss(apply: Any, layers: Any) -> jax.Array:
        return jnp.square(apply(*layers).astype(jnp.float32)).mean()

    how: Any = {"strides": (2, 1), "dtype": dtype, "remat": remat}
    chunks = functools.partial(convolve_all, images, **how)
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, apply)))(layers)
        for apply in (chunks, whole)
    )
    rough = 1e-4 if dtype == "float32" else 0.03
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=rough, atol=rough * np.abs(b).max())


def test_on_the_cpu_it_is_the_few_at_a_time_that_are_compiled():
    images, kernels, biases = noise(4 * CHUNK, 1, 12, 12), [noise(3, 3, 1, 2)], [noise(2)]
    made = jax.jit(
        lambda *given: convolve_all(*given, strides=(1,), dtype=jnp.float32, remat=False)
    )
    text = made.lower(images, kernels, biases).as_text()
    assert ("stablehlo.while" in text) == (jax.default_backend() == "cpu")
    small = made.lower(images[:CHUNK], kernels, biases).as_text()
    assert "stablehlo.while" not in small


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(
            NatureCNN, channels=(8, 8), kernels=(4, 3), strides=(2, 1), layer_norm=False
        ),
        functools.partial(ImpalaResNet, channels=(8, 8), blocks=2),
    ],
)
def test_what_is_not_kept_is_computed_again(make):
    images, key = noise(4 * CHUNK, 1, 24, 24), jax.random.PRNGKey(0)
    params = make(remat=False).init(key, {"image": images}, jnp.float32)
    found, forwards = [], []
    for remat in (False, True):

        def loss(params: Any, torso: nn.Module) -> jax.Array:
            return jnp.square(torso.apply(params, {"image": images}, jnp.float32)).mean()

        grad = jax.jit(jax.grad(loss), static_argnums=1).lower(params, make(remat=remat))
        found.append(grad.compile()(params))
        forwards.append(grad.as_text().count("stablehlo.convolution"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *found)
    assert forwards[1] > forwards[0]


class OfFlax(nn.Module):
    """The same torso of flax's own layers."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = jnp.moveaxis(image, 1, -1) / 255
        for channels, size, stride in zip(*NATURE.values(), strict=True):
            x = nn.relu(nn.Conv(channels, (size, size), (stride, stride), padding="VALID")(x))
        return x.reshape(len(x), -1)


def test_parameters_and_features_are_those_of_flax():
    image = jnp.asarray(RNG.integers(0, 256, (CHUNK + 2, 4, 84, 84), np.uint8))
    torso, key = NatureCNN(**NATURE, layer_norm=False, remat=False), jax.random.PRNGKey(3)
    params = torso.init(key, {"image": image[:1]}, jnp.float32)
    expected = OfFlax().init(key, image[:1].astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    np.testing.assert_allclose(
        torso.apply(params, {"image": image}, jnp.float32),
        OfFlax().apply(expected, image.astype(jnp.float32)),
        rtol=1e-4,
        atol=1e-5,
    )
