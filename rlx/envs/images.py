"""Images: leaves of three axes, which all networks read as [channels, height, width].

They are bytes (0 .. 255, which networks divide by 255), bools, or floats; those that declare
bounds beyond -1 .. 1 are brought to 0 .. 1 here. All of it follows from what is declared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlx.types import Array

Image = Literal["auto", "chw", "hwc"]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Turns an environment's image into one of rlx."""

    shape: tuple[int, ...]  # [channels, height, width]
    dtype: str
    turned: bool  # it came as [height, width, channels]
    low: float = 0.0
    span: float | None = None  # of its values, which become 0 .. 1; None: they stay as they are
    said: str = ""

    def read(self, array: Array) -> Array:
        """The image [n, C, H, W], of NumPy or JAX, from what the environment gives."""
        array = array.transpose(0, 3, 1, 2) if self.turned else array
        if self.span is None:
            return array.astype(self.dtype)
        return (array.astype("float32") - np.float32(self.low)) * np.float32(1 / self.span)


def picture(
    name: str, shape: tuple[int, ...], dtype: str, low: float, high: float, image: Image
) -> Picture:
    """The rule for a leaf of this shape, dtype and declared range."""
    turned, about = _layout(shape, image)
    carried, span, scaled = _range(np.dtype(dtype), low, high)
    said = [text for text in (about, scaled) if text]
    return Picture(
        shape=(shape[2], shape[0], shape[1]) if turned else shape,
        dtype=carried,
        turned=turned,
        low=float(low) if span is not None else 0.0,
        span=span,
        said=f"env.image={image}: {name!r} {list(shape)} {' and '.join(said)}" if said else "",
    )


def _layout(shape: tuple[int, ...], image: Image) -> tuple[bool, str]:
    """(whether the channels come last, what is to be said of it)."""
    first, middle, last = shape
    if image != "auto":
        return image == "hwc", ""
    if (first == middle) != (middle == last):  # of three sides two are alike: height and width
        turned = first == middle
    elif min(first, last) < middle and first != last:
        turned = last < first
    else:
        says = "is read as [channels, height, width]; set chw, or hwc if the channels come last"
        return False, says
    return turned, "is read as [height, width, channels]" if turned else ""


def _range(dtype: np.dtype, low: float, high: float) -> tuple[str, float | None, str]:
    """(the dtype that carries it, the span that becomes 0 .. 1, what is to be said of it)."""
    if dtype.kind == "b":
        return "bool", None, ""
    if dtype.kind in "iu" and low >= 0 and high <= 255:
        return ("bool" if high <= 1 else "uint8"), None, ""
    own = dtype.name if dtype.itemsize <= 4 else {"f": "float32"}.get(dtype.kind, "int32")
    limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    if dtype.itemsize >= 4 and (low <= limits.min or high >= limits.max):
        return own, None, "declares no bounds: its values are not scaled"
    if low >= -1 and high <= 1:
        return own, None, ""
    return "float32", float(high) - float(low), f"is brought from {low:g} .. {high:g} to 0 .. 1"
