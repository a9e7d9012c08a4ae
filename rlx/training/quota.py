"""The account between acting and learning: so many trained rows per env step, no more, no less.

One update trains batch_size * unroll rows; env steps are valid rows added. The account opens when
enough sequences are startable; nothing before that is owed. From then on, with E env steps:

    learn  while  trained + rows_per_update <= ratio * E
    act    while  ratio * E - trained       <= rows_per_update + ratio * burst_env_steps

Both cannot be blocked: if learning is, ratio * E - trained < rows_per_update, and acting is free.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, final

log = logging.getLogger(__name__)


@final
class Quota:
    """Keeps the replay ratio. Counts are of the whole run; not thread-safe."""

    def __init__(
        self,
        *,
        ratio: float | None,
        rows_per_update: int,
        burst_env_steps: int,
        min_sequences: int = 1,
    ) -> None:
        """Settings of the account.

        ratio: trained rows per env step; None lets each side run at its own rate.
        rows_per_update: batch_size * unroll. burst_env_steps: of one full round of requests.
        min_sequences: with fewer startable nothing is learnt, and acting does not wait.
        """
        if ratio is not None and not ratio > 0:
            raise ValueError(f"ratio must be above 0 or null (no quota), got {ratio}.")
        if rows_per_update < 1 or burst_env_steps < 0 or min_sequences < 1:
            raise ValueError(
                f"Need rows_per_update >= 1, burst_env_steps >= 0 and min_sequences >= 1, got "
                f"{rows_per_update}, {burst_env_steps} and {min_sequences}."
            )
        self._ratio = ratio
        self._rows_per_update = rows_per_update
        self._burst_env_steps = burst_env_steps
        self._min_sequences = min_sequences
        self._opened_at: int | None = None  # env steps
        self._trained_rows = 0  # since then
        self._changed_at = 0  # env steps, where the ratio of now began to hold
        self._earned_rows = 0.0  # before that, by the ratios before it

    @property
    def is_open(self) -> bool:
        return self._opened_at is not None

    def open(self, env_steps: int) -> None:
        """Opens the account at `env_steps`; an open account stays as it is."""
        if self._opened_at is None:
            self._opened_at = self._changed_at = env_steps

    def change_ratio(self, ratio: float, env_steps: int) -> None:
        """Goes on with another ratio from here; what was earned until now stays earned."""
        if ratio == self._ratio:
            return
        if self._opened_at is not None and self._ratio is not None:
            self._earned_rows += self._ratio * (env_steps - self._changed_at)
            self._changed_at = env_steps
        self._ratio = ratio

    def may_learn(self, env_steps: int, startable: int) -> bool:
        """Says whether one more update is allowed."""
        if not self.is_open or startable < self._min_sequences:
            return False
        return self._ratio is None or self._rows_per_update <= self._owed_rows(env_steps)

    def may_act(self, env_steps: int, startable: int) -> bool:
        """Says whether more env steps may be asked for."""
        if not self.is_open or startable < self._min_sequences or self._ratio is None:
            return True
        slack = self._rows_per_update + self._ratio * self._burst_env_steps
        return self._owed_rows(env_steps) <= slack

    def trained(self, rows: int) -> None:
        """Books an update."""
        if not self.is_open:
            raise RuntimeError("The quota's account is not open; call open(env_steps) first.")
        self._trained_rows += rows

    def ratio_so_far(self, env_steps: int) -> float:
        """Trained rows per env step since the account opened; 0 before."""
        if self._opened_at is None or env_steps <= self._opened_at:
            return 0.0
        return self._trained_rows / (env_steps - self._opened_at)

    def state(self) -> dict[str, Any]:
        return {
            "opened_at": -1 if self._opened_at is None else self._opened_at,
            "trained_rows": self._trained_rows,
            "ratio": self._ratio,
            "changed_at": self._changed_at,
            "earned_rows": self._earned_rows,
        }

    def restore(self, state: Mapping[str, Any], env_steps: int, *, follows: bool = False) -> None:
        """Takes over a saved account; with another ratio a new one opens at `env_steps`.

        The old one's rows were trained at the old ratio. By the new one they would be a debt, or a
        credit, of the whole run so far.
        follows: the ratio is scheduled, so the account goes on with the one that it had.
        """
        opened_at, before = int(state["opened_at"]), state.get("ratio", self._ratio)
        if follows and before is not None:
            self._ratio = before
        if opened_at >= 0 and before != self._ratio:
            log.warning(
                "replay.ratio=%s, %s before: a new account between acting and learning begins at "
                "%s env steps",
                *(_shown(self._ratio), _shown(before), f"{env_steps:,}"),
            )
            self._opened_at = self._changed_at = env_steps
            return
        self._opened_at = None if opened_at < 0 else opened_at
        self._trained_rows = int(state["trained_rows"])
        self._changed_at = int(state.get("changed_at", max(0, opened_at)))  # earlier ones lack it
        self._earned_rows = float(state.get("earned_rows", 0.0))

    def _owed_rows(self, env_steps: int) -> float:
        """Rows that may still be trained."""
        assert self._ratio is not None
        assert self._opened_at is not None
        now = self._ratio * (env_steps - self._changed_at)
        return self._earned_rows + now - self._trained_rows


def _shown(ratio: float | None) -> str:
    return "null" if ratio is None else f"{ratio:g}"
