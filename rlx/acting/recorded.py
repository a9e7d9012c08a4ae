"""The pool of a run that trains from recorded experience: it has no actors."""

from __future__ import annotations

from rlx.types import Rollout, Weights


class Recorded:
    """An interfaces.ActingPool that plays the env steps of a record and adds nothing.

    The replay holds all blocks already. So every clock of the run (evaluation, checkpoints, the
    quota) goes by the env steps that the trained rows stand for, as in a run with actors.
    """

    def __init__(self, *, env_steps_per_request: int, chain: int, nothing: Rollout) -> None:
        """`nothing`: a rollout without blocks."""
        self.burst_env_steps = env_steps_per_request  # of one full round of requests
        self.chain = chain
        self._nothing = nothing

    def collect(self, timeout_s: float, updates: int) -> list[Rollout]:
        """A rollout that says how many env steps of the record were played."""
        return [self._nothing]

    def publish(self, weights: Weights, env_steps: int) -> None:
        """Does nothing: no actor acts with the weights."""

    def reopen(self) -> None:
        """Does nothing: there are no environments."""

    def stats(self) -> dict[str, float]:
        return {}

    def close(self, timeout_s: float) -> None:
        pass
