"""Settings -> the parts of a run, built in order, each told of the ones before it.

Cheap parts come first, so that what cannot work is said before memory is taken: environment spec,
network, agent, learner, checkpoint to resume from, replay, pool.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlx import trees
from rlx.acting.plan import carry_spec
from rlx.acting.recorded import Recorded
from rlx.acting.writer import empty, row_spec
from rlx.config.build import build, prepare
from rlx.config.targets import resolve
from rlx.evaluation.playing import Evaluation
from rlx.interfaces import ActingPool, Agent, EnvFamily, Evaluator, Peers, Prioritizing
from rlx.problems import refuse
from rlx.replay.process.client import ReplayProcess
from rlx.training.checkpoint import Checkpointer, CheckpointError, Restored
from rlx.training.learner import Learner
from rlx.training.parts import Alone, Parts
from rlx.training.quota import Quota
from rlx.training.rounds import blocks_of_a_round
from rlx.training.shares import share_exploration, share_folder, share_seed
from rlx.types import Rollout

log = logging.getLogger(__name__)

CLOSE_S = 10.0
OF_THE_RUN = ("env_steps", "frames", "updates", "wall_s", "finished", "evaluation_return")


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

    peers: with them it is everything of one learner process, whose settings are its share
    (`rlx.training.shares`); output_dir is the run's all the same.
    """
    seed, peers = settings["seed"], peers or Alone()
    evaluation, checkpoint, logging_ = (
        build(settings[group], group) for group in ("evaluation", "checkpoint", "logging")
    )
    check_agreement(settings)
    family, agent = build_agent(settings)
    _check_network(agent)
    round_blocks = blocks_of_a_round(settings, agent)
    learner = build(settings["learner"], "learner", agent=agent, seed=seed)
    resumed = _restore(output_dir, learner, peers, checkpoint.replay) if resume else None
    exploration = share_exploration(build(settings["exploration"], "exploration"), peers)
    own_seed = share_seed(seed, peers)
    if peers.rank != 0:  # whose newest checkpoint the first process may not have got yet
        checkpoint = dataclasses.replace(checkpoint, keep=max(3, checkpoint.keep))
    chain = resumed.meta["chain"] + 1 if resumed else 0
    with ExitStack() as undo:  # closes what there is, if something cannot be had
        replay = make_replay(
            settings["replay"],
            agent,
            lanes=settings["acting"]["instances"] * settings["acting"]["envs_per_actor"],
            seed=own_seed,
            devices=learner.devices,
            batch_size=learner.batch_size,
        )
        undo.callback(replay.close)
        if resumed is not None:
            _restore_replay(replay, resumed)
        if getattr(replay, "is_recorded", False):
            pool: ActingPool = _nobody_acts(settings, agent, chain)
        else:
            pool = build(
                settings["acting"],
                "acting",
                family=family,
                agent=agent,
                exploration=exploration,
                seed=own_seed,
                chain=chain,
                env_steps=resumed.env_steps if resumed else 0,
                round_blocks=round_blocks,
            )
        undo.callback(pool.close, CLOSE_S)
        quota = Quota(
            ratio=replay.ratio,
            rows_per_update=learner.batch_size * agent.sequence.unroll,
            burst_env_steps=pool.burst_env_steps,
            min_sequences=replay.min_sequences,
        )
        if resumed and resumed.replay_state is not None:  # else its account opens anew, too
            quota.restore(resumed.meta["quota"])
        evaluator = None
        if peers.rank == 0:
            evaluator = _build_evaluator(settings, evaluation, family, agent)
        undo.pop_all()
    return Parts(
        evaluator=evaluator,
        output_dir=share_folder(output_dir, peers.rank),
        peers=peers,
        seed=seed,
        total_env_steps=settings["total_env_steps"],
        stop_after_s=settings["stop_after_s"],
        stop_after_updates=settings["stop_after_updates"],
        family=family,
        agent=agent,
        pool=pool,
        replay=replay,
        quota=quota,
        learner=learner,
        evaluation=evaluation,
        checkpoint=checkpoint,
        logging=logging_,
        resumed=resumed and dataclasses.replace(resumed, state=None),  # which may be large
    )


def _nobody_acts(settings: Mapping[str, Any], agent: Agent, chain: int) -> Recorded:
    """The pool of a run that trains from recorded experience."""
    log.info("replay=dataset: no actor runs; what acting and exploration set is not used")
    want = settings["acting"]["env_steps_per_request"]
    rows = empty(row_spec(agent.spec, agent.acting_spec), 0, agent.sequence.block_rows)
    none = np.zeros(0, np.int64)
    nothing = Rollout(
        rows=rows,
        carry=empty(carry_spec(agent), 0),
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
    settings: Mapping[str, Any], evaluation: Evaluation, family: EnvFamily, agent: Agent
) -> Evaluator | None:
    """What evaluates beside the training; it joins the cluster of the actors if they have one."""
    if evaluation.where == "inline" or evaluation.every_env_steps is None:
        return None
    from rlx.evaluation.ray_evaluator import RayEvaluator

    return RayEvaluator(
        evaluation=evaluation,
        family=family,
        agent=agent,
        seed=settings["seed"],
        address=settings["acting"].get("address"),
    )


