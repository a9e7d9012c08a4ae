"""Counts the arithmetic of a traced function: its products and convolutions.

XLA's own cost analysis counts the body of a loop once, however often it runs, and does not see into
the libraries that a backend calls; the trace has both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(function: Callable[..., Any], *given: Any) -> float:
    """Multiplications and additions in products and convolutions, elementwise work left out.

    Of branches the cheapest counts: the result is what must be done at least.
    """
    return _of(jax.make_jaxpr(function)(*given).jaxpr)


def _of(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        else:
            times = equation.params["length"] if name == "scan" else 1
            inner = [_of(each) for each in _inside(equation.params)]
            total += min(inner) if name == "cond" and inner else times * sum(inner)
    return total


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The traces that an equation holds: bodies of loops, jitted functions, branches."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation: Any) -> float:
    """Zeros between the rows of a dilated input, as in gradients, are not counted."""
    kernel = equation.invars[1].aval.shape
    numbers = equation.params["dimension_numbers"]
    per_output = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    dilated = math.prod(equation.params["lhs_dilation"])
    return 2.0 * per_output * math.prod(equation.outvars[0].aval.shape) / dilated
