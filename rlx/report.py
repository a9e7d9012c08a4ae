"""Shows what runs came to, or what is in recorded experience.

    python -m rlx.report runs=DIR         a page with curves, scores and speed of all runs below DIR
    python -m rlx.report dataset=DIR      what experience that was recorded there holds

Options:

    runs=DIR           the folder below which runs are
    group=null         settings that make groups, as group=agent.n_step,network; null: all that
                       vary, but for seed and env.id (with runs=)
    out=null           where report.html, report.md, *.png and *.csv go; null: DIR/report (runs=)
    dataset=DIR        the folder of recorded experience

The page holds its pictures and needs nothing beside it. pip install 'rlx[report]'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx.config.options import command
from rlx.problems import refuse
from rlx.replay.files.experience import files, read, read_layout
from rlx.runs.files import write_whole

if TYPE_CHECKING:
    import pandas as pd

    from rlx.results.study import Study

# --- recorded experience -------------------------------------------------------------------------


def describe(folder: Path) -> list[tuple[str, str]]:
    """(what, how much) of a dataset; raises ValueError, naming the file that is wrong."""
    layout, paths = read_layout(folder), files(folder)
    blocks, valid, lanes, versions = 0, 0, set(), []
    streams: set[tuple[str, int, int]] = set()
    returns: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for path, arrays, _ in read(folder):
        run = path.name.partition("-")[0]
        blocks += len(arrays["lane"])
        valid += int(np.count_nonzero(arrays["rows/valid"]))
        lanes |= set(arrays["lane"].tolist())
        streams |= {(run, *pair) for pair in zip(*_pairs(arrays), strict=True)}
        versions += [arrays["weights_version"]]
        returns.append(arrays["episode/return"])
        lengths.append(arrays["episode/env_steps"])
    version = np.concatenate(versions)
    return [
        ("runs", f"{len({path.name.partition('-')[0] for path in paths})}"),
        ("files", f"{len(paths)}, {sum(path.stat().st_size for path in paths) / 1e6:,.1f} MB"),
        ("blocks", f"{blocks:,} of {layout.block_rows} rows"),
        ("env steps", f"{valid:,} ({blocks * layout.block_rows - valid:,} rows are none)"),
        ("lanes", f"{len(lanes)} of {layout.lanes}, in {len(streams)} unbroken streams"),
        ("episodes", _episodes(np.concatenate(returns), np.concatenate(lengths))),
        ("weights", f"versions {version.min()} .. {version.max()}" if version.size else "none"),
        *((path, f"{dtype}{shape}") for path, (shape, dtype) in sorted(layout.leaves.items())),
    ]


def _pairs(arrays: dict[str, Any]) -> tuple[list[int], list[int]]:
    return arrays["lane"].tolist(), arrays["chain"].tolist()


def _episodes(returns: np.ndarray, env_steps: np.ndarray) -> str:
    if not returns.size:
        return "none ended"
    low, middle, high = np.quantile(returns, [0.0, 0.5, 1.0])
    return (
        f"{returns.size:,}; return mean {returns.mean():.4g}, median {middle:.4g}, "
        f"{low:.4g} .. {high:.4g}; {env_steps.mean():.4g} env steps each"
    )


# --- runs ----------------------------------------------------------------------------------------


def report_runs(folder: Path, by: Sequence[str] | None = None, out: Path | None = None) -> Path:
    """Writes the report of all runs below a folder and shows its tables; the page's path.

    Raises ValueError where there is no run, ConfigError for an unknown setting in `by`.
    """
    from rlx.results.figures import draw
    from rlx.results.page import markdown, page
    from rlx.results.reading import need
    from rlx.results.study import study
    from rlx.results.tables import tables

    need("matplotlib")
    given = study(folder, by)
    found = tables(given)
    target = out or folder / "report"
    try:
        target.mkdir(parents=True, exist_ok=True)
        pictures = draw(given, target)
        for name, table in found.items():
            write_whole(target / f"{name}.csv", table.to_csv(index=False).encode())
        write_whole(target / "report.md", markdown(given, found, pictures).encode())
        write_whole(target / "report.html", page(given, found, pictures).encode())
    except OSError as error:
        raise ValueError(
            f"{target} cannot be written ({error.strerror}); give another out="
        ) from error
    _show_runs(given, found)
    return target / "report.html"


def _show_runs(given: Study, found: dict[str, pd.DataFrame]) -> None:
    from rlx.results.page import HEADINGS, plain_table
    from rlx.results.study import count

    print(count(given.runs))
    for name in ("unfinished", "scores", "human_normalized", "improvement", "speed"):
        if name in found:
            print(f"\n{HEADINGS[name]}\n{plain_table(found[name])}")


# --- the command line ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line takes these options; the module's docstring explains them."""

    runs: str | None = None
    dataset: str | None = None
    group: tuple[str, ...] | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        if (self.runs is None) == (self.dataset is None):
            says = "give one of them: runs=DIR, with group= and out= if wanted, or dataset=DIR"
            raise refuse("runs, dataset", says)
        if self.dataset is not None and (self.group is not None or self.out is not None):
            raise refuse("group, out", "are options of runs=DIR; leave them out with dataset=DIR")


def main(argv: Sequence[str] | None = None) -> None:
    """`runs=DIR`, `dataset=DIR`; the module's docstring lists the options."""
    command("rlx.report", __doc__, Options, _report, argv, also=(ValueError, ImportError))


def _report(options: Options) -> None:
    if options.dataset is not None:
        _dataset(Path(options.dataset))
    elif options.runs is not None:
        out = None if options.out is None else Path(options.out)
        print(f"\n{report_runs(Path(options.runs), options.group, out)}")


def _dataset(folder: Path) -> None:
    found = describe(folder)
    width = max(len(name) for name, _ in found)
    for name, value in found:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