def check_agreement(settings: Mapping[str, Any]) -> None:
    """What two groups must agree on."""
    local, replay = is_local(settings), settings["replay"]
    if local and replay.get("ratio", "its own") is None:
        says = "acting=local takes turns with the learner and needs a ratio; set replay.ratio=0.8"
        raise refuse("replay.ratio", says, given="null")
    checkpoint = settings["checkpoint"]
    if checkpoint["exact"] and not (local and checkpoint["replay"]):
        says = "the same bits need acting=local and checkpoint.replay=true; set both"
        raise refuse("checkpoint.exact", says, given="true")
    if checkpoint["exact"] and replay.get("prefetch"):
        says = "a thread draws when it can, which is never the same twice; set it to 0"
        raise refuse("replay.prefetch", says, given=str(replay["prefetch"]))
    batch_size = settings["learner"]["batch_size"]
    if batch_size % (shards := replay.get("shards") or 1):
        says = f"accepted: a divisor of {batch_size} (learner.batch_size), each gives an equal part"
        raise refuse("replay.shards", says, given=str(shards))
    if (warm_up := replay.get("min_env_steps", 0)) >= settings["total_env_steps"]:
        says = f"learning would never begin; accepted: below {settings['total_env_steps']} "
        raise refuse("replay.min_env_steps", says + "(total_env_steps)", given=str(warm_up))
    if "max_delay" in replay and replay["min_sequences"] < batch_size:  # each is drawn once
        says = f"accepted: {batch_size} (learner.batch_size) or more"
        raise refuse("replay.min_sequences", says, given=str(replay["min_sequences"]))
    oldest, every = (
        settings["acting"].get("max_weight_age_updates"),
        settings["learner"]["publish_every_updates"],
    )
    if oldest is not None and oldest < every:
        says = f"weights are published every {every} updates (learner.publish_every_updates): "
        says += f"actors would wait for ever; accepted: null or an int >= {every}"
        raise refuse("acting.max_weight_age_updates", says, given=str(oldest))
    answering, lanes = settings["env"].get("batch_size"), settings["acting"]["envs_per_actor"]
    if answering is not None and answering > lanes:
        says = f"accepted: 1 .. {lanes} (acting.envs_per_actor), or null for all lanes at once"
        raise refuse("env.batch_size", says, given=str(answering))


def is_local(settings: Mapping[str, Any]) -> bool:
    """Whether acting takes turns with learning, in this process."""
    return getattr(resolve(settings["acting"]["_target_"])[0], "takes_turns", False)


def _check_network(agent: Agent) -> None:
    """Traces the network, which reads shapes that its constructor does not."""
    try:
        jax.eval_shape(lambda: agent.init(jax.random.PRNGKey(0)))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise refuse("network", str(error).splitlines()[0]) from error


def make_replay(
    own: Mapping[str, Any],
    agent: Agent,
    *,
    lanes: int,
    seed: int,
    devices: Sequence[jax.Device],
    batch_size: int,
) -> Any:
    """The replay of these settings, in this process or in its own."""
    runtime = {
        "sequence": agent.sequence,
        "row_spec": row_spec(agent.spec, agent.acting_spec),
        "carry_spec": carry_spec(agent),
        "lanes": lanes,
        **_priorities_of(agent),
        "on_policy": agent.on_policy,
        "seed": seed,
        "devices": devices,
    }
    if own.get("where") != "process":
        return build(own, "replay", **runtime)
    make = partial(prepare({**own, "prefetch": 0}, "replay").make, {**runtime, "devices": ()})
    try:
        return ReplayProcess(make, ahead=own["prefetch"], batch_size=batch_size)
    except ValueError as error:
        raise refuse("replay", str(error)) from error


def _priorities_of(agent: Agent) -> dict[str, Any]:
    found = agent.initial_priorities if isinstance(agent, Prioritizing) else None
    return {"initial_priorities": found}


def _restore_replay(replay: Any, resumed: Restored) -> None:
    if resumed.replay_state is None:
        return
    try:
        replay.restore(resumed.replay_state, resumed.replay_blocks())
    except ValueError as error:
        raise refuse("resume", str(error)) from error
    except KeyError as error:
        says = f"the saved replay was of another kind (it has no {error}); choose that one"
        raise refuse("resume", says) from error


def _restore(output_dir: Path, learner: Learner, peers: Peers, with_replay: bool) -> Restored:
    """The newest checkpoint of process 0, and of each other process its own part of it."""
    checkpoints, like = Checkpointer(output_dir, None), learner.state()
    try:
        restored: Restored | None = None
        if peers.rank == 0:
            restored = checkpoints.restore(like, with_replay=with_replay)
        chosen = peers.exchange(restored.path.name if restored else "")[0]
        if restored is None:
            path = checkpoints.folder / chosen
            restored = checkpoints.restore(like, path, with_replay=False)
            restored = _own_part(share_folder(output_dir, peers.rank), restored, with_replay)
    except CheckpointError as error:
        raise refuse("resume", str(error)) from error
    saved_by = restored.meta.get("processes", 1)
    if restored.replay_state is not None and saved_by != peers.count:
        says = f"the replay was saved in parts by {saved_by} learner processes, now {peers.count}; "
        raise refuse("resume", says + "use as many, or checkpoint.replay=false to fill it anew")
    learner.restore(restored.state)
    log.info("resuming from %s", restored.path)
    return restored


def _own_part(folder: Path, restored: Restored, with_replay: bool) -> Restored:
    """With what this process had saved of its own, if it was there then."""
    checkpoints = Checkpointer(folder, None)
    path = checkpoints.folder / restored.path.name
    try:  # the training state is one
        own = checkpoints.restore({}, path, with_replay=with_replay)
    except CheckpointError as error:
        if with_replay:
            log.warning("%s This process's part of the replay is filled anew.", error)
        return restored
    run = {name: restored.meta[name] for name in OF_THE_RUN}
    return dataclasses.replace(
        restored,
        meta=own.meta | run,
        replay_state=own.replay_state,
        segments=own.segments,
        path=path,
    )
