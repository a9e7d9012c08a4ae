"""Puts what an earlier rlx wrote into the words of this one.

Configurations that were saved with runs name classes, and settings, as they were called then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOVED: Mapping[str, str] = {  # targets
    "rlx.acting.faults.Restarts": "rlx.cluster.faults.Restarts",
    "rlx.checkpoint.Checkpoint": "rlx.training.checkpoint.Checkpoint",
    "rlx.evaluate.Evaluation": "rlx.evaluation.playing.Evaluation",
    "rlx.learner.Group": "rlx.training.learner.Group",
    "rlx.learner.Learner": "rlx.training.learner.Learner",
    "rlx.metrics.Logging": "rlx.runs.metrics.Logging",
    "rlx.agents.optimizers.Adam": "rlx.agents.optimizers.Optimizer",
    "rlx.optimizers.Adam": "rlx.agents.optimizers.Optimizer",
}
RENAMED: Mapping[str, Mapping[str, str]] = {  # settings, by their class's target of today
    "rlx.agents.optimizers.Optimizer": {
        "warmup_updates": "warmup_gradient_steps",
        "decay_updates": "decay_gradient_steps",
    },
}
ADDED: Mapping[str, Mapping[str, Any]] = {  # settings, with the value that does as it was before
    "rlx.acting.ray_pool.RayPool": {"sync": False},
    "rlx.agents.dqn.DQN": {
        "loss_over_time": "mean",
        "munchausen": None,
        "rescale_epsilon": None,
        "stored_state": True,
        "target_period_env_steps": None,
        "target_rate": None,
    },
    "rlx.agents.iqn.IQN": {"acting_draws": True, "stratified": False},
    "rlx.agents.optimizers.Optimizer": {"rule": "adam"},
    "rlx.agents.pqn.PQN": {"normalize_observation": False},
    "rlx.agents.r2d2.R2D2": {
        "error": "squared",
        "munchausen": None,
        "target_period_env_steps": None,
        "target_rate": None,
    },
    "rlx.agents.sac.SAC": {"noise_correlation": 0.0},
    "rlx.networks.heads.Dueling": {"noise": None},
    "rlx.networks.heads.Plain": {"noise": None},
    "rlx.networks.cores.Feedforward": {"activation": "relu", "layer_norm": False},
    "rlx.networks.torsos.MLP": {"activation": "relu", "layer_norm": False},
    "rlx.networks.torsos.NatureCNN": {"layer_norm": False},
    "rlx.envs.envpool.EnvPool": {"action_mask": None, "image": None, "per_actor": {}},
    "rlx.envs.gymnasium.Gymnasium": {
        "action_mask": None,
        "image": None,
        "frames_per_env_step": 1,
        "per_actor": {},
        "restarts": 0,
        "wrappers": [],
    },
    "rlx.runs.metrics.Logging": {"every_s": None},
    "rlx.training.learner.Learner": {"publish_every_env_steps": None},
    "rlx.evaluation.playing.Evaluation": {
        "env": {},
        "max_env_steps_per_episode": None,
        "others": {},
    },
    "rlx.networks.recurrent.RecurrentNetwork": {
        "discrete": "number",
        "frozen": [],
        "orthogonal": False,
        "time": False,
        "time_scale": 1e-5,
    },
}
ADDED_ROOT: Mapping[str, Any] = {  # keys that belong to no group
    "compile_cache": True,
    "hooks": [],
    "init_from": None,
    "init_params": ["*"],
    "schedules": [],
}

# Settings that say nothing if one of the first of them is so, and are refused unless all are.
IDLE: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {  # by their class
    "rlx.acting.exploration.Ladder": (
        ("decay_env_steps", "final_scale"),
        {"decay_env_steps": None, "final_scale": 1.0},
    ),
    "rlx.agents.optimizers.Optimizer": (
        ("decay_gradient_steps",),
        {"decay_gradient_steps": None, "decay": "linear", "final_learning_rate": 0.0},
    ),
}


def renewed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The plain settings of a saved run as today's rlx would have written them.

    It is applied where a saved configuration is read, and nowhere else. The argument is not
    changed.
    """
    now: dict[str, Any] = {str(key): _renewed(value) for key, value in settings.items()}
    if "total_env_steps" in now:  # those of a whole run
        now = {**ADDED_ROOT, **now}
    network, agent = now.get("network"), now.get("agent")
    if isinstance(network, dict) and isinstance(agent, dict) and "head" in network:
        agent.setdefault("head", network.pop("head"))  # heads became the agent's
    return now


def _renewed(value: Any) -> Any:
    if isinstance(value, list):
        return [_renewed(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    found = {key: _renewed(child) for key, child in value.items()}
    target = found.get("_target_")
    if not isinstance(target, str):
        return found
    target = MOVED.get(target, target)
    names = RENAMED.get(target, {})
    found = {names.get(key, key): child for key, child in found.items()}
    found = {**ADDED.get(target, {}), **found, "_target_": target}
    switches, idle = IDLE.get(target, ((), {}))
    if any(name in found and found[name] == idle[name] for name in switches):
        found |= {name: value for name, value in idle.items() if name in found}
    return found
