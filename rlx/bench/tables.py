"""The one table of `python -m rlx.bench what=all`: its lines, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from textwrap import fill
from typing import Any, Literal

# What a line is: rlx beside a roofline, what was measured beside it, a figure without one, none.
Kind = Literal["own", "beside", "detail", "failed"]

WIDTH = 120  # columns of a line of prose
FAILED = "could not be made"
AGAIN = "trained rows/s"  # says the same as a row of updates
ROOFLINES: Mapping[str, str] = {
    "acting": "EnvPool's `step` and the jitted policy in a bare loop, with the same lanes; of Ray "
    "actors as many bare processes, bound to cores alike",
    "replay": "one thread's `np.copyto` of the same bytes; of batches ahead the driver without a "
    "replay",
    "learner": "the compiled update on data that lies on the device",
    "weights": "a bare Ray call with as many bytes, there and back; the ratio is its time by that "
    "from publishing to acting, so less than 1 is slower",
    "end_to_end": "acting alone and updates alone, one after the other; where they have cores of "
    "their own a run may be faster",
    "scaling": "over lanes: the bare loop with as many lanes; over actors the ratio is to the "
    "first number of actors, and there is no roofline",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measurement, or one that could not be made; ratios are of the rounds of one command."""

    group: str
    name: str
    setup: str
    value: float | None
    unit: str
    roofline: float | None
    ratio: float | None
    least: float | None
    most: float | None
    note: str
    kind: Kind


def read_line(row: Mapping[str, Any], group: str, setup: str, own: Sequence[str]) -> Line:
    """The line of a bench's row; own: how the names of rlx's own measurements end."""
    _, inside, name = row["name"].split("/", 2)
    name = name if inside == setup else f"{inside}/{name}"
    compared = row["ratio"] is not None
    kind: Kind = ("own" if name.endswith(tuple(own)) else "beside") if compared else "detail"
    if kind == "own" and row["unit"] == AGAIN:
        kind = "detail"
    numbers = {key: row[key] for key in ("value", "unit", "roofline", "ratio", "least", "most")}
    return Line(group=group, name=name, setup=setup, note="", kind=kind, **numbers)


def failed_line(group: str, setup: str, name: str, note: str) -> Line:
    """The line of a measurement that is not there; the note says why."""
    return Line(
        group=group, name=name, setup=setup, note=note, kind="failed",
        value=None, unit="", roofline=None, ratio=None, least=None, most=None,
    )  # fmt: skip


def as_csv(lines: Iterable[Line]) -> str:
    """Every line, with all digits."""
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Line)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(line) for line in lines)
    return text.getvalue()


def as_markdown(lines: Sequence[Line], about: Mapping[str, str], picture: str) -> str:
    """The page: about the machine, the table, what was measured besides, the rooflines.

    picture: a line of Markdown.
    """
    shown = [line for line in lines if line.kind in ("own", "failed")]
    more = [line for line in lines if line.kind == "detail"]
    groups = dict.fromkeys(line.group for line in shown)
    parts = [
        "# The speed of rlx beside what this machine could do",
        "\n".join(_item(key, value) for key, value in about.items()),
        "The ratio is the median over rounds of the ratio within a round, in which both took turns."
        "\nBeside it are the least and the largest of a round.",
        _table(
            ("part", "setup", "measured", "value", "roofline", "ratio", "note"), map(_row, shown)
        ),
        picture,
        "The rooflines:",
        "\n".join(_item(group, f"{ROOFLINES[group]}.") for group in groups),
    ]
    if more:
        detail = ("part", "setup", "measured", "value")
        parts += ["## Further figures", _table(detail, (_row(line)[:4] for line in more))]
    return "\n\n".join(parts) + "\n"


def _item(name: str, text: str) -> str:
    """An item of a list, in lines of WIDTH columns at most; a command stays on one."""
    item = f"- {name}: {text}"
    if text.startswith("`"):
        return item
    return fill(item, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _row(line: Line) -> tuple[str, ...]:
    value = "" if line.value is None else f"{number(line.value)} {line.unit}".strip()
    roofline = "" if line.roofline is None else number(line.roofline)
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    if line.least is not None and line.most is not None:
        ratio += f" ({line.least:.2f} to {line.most:.2f})"
    return line.group, line.setup, line.name, value, roofline, ratio, line.note


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell would end it."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    ruled = [list(head), ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def number(value: float) -> str:
    """A number with as many digits as it deserves."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
