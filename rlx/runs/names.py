"""Every metric that a run may write, with its meaning and unit (docs/metrics.md is made of it).

A `*` stands for any characters: the name of a part, a task, a choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from rlx.runs.metrics import NAMES, RUNGS, SPREADS
from rlx.runs.times import STAGES

ACTING: Mapping[str, str] = {
    "acting/action_share/*": "share of the interval's actions that were this choice, 0 .. 1; "
    "of several choices the number of the choice comes first",
    "acting/action_mean/*": "mean of this element of the interval's real actions, as chosen",
    "acting/action_std/*": "standard deviation of the same",
    "acting/cut_episodes": "episodes that were cut, as an answer was not finite, since the start",
    "acting/env_restarts": "environments that raised and were opened anew (env.restarts), "
    "since the start",
    "acting/actors_ready": "Ray actors that can act now",
    "acting/actors_wanted": "Ray actors of the run",
    "acting/restarts": "lives of Ray actors that ended, since the start",
    "acting/restarts_*": "the same by cause: raised, died, hung, lost_object",
    "acting/dropped_env_steps": "env steps that threads dropped, as nobody collected them "
    "(acting.realtime)",
    "acting/lost_env_steps_at_most": "env steps that were asked of Ray actors and lost with them, "
    "at most",
    "acting/wire_bytes_per_env_step": "bytes that travel for an env step, compressed",
    "acting/wire_ratio": "bytes before compression / bytes after it",
}
LEARNER: Mapping[str, str] = {
    "learner/grad_norm/*": "the same of one part of the network",
    "learner/td_mean": "mean over the interval's updates of |TD error| of the trained rows",
    "learner/q_drift": "mean over the interval's updates of |Q now - Q of acting time| of each "
    "sequence's first trained row",
    "learner/value_mean": "mean over the interval's updates of the states' values",
    "learner/policy_loss": "mean over the interval's updates of the policy's part of the loss",
    "learner/value_loss": "mean over the interval's updates of the value's part, before its "
    "coefficient",
    "learner/entropy": "mean over the interval's updates of the policy's entropy, nats",
    "learner/kl": "mean over the interval's updates of the divergence of the policy from that of "
    "acting time, nats",
    "learner/clipped": "share of the rows whose ratio was clipped (PPO), 0 .. 1",
    "learner/rho": "mean of V-trace's clipped importance, 0 .. most_rho",
    "learner/ratio_error": "largest |policy now / policy of acting time - 1| of the rows; 0 where "
    "both are of the same weights",
    "learner/steps_of_update": "gradient steps of an update",
    "learner/critic_loss": "mean over the interval's updates of the critics' loss (SAC)",
    "learner/actor_loss": "mean over the interval's updates of the actor's loss (SAC)",
    "learner/temperature": "the entropy's coefficient (SAC)",
    "learner/finite": "share of the interval's updates that were finite, 0 .. 1",
    "learner/device_busy": "share of the interval's updates that were asked for while the one "
    "before was still computed, 0 .. 1",
    "learner/gradient_steps": "gradient steps made by the run",
    "learner/restarts": "restarts of the learner processes, since the start",
}
REPLAY: Mapping[str, str] = {
    "replay/startable_sequences": "sequences that can be drawn now",
    "replay/blocks_dropped": "blocks that came out of order and were left out, since the start",
    "replay/redraws": "draws that were repeated, as their rows were overwritten meanwhile",
    "replay/stale_updates": "priorities that came for sequences which were overwritten",
    "replay/prefetch_lag_updates": "updates since the last batch was drawn (replay.prefetch)",
    "replay/importance_exponent": "the exponent of importance now",
    "replay/importance_mean": "mean over the interval's batches of the importance, of which the "
    "largest is 1",
    "replay/importance_min": "mean over the interval's batches of their least importance",
    "replay/priority_mean": "mean priority of the sequences that can be drawn now, TD",
    "replay/priority_std": "standard deviation of the same",
    "replay/priority_min": "least of the same",
    "replay/priority_max": "largest of the same",
    "replay/demonstrations_priority_*": "the same of the demonstrations (replay=demonstrations)",
    "replay/waiting_sequences": "sequences that wait in the queue (replay=online)",
    "replay/dropped_sequences": "sequences that were dropped as too old (replay=online)",
}
OTHERS: Mapping[str, str] = {
    "evaluation/weights_version": "updates made when the evaluated weights were taken",
    "evaluation/of_env_steps": "env steps of the run when they were taken (evaluation.where=actor)",
    "evaluation/skipped": "evaluations that were due while another one was made, since the start",
    "evaluation/*/return_mean": "mean unclipped return of the evaluation of this name "
    "(evaluation.others)",
    "evaluation/*/return_min": "least return of the same",
    "evaluation/*/return_max": "largest return of the same",
    "evaluation/*/return_std": "standard deviation of the same, over n and not n - 1",
    "evaluation/*/episodes": "episodes of the same",
    "evaluation/*/of_env_steps": "env steps of the run when its weights were taken",
    "weights/publish_to_used_s": "median seconds from publishing weights to their use by an actor",
    "weights/used_age_updates": "updates between the weights that Ray actors use and the learner's",
    "task/*/return_mean": "train/return_mean of one task's last logging.window_episodes episodes",
    "task/*/length_mean": "mean length of the same, env steps",
    "task/*/evaluation_return_mean": "mean return of one task's episodes of an evaluation",
    "schedule/*": "mean over the interval's turns of a setting that changes (schedules)",
    "time/acting_env": "share of the actors' time in the environments, since the start",
    "time/acting_policy": "share of the actors' time in the policy, since the start",
    **{f"time/{stage}": "share of the interval in this stage of the loop" for stage in STAGES},
}
MEANINGS: Mapping[str, str] = {
    **NAMES, **SPREADS, **RUNGS, **ACTING, **LEARNER, **REPLAY, **OTHERS
}  # fmt: skip


def meaning(name: str) -> str | None:
    """The meaning of a metric, of its own name or of the first pattern that fits; None: unknown."""
    if name in MEANINGS:
        return MEANINGS[name]
    return next((says for each, says in MEANINGS.items() if fnmatchcase(name, each)), None)
