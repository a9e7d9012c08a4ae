"""Torsos: observation leaves [batch, *] -> features f32[batch, units]."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from rlx.networks.convolution import convolve_all, to_nhwc
from rlx.networks.layers import Activation, dense
from rlx.types import Array, Range


class Torso(nn.Module, kw_only=True):
    """A torso of a network has `__call__(observation, dtype) -> [batch, units]`."""


def flat_leaves(observation: Mapping[str, Array], dtype: Any) -> Array:
    """All leaves, flattened and concatenated."""
    leaves = [observation[name] for name in sorted(observation)]
    flat = [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in leaves]
    return jnp.concatenate([leaf.astype(dtype) for leaf in flat], axis=-1)


def split_images(observation: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """The image (the one leaf of shape [channels, height, width]) and the other leaves."""
    images = [name for name, leaf in observation.items() if leaf.ndim == 4]
    if len(images) != 1:
        shapes = {name: leaf.shape[1:] for name, leaf in observation.items()}
        raise ValueError(
            f"A convolutional torso reads exactly one leaf of three axes, got {shapes}; "
            "choose leaves with env.observe or another network."
        )
    others = {name: leaf for name, leaf in observation.items() if name != images[0]}
    return observation[images[0]], others


class MLP(Torso, kw_only=True):
    """Dense layers over all leaves, flattened; without layers the leaves as they are."""

    layers: tuple[Annotated[int, Range(ge=1)], ...]
    activation: Activation
    layer_norm: bool  # after each layer, before its activation

    @nn.compact
    def __call__(self, observation: Mapping[str, Array], dtype: Any) -> Array:
        x = flat_leaves(observation, dtype)
        for units in self.layers:
            x = dense(units, self.activation, x, dtype, layer_norm=self.layer_norm)
        return x


class OneHotMLP(Torso, kw_only=True):
    """Reads grids of small integers, such as MiniGrid's object, colour and state [3, 7, 7].

    Its channels are the first axis or, as runs of earlier rlx had them, the last one.
    """

    categories: tuple[Annotated[int, Range(ge=1)], ...]  # values of each channel
    layers: tuple[Annotated[int, Range(ge=1)], ...]

    @nn.compact
    def __call__(self, observation: Mapping[str, Array], dtype: Any) -> Array:
        image, others = split_images(observation)
        axis = 1 if image.shape[1] == len(self.categories) else image.ndim - 1
        if image.shape[axis] != len(self.categories) or image.dtype.kind not in "biu":
            raise ValueError(
                f"network.torso.categories names {len(self.categories)} channels of integers, the "
                f"observation is {image.dtype}{list(image.shape[1:])}."
            )
        parts = [
            nn.one_hot(image.take(i, axis=axis), n, dtype=dtype).reshape(image.shape[0], -1)
            for i, n in enumerate(self.categories)
        ]
        x = jnp.concatenate([*parts, *([flat_leaves(others, dtype)] if others else [])], axis=-1)
        for units in self.layers:
            x = nn.relu(nn.Dense(units, dtype=dtype)(x))
        return x


class ConvParams(nn.Module, kw_only=True):
    """A kernel [size, size, inputs, outputs] and a bias, begun as flax begins its own."""

    size: int
    inputs: int
    outputs: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        shape = (self.size, self.size, self.inputs, self.outputs)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, (self.outputs,), jnp.float32)


class NormParams(nn.Module, kw_only=True):
    """The scale and shift [size] of a LayerNorm, begun as flax begins its own."""

    size: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        scale = self.param("scale", nn.initializers.ones, (self.size,), jnp.float32)
        return scale, self.param("bias", nn.initializers.zeros, (self.size,), jnp.float32)


class NatureCNN(Torso, kw_only=True):
    """Convolutions with ReLU, VALID padding; the defaults in the YAML are DQN's (Nature, 2015)."""

    channels: tuple[Annotated[int, Range(ge=1)], ...]
    kernels: tuple[Annotated[int, Range(ge=1)], ...]
    strides: tuple[Annotated[int, Range(ge=1)], ...]
    layer_norm: bool  # over the channels of each place, before each ReLU
    remat: bool  # compute the layers once more for the gradients, and keep nothing of them

    @nn.compact
    def __call__(self, observation: Mapping[str, Array], dtype: Any) -> Array:
        if not len(self.channels) == len(self.kernels) == len(self.strides):
            raise ValueError(
                "network.torso: channels, kernels and strides need one number per layer, got "
                f"{self.channels}, {self.kernels}, {self.strides}."
            )
        image, others = split_images(observation)
        self._check_size(image.shape[1:])
        kernels, biases, norms, inputs = [], [], [], image.shape[1]
        for i, (outputs, size) in enumerate(zip(self.channels, self.kernels, strict=True)):
            layer = ConvParams(size=size, inputs=inputs, outputs=outputs, name=f"Conv_{i}")
            kernel, bias = layer()
            kernels.append(kernel)
            biases.append(bias)
            norm = NormParams(size=outputs, name=f"LayerNorm_{i}") if self.layer_norm else None
            norms.append(None if norm is None else norm())
            inputs = outputs
        x = convolve_all(image, kernels, biases, self.strides, dtype, remat=self.remat, norms=norms)
        x = x.reshape(x.shape[0], -1)
        return jnp.concatenate([x, flat_leaves(others, dtype)], axis=-1) if others else x

    def _check_size(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for images so small that the layers leave nothing of them."""
        sides = shape[1:]
        for size, stride in zip(self.kernels, self.strides, strict=True):
            if min(sides) < size:
                raise ValueError(
                    f"network.torso: kernels={self.kernels} with strides={self.strides} need more "
                    f"than {shape}; a layer of {size} x {size} gets {sides[0]} x {sides[1]}, which "
                    "is smaller. Images are [channels, height, width]; choose other layers."
                )
            sides = tuple((side - size) // stride + 1 for side in sides)


class ResidualBlock(nn.Module, kw_only=True):
    """Two convolutions with a skip."""

    channels: int

    @nn.compact
    def __call__(self, x: Array, dtype: Any) -> Array:
        y = nn.Conv(self.channels, (3, 3), dtype=dtype)(nn.relu(x))
        return x + nn.Conv(self.channels, (3, 3), dtype=dtype)(nn.relu(y))


class ImpalaResNet(Torso, kw_only=True):
    """The residual torso of IMPALA (Espeholt et al. 2018, figure 3), without its dense layer."""

    channels: tuple[Annotated[int, Range(ge=1)], ...]  # one stage each
    blocks: Annotated[int, Range(ge=1)]  # residual blocks per stage
    remat: bool  # compute the blocks once more for the gradients, and keep their inputs only

    @nn.compact
    def __call__(self, observation: Mapping[str, Array], dtype: Any) -> Array:
        image, others = split_images(observation)
        x = to_nhwc(image, dtype)
        block = nn.remat(ResidualBlock, static_argnums=(2,)) if self.remat else ResidualBlock
        names = (f"ResidualBlock_{i}" for i in itertools.count())  # with remat and without
        for channels in self.channels:
            x = nn.Conv(channels, (3, 3), dtype=dtype)(x)
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
            for _ in range(self.blocks):
                x = block(channels=channels, name=next(names))(x, dtype)
        x = nn.relu(x).reshape(x.shape[0], -1)
        return jnp.concatenate([x, flat_leaves(others, dtype)], axis=-1) if others else x
