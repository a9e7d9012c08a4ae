"""The body of a network: frame stack -> torso -> core (with previous action, reward, time).

An agent puts its heads to it: functions of the features, and of whatever else they read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlx import trees
from rlx.networks.actions import encode_categories, encode_previous
from rlx.networks.cores import Core, initial_frames, stack_frames
from rlx.networks.heads import Head
from rlx.networks.layers import orthogonal
from rlx.networks.torsos import Torso
from rlx.trees import matches_any
from rlx.types import Array, Carry, EnvSpec, NetInput, Params, Range, Runtime


class _Body(nn.Module):
    """Torso and core. The torso sees [T * B, ...]; only the core sees time."""

    settings: RecurrentNetwork

    @nn.compact
    def __call__(self, inputs: NetInput, core: Any) -> tuple[Array, Any]:
        return _features(self.settings, inputs, core)


class _Whole(nn.Module):
    """The body with heads, for the parameters of all of them; each has its name at the top."""

    settings: RecurrentNetwork
    heads: Mapping[str, Head]

    @nn.compact
    def __call__(self, inputs: NetInput, core: Any, further: Mapping[str, Any]) -> None:
        x, _ = _features(self.settings, inputs, core)
        action, dtype = self.settings.spec.action, jnp.dtype(self.settings.compute_dtype)
        for name, head in self.heads.items():
            head.copy(name=name)(x, action, dtype, *further.get(name, ()))


def _features(net: RecurrentNetwork, inputs: NetInput, core: Any) -> tuple[Array, Any]:
    """The features; it runs inside a module's call and makes its submodules."""
    dtype = jnp.dtype(net.compute_dtype)
    time, batch = inputs.first.shape
    flat = {
        name: _leaf(net, name, leaf.reshape(time * batch, *leaf.shape[2:]), dtype)
        for name, leaf in inputs.observation.items()
        if name != net.spec.action_mask  # agents read it, not torsos
    }
    x = net.torso.copy(name="torso")(flat, dtype)
    if net.dense_before_core is not None:
        x = nn.relu(nn.Dense(net.dense_before_core, dtype=dtype, name="dense_before_core")(x))
    if net.layer_norm:
        x = nn.LayerNorm(dtype=dtype, name="layer_norm")(x)
    x = x.reshape(time, batch, -1)
    extra = [x]
    if net.prev_action:
        extra.append(encode_previous(inputs.prev_action, inputs.first, net.spec.action, dtype))
    if net.prev_reward:
        extra.append(inputs.prev_reward[..., None].astype(dtype))
    if net.time:
        scaled = inputs.time.astype(jnp.float32) * net.time_scale
        extra.append(scaled[..., None].astype(dtype))
    x = jnp.concatenate(extra, axis=-1)
    return net.core.copy(name="core")(x, inputs.first, core, dtype)


