"""Stacks of convolutions that are fast where they run.

On GPUs they are XLA's own. On the CPU XLA computes a convolution as fast as its matrix products,
but its gradients at a tenth of that, and large intermediate results cost more than the arithmetic,
because their memory is taken anew from the system for each update. So there

- gradients are written as what is fast: the input's as a convolution with stride 1, the kernel's as
  one product of the input with shifted copies of the output's gradient, both after moving the
  strides into the channels (space to depth);
- a few images at a time go through the whole stack, forwards and backwards.

Which platform it is is known only when XLA compiles, so both are traced.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from rlx.types import Array

Norm = tuple[Array, Array]  # scale [D] and shift [D] of a LayerNorm

CHUNK = 32  # images that go through the stack together on the CPU: what the caches hold
LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve_all(
    images: Array,
    kernels: Sequence[Array],
    biases: Sequence[Array],
    strides: Sequence[int],
    dtype: Any,
    *,
    remat: bool,
    norms: Sequence[Norm | None] | None = None,
) -> Array:
    """ReLU(convolution + bias), VALID, layer by layer, computed in `dtype`.

    images [n, C, H, W], of bytes (scaled to 0..1) or floats; kernels [k, k, C, D], biases [D]
    -> [n, H', W', D']. remat: nothing but the images is kept for the gradients.
    norms: of each layer the scale [D] and shift [D] of a LayerNorm over the channels of each
    place, before the ReLU; None: no layer has one.
    """
    how: Any = {"strides": tuple(strides), "dtype": dtype}
    whole: Any = functools.partial(_stack, **how, layer=layer)
    whole = jax.checkpoint(whole) if remat else whole
    chunks = functools.partial(_by_chunks, **how, remat=remat)
    layers = list(zip(kernels, biases, norms or [None] * len(kernels), strict=True))
    n = images.shape[0]  # of no known size in what rlx.export writes for any number of lanes
    if jax.export.is_symbolic_dim(n) or n <= CHUNK:  # acting: there is nothing to divide
        return whole(images, layers)
    result: Array = lax.platform_dependent(images, layers, cpu=chunks, default=whole)
    return result


def layer(
    x: Array, kernel: Array, bias: Array, norm: Norm | None, stride: int, dtype: Any
) -> Array:
    """ReLU(convolution + bias), VALID: [n, H, W, C], or an image as `to_nhwc` takes it if bytes."""
    return _activated(linear(x, kernel, stride, dtype), bias, norm, dtype)


def linear(x: Array, kernel: Array, stride: int, dtype: Any) -> Array:
    """The convolution alone, VALID, of what `layer` takes."""
    x = to_nhwc(x, dtype) if x.dtype == jnp.uint8 else x
    return _convolve(x, kernel.astype(dtype), stride)


def _activated(x: Array, bias: Array, norm: Norm | None, dtype: Any) -> Array:
    # In float32: the gradient of a bias is a sum that bfloat16 would lose.
    x = x.astype(jnp.float32) + bias[None, None, None]
    if norm is not None:
        scale, shift = (part[None, None, None] for part in norm)
        x = jax.nn.standardize(x, axis=-1, epsilon=1e-6) * scale + shift
    return jax.nn.relu(x).astype(dtype)


def to_nhwc(images: Array, dtype: Any) -> Array:
    """[n, C, H, W], bytes scaled to 0..1 -> [n, H, W, C]."""
    scale = 1 / 255 if images.dtype == jnp.uint8 else 1.0
    return jnp.moveaxis(images, 1, -1).astype(dtype) * jnp.asarray(scale, dtype)


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=LAYOUT)


def _stack(
    images: Array, layers: Any, *, strides: tuple[int, ...], dtype: Any, layer: Any
) -> Array:
    x = images if images.dtype == jnp.uint8 else to_nhwc(images, dtype)
    for (kernel, bias, norm), stride in zip(layers, strides, strict=True):
        x = layer(x, kernel, bias, norm, stride, dtype)
    return x


def _by_chunks(
    images: Array, layers: Any, *, strides: tuple[int, ...], dtype: Any, remat: bool
) -> Array:
    """Computes the same, a few images at a time."""
    how: Any = {"strides": strides, "dtype": dtype, "layer": layer_on_cpu}

    def stack(some: Array) -> Array:
        return _stack(some, layers, **how)

    stack = jax.checkpoint(stack) if remat else stack
    whole = len(images) - len(images) % CHUNK
    chunks = images[:whole].reshape(-1, CHUNK, *images.shape[1:])
    x = lax.map(stack, chunks)
    x = x.reshape(whole, *x.shape[2:])
    return x if whole == len(images) else jnp.concatenate([x, stack(images[whole:])])


# --- a convolution whose gradients are fast on the CPU -------------------------------------------


def layer_on_cpu(
    x: Array, kernel: Array, bias: Array, norm: Norm | None, stride: int, dtype: Any
) -> Array:
    """Does as `layer` does, with the same values and gradients."""
    if norm is None:
        return _plain_on_cpu(x, kernel, bias, stride, dtype)
    return _activated(_linear_on_cpu(x, kernel, stride, dtype), bias, norm, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _plain_on_cpu(x: Array, kernel: Array, bias: Array, stride: int, dtype: Any) -> Array:
    return layer(x, kernel, bias, None, stride, dtype)


def _forward(x: Array, kernel: Array, bias: Array, stride: int, dtype: Any) -> tuple[Array, Any]:
    y = layer(x, kernel, bias, None, stride, dtype)
    return y, (x, kernel, y)  # bytes stay bytes: a quarter of the memory


def _backward(stride: int, dtype: Any, kept: Any, grad: Array) -> tuple[Any, Array, Array]:
    x, kernel, y = kept
    grad = jnp.where(y > 0, grad, 0)
    of_bias = grad.astype(jnp.float32).sum((0, 1, 2))
    return *_linear_grads(x, kernel, grad, stride, dtype), of_bias


_plain_on_cpu.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear_on_cpu(x: Array, kernel: Array, stride: int, dtype: Any) -> Array:
    return linear(x, kernel, stride, dtype)


def _linear_forward(x: Array, kernel: Array, stride: int, dtype: Any) -> tuple[Array, Any]:
    return linear(x, kernel, stride, dtype), (x, kernel)


def _linear_backward(stride: int, dtype: Any, kept: Any, grad: Array) -> tuple[Any, Array]:
    x, kernel = kept
    return _linear_grads(x, kernel, grad, stride, dtype)


_linear_on_cpu.defvjp(_linear_forward, _linear_backward)


def _linear_grads(
    x: Array, kernel: Array, grad: Array, stride: int, dtype: Any
) -> tuple[Any, Array]:
    """The gradients of a convolution's input and kernel."""
    if kernel.shape[0] % stride:  # the strides cannot be moved into the channels
        return jax.vjp(functools.partial(linear, stride=stride, dtype=dtype), x, kernel)[1](grad)
    if x.dtype == jnp.uint8:
        of_x, x = np.zeros(x.shape, jax.dtypes.float0), to_nhwc(x, dtype)
    else:
        of_x = _grad_of_input(grad, kernel.astype(dtype), stride, x.shape)
    return of_x, _grad_of_kernel(x, grad, kernel, stride)


def _grad_of_input(grad: Array, kernel: Array, stride: int, shape: tuple[int, ...]) -> Array:
    deep = _kernel_to_depth(kernel, stride)
    edge = deep.shape[0] - 1
    x = lax.conv_general_dilated(
        grad,
        deep[::-1, ::-1].transpose(0, 1, 3, 2),
        (1, 1),
        [(edge, edge)] * 2,
        dimension_numbers=LAYOUT,
    )
    n, high, wide, _ = x.shape
    x = x.reshape(n, high, wide, stride, stride, shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(n, high * stride, wide * stride, shape[-1])
    rest = [(0, of - got) for of, got in zip(shape, x.shape, strict=True)]
    return jnp.pad(x, rest)  # rows and columns that no kernel reached


def _grad_of_kernel(x: Array, grad: Array, kernel: Array, stride: int) -> Array:
    """The gradient of each place in the kernel: the input times the gradient, moved there."""
    size, places = kernel.shape[0], kernel.shape[0] // stride
    high, wide = ((of - size) // stride * stride + size for of in x.shape[1:3])
    deep = _to_depth(x[:, :high, :wide], stride)
    moved = jnp.concatenate(
        [
            jnp.pad(grad, ((0, 0), (i, places - 1 - i), (j, places - 1 - j), (0, 0)))
            for i in range(places)
            for j in range(places)
        ],
        axis=-1,
    )
    axes = (0, 1, 2)
    product = lax.dot_general(
        deep, moved, ((axes, axes), ((), ())), preferred_element_type=jnp.float32
    )
    inputs, outputs = kernel.shape[2:]
    product = product.reshape(stride, stride, inputs, places, places, outputs)
    return product.transpose(3, 0, 4, 1, 2, 5).reshape(kernel.shape).astype(kernel.dtype)


def _to_depth(x: Array, stride: int) -> Array:
    """[n, H, W, C] -> [n, H / s, W / s, s * s * C]."""
    n, high, wide, channels = x.shape
    x = x.reshape(n, high // stride, stride, wide // stride, stride, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, high // stride, wide // stride, -1)


def _kernel_to_depth(kernel: Array, stride: int) -> Array:
    """[k, k, C, D] -> [k / s, k / s, s * s * C, D]."""
    size, _, inputs, outputs = kernel.shape
    places = size // stride
    deep = kernel.reshape(places, stride, places, stride, inputs, outputs)
    return deep.transpose(0, 2, 1, 3, 4, 5).reshape(places, places, -1, outputs)
