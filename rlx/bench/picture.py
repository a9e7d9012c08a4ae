"""The picture of `python -m rlx.bench what=all`: ratios to the rooflines, and how acting scales."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlx.bench.tables import FAILED, ROOFLINES, Line, number
from rlx.results.figures import GREY, PALETTE, STYLE
from rlx.results.reading import need

LANES = re.compile(r"(\d+) lanes/(.+)")
ACTORS = re.compile(r"ray_pool/(\d+) actors")
BAR_INCHES = 0.24
PANEL_INCHES = 2.6
WIDE = 1.6  # ratios beyond are cut off, and written beside their bars
DPI = 130
ENDINGS = ("/sample + update", "/whole", "/pool")  # that go without saying
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


def draw(lines: Sequence[Line], path: Path) -> None:
    """Writes a PNG: bars of ratios, a panel for each setup, and the scaling below them.

    Raises ImportError, which says what to install, where matplotlib is not there.
    """
    with need("matplotlib").rc_context(STYLE):
        from matplotlib.figure import Figure

        setups = list(dict.fromkeys(line.setup for line in lines))
        bars = {each: _bars(lines, each) for each in setups}
        height = BAR_INCHES * max(map(len, bars.values())) + 1.2
        figure = Figure(figsize=(6.2 * len(setups), height + PANEL_INCHES))
        above, below = _halves(figure, height)
        axes = above.subplots(1, len(setups), squeeze=False)[0]
        for setup, ax in zip(setups, axes, strict=True):
            _ratios(ax, setup, bars[setup])
        panels = below.subplots(1, 2 * len(setups), squeeze=False)[0]
        for number_, setup in enumerate(setups):
            _over_lanes(panels[2 * number_], setup, lines)
            _over_actors(panels[2 * number_ + 1], setup, lines)
        whole = path.with_name(f".{path.name}")
        figure.savefig(whole, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.1)
        whole.replace(path)


def _halves(figure: Any, height: float) -> tuple[Any, Any]:
    above, below = figure.subfigures(2, 1, height_ratios=(height, PANEL_INCHES))
    return above, below


def _bars(lines: Sequence[Line], setup: str) -> list[Line]:
    """rlx's own measurements that have a roofline, and those that could not be made."""
    own = [line for line in lines if line.setup == setup and line.kind in ("own", "failed")]
    return [line for line in own if line.kind == "failed" or line.least is not None]


def _ratios(ax: Any, setup: str, bars: Sequence[Line]) -> None:
    """Horizontal bars with the least and the largest ratio of a round, coloured by part."""
    for place, line in enumerate(bars):
        if line.ratio is None or line.least is None or line.most is None:
            ax.text(0.02, place, FAILED, va="center", color="#888888", style="italic", size=8)
            continue
        color = PALETTE[list(ROOFLINES).index(line.group) % len(PALETTE)]
        ax.barh(place, min(line.ratio, WIDE), color=color, height=0.7, alpha=0.85)
        ends = [min(end, WIDE) for end in (line.least, line.most)]
        ax.plot(ends, [place, place], color="#333333", linewidth=1)
        at = max(ends[1], min(line.ratio, WIDE)) + 0.02
        ax.text(at, place, f"{line.ratio:.2f}", va="center", size=8, bbox=ON_WHITE)
    ax.axvline(1.0, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
    ax.set_yticks(range(len(bars)), [_label(line) for line in bars], size=8)
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.set_xlim(0, WIDE + 0.15)
    ax.grid(axis="y", visible=False)
    ax.set_title(f"{setup}: share of the roofline\n(bar: median of rounds, line: least to largest)")


def _label(line: Line) -> str:
    name = line.name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return f"{line.group}: {name}".replace("_", " ")


def _over_lanes(ax: Any, setup: str, lines: Sequence[Line]) -> None:
    """The local pool and its roofline."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        found = LANES.fullmatch(line.name)
        if line.setup == setup and line.group == "scaling" and found and line.value:
            curves.setdefault(found[2], []).append((int(found[1]), line.value))
    shown = {"local pool": (PALETTE[0], "-"), "envpool + policy": ("#888888", "--")}
    for name, (color, style) in shown.items():
        _curve(ax, curves.get(name, []), color, style, name)
    _scaled(ax, f"{setup}: local pool", "lanes", curves.get("local pool", []))
    if curves:
        ax.legend(fontsize=8)


def _over_actors(ax: Any, setup: str, lines: Sequence[Line]) -> None:
    points = [
        (int(found[1]), line.value)
        for line in lines
        if line.setup == setup and line.value and (found := ACTORS.fullmatch(line.name))
    ]
    _curve(ax, points, PALETTE[1], "-", "Ray actors")
    _scaled(ax, f"{setup}: Ray actors", "actors of 32 lanes", points)


def _curve(ax: Any, points: Sequence[tuple[int, float]], color: str, style: str, name: str) -> None:
    if points:
        ax.plot(*zip(*points, strict=True), color=color, linestyle=style, marker="o", label=name)


def _scaled(ax: Any, title: str, unit: str, points: Sequence[tuple[int, float]]) -> None:
    ax.set_title(title)
    if not points:
        ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes, color=GREY)
        ax.set_axis_off()
        return
    ax.set(xscale="log", xlabel=unit, ylabel="env steps/s")
    ax.set_xticks([count for count, _ in points], [str(count) for count, _ in points])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda value, _: number(value) if value else "0")
