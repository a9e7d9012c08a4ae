"""The report's page: HTML that needs nothing beside it, and the same in Markdown."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlx.results import atari
from rlx.results.figures import Picture
from rlx.results.reading import SCORES
from rlx.results.scorecard import left_out
from rlx.results.study import Study, count, plural, task_of

if TYPE_CHECKING:
    import pandas as pd

# table -> its heading
HEADINGS: Mapping[str, str] = {
    "unfinished": "Runs that did not finish",
    "scores": "Final scores",
    "tasks": "Each task of runs with several",
    "human_normalized": "Atari: human-normalised scores over games",
    "atari": "Atari: each game, beside published scores",
    "improvement": "Probability of improvement",
    "speed": "Speed",
    "runs": "All runs",
}
# which figures stand with which table
FIGURES: Mapping[str, tuple[str, ...]] = {
    "scores": ("curves_env_steps", "curves_frames", "rungs", "profile"),
    "tasks": ("tasks",),
    "human_normalized": ("curves_human",),
    "improvement": ("improvement",),
    "speed": ("throughput", "stages"),
}
ROWS = 500  # of a table, on the page; its file has them all
CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1rem;
  max-width: 60rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p, figcaption { color: #444; margin: .4rem 0; } figcaption { font-size: .9rem; }
figure { margin: 1rem 0; } figure b { color: #222; }
img { max-width: min(100%, 46rem); height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #e4e4e4;
  vertical-align: top; }
th { border-bottom: 2px solid #999; }
td, th { white-space: nowrap; } td.n, th.n { text-align: right; }
td.long { white-space: normal; min-width: 16rem; }
.bad { border-left: 4px solid #D55E00; padding-left: .8rem; }
"""


def notes(given: Study, tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """table -> the line that stands under its heading, which says how many runs are in it."""
    cut = {name: len(table) for name, table in tables.items() if len(table) > ROWS}
    return {
        name: text + f" The first {ROWS} of {cut[name]:,} rows; {name}.csv has them all."
        if name in cut
        else text
        for name, text in _notes(given).items()
    }


def _notes(given: Study) -> dict[str, str]:
    every, finished = len(given.runs), len(given.finished)
    of_all = f"{plural(finished)} of {every} finished and count"
    interval = "IQM: the mean without the lowest and the highest quarter (of fewer than 4 runs: "
    interval += "the mean); in brackets its 95 % bootstrap interval over seeds."
    returns = ", ".join(f"{name} ({text})" for name, text in SCORES.items())
    return {
        "unfinished": f"{plural(every - finished)} of {every}, which no final score includes.",
        "scores": f"{of_all}. Score: {SCORES[given.score]}. {interval}",
        "tasks": f"{of_all}. Score: mean return of the task's last training episodes. {interval}",
        "human_normalized": f"{_on_atari(given)}. {_over_games(given)}",
        "atari": f"{_on_atari(given)}. {_by_game(given)}",
        "improvement": f"{of_all}. Ties count half; 0.5 is no difference.",
        "speed": f"Means over runs, from the first row of metrics to the last; {plural(every)}.",
        "runs": f"{count(given.runs)}. Last come mean returns: {returns}.",
    }


def _on_atari(given: Study) -> str:
    every = [run for run in given.runs if task_of(run) in given.games]
    finished = [run for run in every if run in given.finished]
    return f"{plural(len(finished))} of {len(every)} on Atari finished and count"


def _over_games(given: Study) -> str:
    without = ", ".join(left_out(given))
    return (
        f"0: random play, 1: the human tester. Score: {SCORES[given.score]}. Median and mean: of "
        "the games' means over runs; IQM: of all runs of all games; optimality gap: how far runs "
        "stay below the human on average, those above counting as 1. In brackets: the 95 % "
        "bootstrap interval, runs drawn anew within each game; none unless each game has two runs. "
        "Frames: of the emulator, in a run; episodes: of all runs together. Groups compare only "
        "over the same games." + (f" Left out, none of the 57 games: {without}." if without else "")
    )


def _by_game(given: Study) -> str:
    known = "; ".join(f"{each.title}: {each.conditions}" for each in atari.PUBLISHED.values())
    return (
        f"Score: {SCORES[given.score]}; mean over runs, in brackets its 95 % bootstrap interval, "
        "none for one run. Published scores are final ones at their own frames, which their "
        f"columns name, and not at ours: {known}. Budgets and protocols differ from each other. "
        "At equal frames: Dopamine's curves, means of training episodes with sticky actions, where "
        f"one has a point within {atari.EQUAL:.0%} of our frames. Empty: not in the source. The "
        "sources are in rlx/results/atari_scores.csv and atari_curves.csv."
    )


def page(given: Study, tables: Mapping[str, pd.DataFrame], pictures: Sequence[Picture]) -> str:
    """The whole HTML page."""
    title = html.escape(f"rlx: {given.folder.resolve().name}")
    body = [f"<h1>{title}</h1>", *(f"<p>{html.escape(line)}</p>" for line in _about(given))]
    for name, heading in HEADINGS.items():
        drawn = [_figure(p) for p in pictures if p.path.stem in FIGURES.get(name, ())]
        if name in tables:
            note = html.escape(notes(given, tables)[name])
            inside = f"<h2>{heading}</h2><p>{note}</p>{_html(tables[name])}"
            drawn.insert(0, f'<div class="bad">{inside}</div>' if name == "unfinished" else inside)
        body += drawn
    head = f'<meta charset="utf-8"><title>{title}</title><style>{CSS}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'
    )


