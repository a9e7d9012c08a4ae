"""Settings -> the parts of a run, built in order, each told of the ones before it.

Cheap parts come first, so that what cannot work is said before memory is taken: environment spec,
network, agent, learner, checkpoint to resume from, replay, pool.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from rlx import trees
from rlx.acting.exploration import least_amount
from rlx.acting.plan import carry_spec, row_spec
from rlx.acting.recorded import Recorded
from rlx.acting.scheduled import scheduled_exploration
from rlx.config.build import build, prepare
from rlx.config.changing import Schedule
from rlx.config.targets import fits, full_name, lacks, resolve
from rlx.evaluation.elsewhere import Families, families
from rlx.evaluation.playing import Evaluation
from rlx.interfaces import (
    ActingPool,
    Agent,
    EnvFamily,
    Evaluator,
    Exploration,
    FromRecord,
    Movable,
    Peers,
    PoolSettings,
    Prioritizing,
    Replay,
    ReplayContext,
    RunContext,
)
from rlx.machine.memory import available_bytes
from rlx.problems import refuse, show
from rlx.replay.held import Keeping
from rlx.replay.process.client import ReplayProcess
from rlx.training.agreement import check_agreement, takes_turns
from rlx.training.hooks import close_hook
from rlx.training.learner import Learner, OpenLearner
from rlx.training.parts import Alone, Parts
from rlx.training.quota import Quota
from rlx.training.rates import idle_ends
from rlx.training.restoring import Restored, check_total, restore_learner, restore_replay
from rlx.training.rounds import blocks_of_a_round
from rlx.training.schedules import check_updates_read, checked_schedules, followed
from rlx.training.shares import share_checkpoint, share_exploration, share_folder, share_seed
from rlx.training.warm_start import warm
from rlx.types import DiscreteSpec, EnvSpec, Rollout

T = TypeVar("T")

log = logging.getLogger(__name__)

CLOSE_S = 10.0
FIRST = ("evaluation", "checkpoint", "logging", "acting")  # groups that need nothing of others
AS_GIVEN = ("seed", "total_env_steps", "stop_after_s", "stop_after_updates")  # settings of parts
OF_SPEED = ("batch_size", "threads", "vector")  # settings of environments; rows stay the same


def build_agent(settings: Mapping[str, Any]) -> tuple[EnvFamily, Agent]:
    """The environment family and the agent with its network; no environment stays open."""
    family = build(settings["env"], "env")
    try:
        spec = family.spec()
    except ValueError as error:
        raise refuse("env", str(error)) from error
    network = build(settings["network"], "network", spec=spec)
    return family, build(settings["agent"], "agent", network=network, spec=spec)


def assemble(
    settings: Mapping[str, Any], output_dir: Path, *, resume: bool, peers: Peers | None = None
) -> Parts:
    """Everything of a run; raises ConfigError for what cannot work.

    peers: of a learner process; settings are its share (`shares.py`), the folder is the run's.
    """
    peers = peers or Alone()
    evaluation, checkpoint, logging_, acting = (build(settings[name], name) for name in FIRST)
    exploration = build(settings["exploration"], "exploration", seed=settings["seed"])
    check_agreement(settings)
    family, agent = build_agent(settings)
    schedules = checked_schedules(settings, agent, exploration)
    exploration = scheduled_exploration(exploration, schedules)
    _check_agent(settings, agent, exploration, peers)
    evaluated = families(evaluation, settings["env"], family, agent.spec)
    learner = _open_learner(settings, agent, schedules)
    resumed = restore_learner(output_dir, learner, peers, checkpoint.replay) if resume else None
    _go_on_or_begin_warm(learner, settings, resumed)
    context = RunContext(
        **_place(resumed, peers),
        family=family,
        agent=agent,
        exploration=share_exploration(exploration, peers),
        seed=share_seed(settings["seed"], peers),
        output_dir=output_dir if peers.count == 1 else None,
        round_blocks=blocks_of_a_round(settings, agent),
    )
    given = replay_context(agent, settings["env"], _lanes_of(acting), context.seed, learner.devices)
    check_updates_read(schedules, agent, given, learner.batch_size // len(learner.devices))
    with ExitStack() as undo:  # closes what there is, if something cannot be had
        replay = _open_replay(settings["replay"], given, learner, resumed, peers)
        undo.callback(replay.close)
        pool = _open_pool(acting, replay, context)
        undo.callback(pool.close, CLOSE_S)
        evaluator = _build_evaluator(settings, evaluation, evaluated, context, peers)
        undo.callback(evaluator.close if evaluator else lambda: None)
        quota = _make_quota(replay, pool, learner, agent, resumed, schedules)
        hooks = make_hooks(settings["hooks"], context.seed, undo)
        undo.pop_all()
    return Parts(
        **{name: settings[name] for name in AS_GIVEN},
        evaluator=evaluator,
        output_dir=share_folder(output_dir, peers.rank),
        peers=peers,
        family=family,
        agent=agent,
        pool=pool,
        takes_turns=takes_turns(settings),
        replay=replay,
        quota=quota,
        learner=learner,
        evaluation=evaluation,
        evaluated=evaluated,
        checkpoint=share_checkpoint(checkpoint, peers),
        logging=logging_,
        hooks=hooks,
        schedules=schedules,
        resumed=resumed and dataclasses.replace(resumed, state=None),  # which may be large
    )


def _lanes_of(acting: PoolSettings) -> int:
    return acting.instances * acting.envs_per_actor


def _place(resumed: Restored | None, peers: Peers) -> dict[str, Any]:
    """The chain that lanes begin, the env steps that the run has made, and which process it is."""
    chain, env_steps = (resumed.meta["chain"] + 1, resumed.env_steps) if resumed else (0, 0)
    return {"chain": chain, "env_steps": env_steps, "process": (peers.rank, peers.count)}


def _go_on_or_begin_warm(
    learner: OpenLearner, settings: Mapping[str, Any], resumed: Restored | None
) -> None:
    """Checks what a resumed run is to do; gives a fresh learner another run's weights, if any."""
    if settings["init_from"] is None and settings["init_params"] != ["*"]:
        says = "they choose parameters of init_from, which is null"
        raise refuse("init_params", says, given=show(settings["init_params"]))
    if resumed is not None:
        check_total(settings["total_env_steps"], resumed)
    elif (folder := settings["init_from"]) is not None:
        learner.restore(warm(learner.state(), folder, settings["init_params"]))


