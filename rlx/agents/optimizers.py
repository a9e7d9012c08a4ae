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


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """A rule after optional clips of the gradient, with a rate that may rise first and fall later.

    The rules are Adam (Kingma & Ba 2015), RAdam (Liu et al. 2020), and the RMSProp of A3C and
    IMPALA, of which b1 is the momentum and b2 the decay of the mean of squares.
    """

    rule: Literal["adam", "radam", "rmsprop"]
    learning_rate: Annotated[float, Range(gt=0, lt=1)]
    b1: Annotated[float, Range(ge=0, lt=1)]
    b2: Annotated[float, Range(ge=0, lt=1)]
    epsilon: Annotated[float, Range(gt=0)]
    max_grad_norm: Annotated[float, Range(gt=0)] | None  # None: no clipping
    max_grad_norm_ratio: Annotated[float, Range(gt=1)] | None  # to its moving average; None: any
    warmup_gradient_steps: Annotated[int, Range(ge=0, le=MOST)]  # the rate rises from 0 for so long
    decay_gradient_steps: Annotated[int, Range(ge=1, le=MOST)] | None  # then falls; None: never
    decay: Literal["linear", "cosine"]
    final_learning_rate: Annotated[float, Range(ge=0, lt=1)]  # after that

    def __post_init__(self) -> None:
        if self.decay_gradient_steps is not None:
            return
        last, decay = self.final_learning_rate, self.decay
        if last or decay != "linear":
            given = f"final_learning_rate={last:g}" if last else f"decay={decay}"
            raise ValueError(
                f"{given} says how the rate falls, but it never does; "
                "set decay_gradient_steps, too."
            )

    @property
    def gradient_steps_to_zero(self) -> int | None:
        """The gradient steps after which the rate stays 0; None: it never does."""
        if self.decay_gradient_steps is None or self.final_learning_rate > 0:
            return None
        return self.warmup_gradient_steps + self.decay_gradient_steps

    def build(self) -> optax.GradientTransformation:
        """The chain of optax, for gradients that are averaged over the devices already."""
        clips = []
        if self.max_grad_norm is not None:
            clips.append(optax.clip_by_global_norm(self.max_grad_norm))
        if self.max_grad_norm_ratio is not None:
            clips.append(clip_by_average_norm(self.max_grad_norm_ratio))
        return optax.chain(*clips, self._rule()) if clips else self._rule()

    def _rule(self) -> optax.GradientTransformation:
        if self.rule == "rmsprop":
            momentum = self.b1 or None  # with 0 optax would keep a state for it
            return optax.rmsprop(self.rate(), self.b2, self.epsilon, momentum=momentum)
        rule = optax.adam if self.rule == "adam" else optax.radam
        return rule(self.rate(), b1=self.b1, b2=self.b2, eps=self.epsilon)

    def rate(self) -> optax.ScalarOrSchedule:
        """The learning rate: a function of the gradient step, or one number for all."""
        first, last, steps = self.learning_rate, self.final_learning_rate, self.decay_gradient_steps
        if steps is None:
            falling = optax.constant_schedule(first)
        elif self.decay == "linear":
            falling = optax.linear_schedule(first, last, steps)
        else:
            falling = optax.cosine_decay_schedule(first, steps, alpha=last / first)
        if self.warmup_gradient_steps:
            rising = optax.linear_schedule(0.0, first, self.warmup_gradient_steps)
            return optax.join_schedules([rising, falling], [self.warmup_gradient_steps])
        return first if steps is None else falling


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