def markdown(given: Study, tables: Mapping[str, pd.DataFrame], pictures: Sequence[Picture]) -> str:
    """The same page in Markdown; its pictures are the files beside it."""
    lines = [f"# rlx: {given.folder.resolve().name}", *_about(given)]
    for name, heading in HEADINGS.items():
        if name in tables:
            lines += [f"## {heading}", notes(given, tables)[name], markdown_table(tables[name])]
        for picture in pictures:
            if picture.path.stem in FIGURES.get(name, ()):
                lines += [f"![{picture.title}]({picture.path.name})", picture.caption]
    return "\n\n".join(lines) + "\n"


def _about(given: Study) -> list[str]:
    by = ", ".join(given.by) or "nothing (no setting but the seed and the task varies)"
    tasks = ", ".join(given.tasks[:6]) + (", ..." if len(given.tasks) > 6 else "")
    groups = plural(len(given.groups), "group")
    number = plural(len(given.tasks), "task")
    return [f"{count(given.runs)}. {groups}, made by {by}; {number}: {tasks}."]


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    title, caption = html.escape(picture.title), html.escape(picture.caption)
    image = f'<img alt="{title}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption><b>{title}.</b> {caption}</figcaption></figure>"


# --- tables --------------------------------------------------------------------------------------


def shown(table: pd.DataFrame) -> tuple[list[str], list[list[str]], list[bool]]:
    """(columns, rows, which columns are numbers); X, X_low and X_high become X [95 %]."""
    names = [n for n in table if not n.endswith(("_low", "_high"))]
    has = [f"{name}_low" in table for name in names]
    rows = []
    for _, row in table.head(ROWS).iterrows():
        cells = [_cell(row[name]) for name in names]
        for place in (i for i, has_interval in enumerate(has) if has_interval and cells[i]):
            low, high = (_cell(row[f"{names[place]}_{side}"]) for side in ("low", "high"))
            cells[place] += f" [{low}, {high}]" if low else ""
        rows.append(cells)
    titles = [f"{name} [95 %]" if h else str(name) for name, h in zip(names, has, strict=True)]
    numbers = [table[name].dtype.kind in "if" for name in names]
    return titles, rows, numbers


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        return str(value)
    number = float(value)
    if number.is_integer() or abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.4g}"


def _html(table: pd.DataFrame) -> str:
    titles, rows, numbers = shown(table)

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["n" if n else "long" * (len(c) > 40) for c, n in zip(cells, numbers, strict=True)]
        pairs = zip(cells, (f' class="{k}"' if k else "" for k in kinds), strict=True)
        return "<tr>" + "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for c, k in pairs) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(titles, "th")}{body}</table></div>'


def markdown_table(table: pd.DataFrame) -> str:
    """A pipe table."""
    titles, rows, numbers = shown(table)
    escape: Callable[[str], str] = lambda text: text.replace("|", "\\|").replace("\n", " ")  # noqa: E731
    lines = [titles, ["---:" if number else "---" for number in numbers], *rows]
    return "\n".join("| " + " | ".join(map(escape, cells)) + " |" for cells in lines)


def plain_table(table: pd.DataFrame) -> str:
    """Columns for a terminal."""
    titles, rows, numbers = shown(table)
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = []
    for cells in (titles, *rows):
        padded = zip(cells, widths, numbers, strict=True)
        lines.append("  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in padded).rstrip())
    return "\n".join(lines)
