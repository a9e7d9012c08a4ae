"""Runs as tables: `from rlx import results; results.runs("multirun")`."""

from rlx.results.reading import load as load
from rlx.results.reading import runs as runs
