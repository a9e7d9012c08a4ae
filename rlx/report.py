"""What is in recorded experience: `python -m rlx.report dataset=DIR`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from rlx.replay.experience import files, read, read_layout


def describe(folder: Path) -> list[tuple[str, str]]:
    """(what, how much) of a dataset; raises ValueError, naming the file that is wrong."""
    layout, paths = read_layout(folder), files(folder)
    blocks, valid, lanes, versions = 0, 0, set(), []
    streams: set[tuple[str, int, int]] = set()
    returns: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for path, arrays in read(folder):
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


def main() -> None:
    """`dataset=DIR`."""
    given = dict(text.partition("=")[::2] for text in sys.argv[1:])
    if given.keys() != {"dataset"}:
        got = " ".join(sys.argv[1:]) or "nothing"
        print(f"rlx.report: got {got}; accepted: dataset=DIR", file=sys.stderr)
        sys.exit(2)
    try:
        found = describe(Path(given["dataset"]))
    except ValueError as error:
        print(f"rlx.report: {error}", file=sys.stderr)
        sys.exit(2)
    width = max(len(name) for name, _ in found)
    for name, value in found:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