def _leaf(net: RecurrentNetwork, name: str, leaf: Array, dtype: Any) -> Array:
    """A leaf [n, *] as the torso sees it."""
    categories = net.spec.categories.get(name)
    if categories is None or net.discrete == "number":
        return leaf
    return encode_categories(leaf, categories, dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class RecurrentNetwork:
    """Features over time; an interfaces.Network. Time-major: inputs [T, B, ...].

    With `core: Feedforward` it has no memory but the stack. An unroll over T rows equals T unrolls
    of one row, resets included.
    """

    torso: Torso
    dense_before_core: Annotated[int, Range(ge=1)] | None  # SEED RL puts 512 here, the paper none
    layer_norm: bool  # after the torso
    core: Core
    stack: dict[str, Annotated[int, Range(ge=1)]]  # leaf -> frames the torso sees at once
    discrete: Literal["one_hot", "number"]  # leaves that are choices, as the torso sees them
    prev_action: bool  # encoded (rlx.networks.actions), into the core (R2D2, appendix)
    prev_reward: bool  # after the agent's transform, into the core
    time: bool  # env steps since the episode's first observation, into the core
    time_scale: Annotated[float, Range(gt=0)]  # factor of the time
    orthogonal: bool  # the body's dense and convolutional weights begin orthogonal, gain sqrt 2
    frozen: list[str]  # patterns of names: no gradient reaches these parameters
    compute_dtype: Literal["float32", "bfloat16"]  # state, parameters and outputs stay float32
    spec: Runtime[EnvSpec]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.stack) - set(self.spec.observation))
        if unknown:
            raise ValueError(
                f"network.stack names {unknown}, the observation has "
                f"{sorted(self.spec.observation)}; name one of those."
            )
        flat = [k for k in self._depths() if len(self.spec.observation[k].shape) != 3]
        if flat:
            raise ValueError(
                f"network.stack: {flat} is not an image [channels, height, width]; "
                "stack image leaves only (a recurrent core remembers the rest)."
            )

    @cached_property  # it is asked for at each update
    def is_recurrent(self) -> bool:
        """Says whether the network remembers more than its stack of frames."""
        return bool(jax.tree.leaves(jax.eval_shape(lambda: self.core.initial_carry(1))))

    def init(self, key: Array, heads: Mapping[str, Head], **further: tuple[Array, ...]) -> Params:
        """Fresh parameters of the body and of these heads, by name; `key` is consumed.

        further: by the head's name, examples [1, 1, ...] of what it reads beside the features.
        """
        action = self.spec.action.array
        row = NetInput(
            observation={
                k: jnp.zeros((1, 1, *s.shape), s.dtype) for k, s in self.spec.observation.items()
            },
            prev_action=jnp.zeros((1, 1, *action.shape), action.dtype),
            prev_reward=jnp.zeros((1, 1), jnp.float32),
            time=jnp.zeros((1, 1), jnp.int32),
            first=jnp.ones((1, 1), bool),
        )
        carry = self.initial_carry(1)
        stacked, _ = self.stack_frames(row, carry)
        whole = _Whole(settings=self, heads=dict(heads))
        params = whole.init(key, stacked, carry.core, further)["params"]
        if not self.orthogonal:
            return params
        body = {name: part for name, part in params.items() if name not in heads}
        return {**params, **orthogonal(body, jax.random.fold_in(key, 1))}

    def apply(self, params: Params, inputs: NetInput, carry: Carry) -> tuple[Array, Carry]:
        """inputs [T, B, ...] -> (features f32[T, B, F], carry after the last row)."""
        stacked, frames = self.stack_frames(inputs, carry)
        features, core = self.unroll(params, stacked, carry.core)
        return features, Carry(core=core, frames=frames)

    def stack_frames(self, inputs: NetInput, carry: Carry) -> tuple[NetInput, Any]:
        """(inputs as `unroll` takes them, the frames of the carry after the last row)."""
        observation, frames = dict(inputs.observation), {}
        for leaf in self._depths():
            observation[leaf], frames[leaf] = stack_frames(
                observation[leaf], inputs.first, carry.frames[leaf]
            )
        return replace(inputs, observation=observation), frames

    def unroll(self, params: Params, stacked: NetInput, core: Any) -> tuple[Array, Any]:
        """`apply` without the frames: rows that are unrolled twice are stacked once."""
        return _Body(settings=self).apply({"params": self._held(params)}, stacked, core)

    def read(self, params: Params, name: str, head: Head, features: Array, *further: Array) -> Any:
        """The output of a head for features [..., F] and its further inputs."""
        dtype = jnp.dtype(self.compute_dtype)
        own = self._held({name: params[name]})[name]
        return head.apply({"params": own}, features, self.spec.action, dtype, *further)

    def initial_carry(self, batch: int) -> Carry:
        """The carry before an episode's first row: zeros, for `batch` lanes."""
        shapes = {k: (s.shape, s.dtype) for k, s in self.spec.observation.items()}
        return Carry(
            core=self.core.initial_carry(batch),
            frames=initial_frames(self._depths(), shapes, batch),
        )

    def _held(self, params: Params) -> Params:
        """The parameters, those that are frozen without a gradient."""
        if not self.frozen:
            return params
        flat = trees.flatten(params)
        held = {
            name: jax.lax.stop_gradient(leaf) if matches_any(name, self.frozen) else leaf
            for name, leaf in flat.items()
        }
        return trees.unflatten(params, held)

    def _depths(self) -> dict[str, int]:
        return {leaf: depth for leaf, depth in self.stack.items() if depth > 1}


def zero_core(carry: Carry) -> Carry:
    """The carry with its recurrent state forgotten; the frames stay."""
    return Carry(core=jax.tree.map(jnp.zeros_like, carry.core), frames=carry.frames)
