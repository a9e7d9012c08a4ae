"""Runs as tables: `from rlx import results; results.runs("multirun")`."""

from rlx.results.reading import load as load
from rlx.results.reading import runs as runs
from rlx.results.scorecard import score_card as score_card