def make_hooks(nodes: Sequence[Mapping[str, Any]], seed: int, undo: ExitStack) -> list[Any]:
    """The hooks of a run, in their order; each may take `seed: Runtime[int]`.

    undo: is told how to close them.
    """
    hooks = []
    for number, node in enumerate(nodes):
        hook = prepare(node, object, f"hooks.{number}").make({"seed": seed})
        undo.callback(close_hook, number, hook)
        hooks.append(hook)
    return hooks


def _opened(group: str, open_: Callable[..., T], *given: Any) -> T:
    """Opens these settings; a ValueError is a problem of this group's."""
    try:
        return open_(*given)
    except ValueError as error:
        raise refuse(group, str(error)) from error


def _open_learner(
    settings: Mapping[str, Any], agent: Agent, schedules: Sequence[Schedule]
) -> OpenLearner:
    opening: Learner = build(settings["learner"], "learner")
    of_the_agent = any(schedule.group == "agent" for schedule in schedules)
    update = partial(followed, agent) if of_the_agent else None
    return _opened("learner", opening.open, agent, settings["seed"], update)


def _open_replay(
    own: Mapping[str, Any],
    given: ReplayContext,
    learner: OpenLearner,
    resumed: Restored | None,
    peers: Peers,
) -> Any:
    """The replay of these settings, with what the checkpoint has of it."""
    if resumed is not None and resumed.replay_state is None:
        given = dataclasses.replace(given, env_steps=resumed.env_steps // peers.count)
    replay = make_replay(own, given, learner.batch_size)
    if resumed is not None:
        try:
            restore_replay(replay, resumed, given.env if peers.rank == 0 else {})
        except BaseException:
            replay.close()
            raise
    return replay


def _open_pool(acting: PoolSettings, replay: Replay, context: RunContext) -> ActingPool:
    """The pool of these settings, or one that plays what the replay has recorded."""
    if isinstance(replay, FromRecord) and replay.is_recorded:
        return _nobody_acts(acting.env_steps_per_request, context.agent, context.chain)
    return _opened("acting", acting.open, context)


def _make_quota(
    replay: Replay,
    pool: ActingPool,
    learner: OpenLearner,
    agent: Agent,
    resumed: Restored | None,
    schedules: Sequence[Schedule],
) -> Quota:
    quota = Quota(
        ratio=replay.ratio,
        rows_per_update=learner.batch_size * agent.sequence.unroll,
        burst_env_steps=pool.burst_env_steps,
        min_sequences=replay.min_sequences,
    )
    if resumed is not None and resumed.replay_state is not None:  # else its account opens anew
        follows = any(schedule.setting == "replay.ratio" for schedule in schedules)
        quota.restore(resumed.meta["quota"], replay.env_steps, follows=follows)
    return quota


def _nobody_acts(want: int, agent: Agent, chain: int) -> Recorded:
    """The pool of a run that trains from recorded experience."""
    log.info("replay=dataset: no actor runs; what acting and exploration set is not used")
    rows = trees.empty(row_spec(agent.spec, agent.acting_spec), 0, agent.sequence.block_rows)
    none = np.zeros(0, np.int64)
    nothing = Rollout(
        rows=rows,
        carry=trees.empty(carry_spec(agent), 0),
        next=trees.tree_map(lambda x: x[:, 0], rows.inputs),
        lane=none.astype(np.int32),
        chain=none.astype(np.int32),
        number=none,
        weights_version=none,
        episodes=(),
        env_steps=want,
        frames=want * agent.spec.frames_per_env_step,
        timings={},
    )
    return Recorded(env_steps_per_request=want, chain=chain, nothing=nothing)


def _build_evaluator(
    settings: Mapping[str, Any],
    evaluation: Evaluation,
    evaluated: Families,
    run: RunContext,
    peers: Peers,
) -> Evaluator | None:
    """Makes what evaluates beside the training; it joins the actors' cluster if they have one."""
    has_none = evaluation.every_env_steps is None and not evaluation.others
    if evaluation.where == "inline" or has_none or peers.rank != 0:
        return None
    from rlx.evaluation.ray_evaluator import RayEvaluator

    return RayEvaluator(
        evaluation=evaluation,
        families=evaluated,
        agent=run.agent,
        seed=run.seed,
        address=settings["acting"].get("address"),
    )


def _check_agent(
    settings: Mapping[str, Any], agent: Agent, exploration: Exploration, peers: Peers
) -> None:
    """Refuses what cannot work, and says what a user may not expect."""
    for line in agent.spec.said:
        log.info("%s", line)
    _check_network(agent, settings["network"].get("frozen", ()))
    acting = settings["acting"]
    lanes = acting["instances"] * acting["envs_per_actor"] * peers.count
    _check_exploration(settings, agent, exploration, lanes)
    blocks_of_a_round(settings, agent)  # raises ConfigError where rounds cannot be made
    apart, trained = agent.sequence.stride, agent.sequence.unroll
    if apart > trained and peers.rank == 0:
        says = "sequences start %d rows apart and train on %d: %d of %d rows are never trained on"
        log.warning(says, apart, trained, apart - trained, apart)
    if peers.rank == 0:
        for line in idle_ends(agent, settings, peers.count):
            log.warning("%s", line)


def _check_exploration(
    settings: Mapping[str, Any], agent: Agent, exploration: Exploration, lanes: int
) -> None:
    """Refuses actions that are random for the whole run, unless nobody acts in it."""
    replay, _ = resolve(settings["replay"]["_target_"])
    nobody_acts = getattr(replay, "is_recorded", False)
    if agent.samples or nobody_acts:
        return
    if least_amount(exploration, lanes, settings["total_env_steps"]) >= 1:
        noisy = "" if agent.on_policy else ", or give it noisy layers (agent.head.noise=0.5)"
        raise refuse(
            "exploration",
            "its amount stays 1, by which an agent acts as it samples; this one has no "
            "distribution of its own, so every action of the run would be random; choose "
            f"exploration=ladder or linear{noisy}",
        )


def _check_network(agent: Agent, frozen: Sequence[str]) -> None:
    """Traces the network, which reads shapes that its constructor does not, and weighs it.

    frozen: patterns of names within one body, of which an agent may have several.
    """
    try:
        state = jax.eval_shape(lambda: agent.init(jax.random.PRNGKey(0)))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise refuse("network", str(error).splitlines()[0]) from error
    parts = [name.split("/") for name in trees.flatten(state.params)]
    names = ["/".join(part[start:]) for start in range(3) for part in parts if part[start:]]
    try:
        trees.check_patterns(frozen, names, "network.frozen")
    except ValueError as error:
        raise refuse("network.frozen", str(error).partition(": ")[2]) from error
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or available_bytes()
    if needed > limit:
        raise refuse(
            "network",
            f"its {params:,} parameters, with targets and optimiser, need {needed / 1e9:,.1f} GB, "
            f"{limit / 1e9:,.1f} GB are there; choose a smaller network, or an environment with "
            f"fewer choices and smaller observations (the action is {_sizes(agent.spec)})",
        )


def _sizes(spec: EnvSpec) -> str:
    action = spec.action
    if isinstance(action, DiscreteSpec):
        return f"one of {action.n:,}"
    return f"{action.array.dtype}{list(action.array.shape)}"


def replay_context(
    agent: Agent, env: Mapping[str, Any], lanes: int, seed: int, devices: Sequence[jax.Device]
) -> ReplayContext:
    """Makes the record that the replay of this agent is given; env: the settings of the group."""
    return ReplayContext(
        sequence=agent.sequence,
        row_spec=row_spec(agent.spec, agent.acting_spec),
        carry_spec=carry_spec(agent),
        lanes=lanes,
        env={name: value for name, value in env.items() if name not in OF_SPEED},
        initial_priorities=agent.initial_priorities if isinstance(agent, Prioritizing) else None,
        on_policy=agent.on_policy,
        env_steps=0,
        seed=seed,
        devices=devices,
    )


def make_replay(own: Mapping[str, Any], context: ReplayContext, batch_size: int) -> Any:
    """The replay of these settings, in this process or in its own."""
    call = prepare(own, "replay")
    keeping = call.gathered(Keeping)
    if keeping is None or keeping.settings["where"] != "process":
        return call.make({"context": context})
    if keeping.settings["storage"] == "device":
        says = "blocks on the learner's device are in its process; accepted: thread"
        raise refuse("replay.where", says, given="process")
    if not fits(call.cls, Movable):
        says = f"{full_name(call.cls)} cannot lie in another process{lacks(call.cls, (Movable,))}"
        raise refuse("replay.where", says, given="process")
    there = {**own, "prefetch": 0, "where": "thread"}  # of that process
    told = {"context": dataclasses.replace(context, devices=())}
    make = partial(prepare(there, "replay").make, told)
    try:
        return ReplayProcess(make, ahead=own["prefetch"], batch_size=batch_size)
    except ValueError as error:
        raise refuse("replay", str(error)) from error
