"""Optimisers as settings: optax chains neither pickle nor fit a signature, these do both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlx.types import Array, Params, Range

MOST = 2**31 - 1  # gradient steps, which devices count in 32 bits

NORM_DECAY = 0.99  # per gradient step, of the average that `max_grad_norm_ratio` compares with


Clip = Annotated[float, Range(gt=0)] | None  # of the gradient's global norm; None: no clipping
Ratio = Annotated[float, Range(gt=1)] | None  # the same, to the norm's moving average; None: any
Warmup = Annotated[int, Range(ge=0, le=MOST)]  # the rate first rises from 0 for so long
Decay = Annotated[int, Range(ge=1, le=MOST)] | None  # then falls; None: never


def _require_whole(optimizer: Optimizer) -> None:
    """Raises ValueError for a decay that is described and never happens."""
    if optimizer.decay_gradient_steps is not None:
        return
    last, decay = optimizer.final_learning_rate, optimizer.decay
    if last or decay != "linear":
        given = f"final_learning_rate={last:g}" if last else f"decay={decay}"
        raise ValueError(
            f"{given} says how the rate falls, but it never does; set decay_gradient_steps, too."
        )


def _build(optimizer: Optimizer) -> optax.GradientTransformation:
    """The chain of optax, for gradients that are averaged over the devices already."""
    clips = []
    if optimizer.max_grad_norm is not None:
        clips.append(optax.clip_by_global_norm(optimizer.max_grad_norm))
    if optimizer.max_grad_norm_ratio is not None:
        clips.append(clip_by_average_norm(optimizer.max_grad_norm_ratio))
    return optax.chain(*clips, optimizer.rule()) if clips else optimizer.rule()


def _rate(optimizer: Optimizer) -> optax.ScalarOrSchedule:
    """The learning rate: a function of the gradient step, or one number for all."""
    first, last = optimizer.learning_rate, optimizer.final_learning_rate
    steps = optimizer.decay_gradient_steps
    if steps is None:
        falling = optax.constant_schedule(first)
    elif optimizer.decay == "linear":
        falling = optax.linear_schedule(first, last, steps)
    else:
        falling = optax.cosine_decay_schedule(first, steps, alpha=last / first)
    if optimizer.warmup_gradient_steps:
        rising = optax.linear_schedule(0.0, first, optimizer.warmup_gradient_steps)
        return optax.join_schedules([rising, falling], [optimizer.warmup_gradient_steps])
    return first if steps is None else falling


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam (Kingma & Ba 2015)."""

    learning_rate: Annotated[float, Range(gt=0, lt=1)]
    b1: Annotated[float, Range(ge=0, lt=1)]
    b2: Annotated[float, Range(ge=0, lt=1)]
    epsilon: Annotated[float, Range(gt=0)]
    max_grad_norm: Clip
    max_grad_norm_ratio: Ratio
    warmup_gradient_steps: Warmup
    decay_gradient_steps: Decay
    decay: Literal["linear", "cosine"]
    final_learning_rate: Annotated[float, Range(ge=0, lt=1)]  # after the decay

    build = _build
    rate = _rate

    def __post_init__(self) -> None:
        _require_whole(self)

    def rule(self) -> optax.GradientTransformation:
        """A clipped gradient becomes a step by this rule."""
        return optax.adam(self.rate(), b1=self.b1, b2=self.b2, eps=self.epsilon)


@dataclass(frozen=True, kw_only=True)
class RAdam:
    """Rectified Adam (Liu et al. 2020): its first steps are shorter."""

    learning_rate: Annotated[float, Range(gt=0, lt=1)]
    b1: Annotated[float, Range(ge=0, lt=1)]
    b2: Annotated[float, Range(ge=0, lt=1)]
    epsilon: Annotated[float, Range(gt=0)]
    max_grad_norm: Clip
    max_grad_norm_ratio: Ratio
    warmup_gradient_steps: Warmup
    decay_gradient_steps: Decay
    decay: Literal["linear", "cosine"]
    final_learning_rate: Annotated[float, Range(ge=0, lt=1)]  # after the decay

    build = _build
    rate = _rate

    def __post_init__(self) -> None:
        _require_whole(self)

    def rule(self) -> optax.GradientTransformation:
        """A clipped gradient becomes a step by this rule."""
        return optax.radam(self.rate(), b1=self.b1, b2=self.b2, eps=self.epsilon)


@dataclass(frozen=True, kw_only=True)
class RMSProp:
    """RMSProp without momentum, as A3C and IMPALA use it."""

    learning_rate: Annotated[float, Range(gt=0, lt=1)]
    rms_decay: Annotated[float, Range(ge=0, lt=1)]  # of the mean of squares
    epsilon: Annotated[float, Range(gt=0)]
    max_grad_norm: Clip
    max_grad_norm_ratio: Ratio
    warmup_gradient_steps: Warmup
    decay_gradient_steps: Decay
    decay: Literal["linear", "cosine"]
    final_learning_rate: Annotated[float, Range(ge=0, lt=1)]  # after the decay

    build = _build
    rate = _rate

    def __post_init__(self) -> None:
        _require_whole(self)

    def rule(self) -> optax.GradientTransformation:
        """A clipped gradient becomes a step by this rule."""
        return optax.rmsprop(self.rate(), decay=self.rms_decay, eps=self.epsilon)


Optimizer = Adam | RAdam | RMSProp


class AverageNorm(NamedTuple):
    """The state of `clip_by_average_norm`."""

    average: Array  # f32[]: of the norms after clipping, not yet corrected for its start at 0
    updates: Array  # i32[]: gradient steps


def clip_by_average_norm(ratio: float) -> optax.GradientTransformation:
    """Scales gradients down to `ratio` times the moving average of their global norm.

    The first gradient that is not zero passes unclipped, as do the zeros before it: no average
    could rise from zero. A spike enters the average only after it was clipped.
    """

    def init(params: Params) -> AverageNorm:
        del params
        return AverageNorm(average=jnp.zeros((), jnp.float32), updates=jnp.zeros((), jnp.int32))

    def update(
        grads: Params, state: AverageNorm, params: Params | None = None
    ) -> tuple[Params, AverageNorm]:
        del params
        norm = optax.tree.norm(grads)
        seen = 1.0 - NORM_DECAY**state.updates
        limit = jnp.where(state.average > 0, ratio * state.average / seen, jnp.inf)
        kept = jnp.minimum(norm, limit)
        scale = jnp.where(norm > limit, limit / norm, 1.0)
        grads = jax.tree.map(lambda x: x * scale.astype(x.dtype), grads)
        average = NORM_DECAY * state.average + (1.0 - NORM_DECAY) * kept
        return grads, AverageNorm(average=average, updates=state.updates + 1)

    return optax.GradientTransformation(init, update)
