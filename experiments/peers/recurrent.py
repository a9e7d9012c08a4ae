"""Recurrent replay agents: rlx's R2D2 beside rltime, Acme, RLlib and deep_rl_zoo, run in turn.

    python experiments/peers/recurrent.py folder=/tmp/peers acme_python=/path/to/python3.10
    python experiments/peers/recurrent.py folder=/tmp/peers work=pong,pong_acting rounds=5

folder          where environments and runs go, outside the repository; they are used again
work            all, or some of cartpole (without velocities), pong, pong_acting and cartpole_seen
peers           all, or some of rltime, acme, rllib and deep_rl_zoo
acme_python     python3.10: a Python 3.10, for which Acme's packages are made
deep_rl_zoo     a checkout of deep_rl_zoo, which PyPI has not; not given: left out
rounds          3: each program runs so often, one after the other, round by round
cartpole_steps  60_000: env steps of a run on CartPole
pong_steps      12_800: env steps (of four frames) of a run on Pong
seen_steps      1_000_000: env steps of deep_rl_zoo, whose logs reach the disk each two minutes
cores           2: CPU cores that all programs are bound to
deadline_s      1_200: seconds that a run may take, and twice as many that an installation may

It runs on the Python that has rlx. Speeds come from the programs' own logs, over the part of a run
that begins some updates after the warm-up, when all is compiled (README.md says more).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cartpole_dqn import RLTIME, rltime_marks
from side_by_side import (
    NEVER,
    Comparison,
    Failed,
    Mark,
    Program,
    bound,
    chosen,
    installed,
    json_marks,
    main,
    noted,
    scalars,
    with_rlx,
)

DEFAULTS = {"folder": "", "work": "all", "peers": "all", "acme_python": "python3.10"}
DEFAULTS |= {"deep_rl_zoo": "", "rounds": "3", "cartpole_steps": "60_000", "pong_steps": "12_800"}
DEFAULTS |= {"seen_steps": "1_000_000", "cores": "2", "deadline_s": "1_200"}

# Acme's own pins for its replay and TensorFlow; JAX 0.4.13 is the oldest that PyPI has for it.
ACME: tuple[str, ...] = ("dm-acme==0.4.0", "dm-launchpad==0.5.0", "dm-reverb==0.7.0")
ACME += ("tensorflow==2.8.0", "keras==2.8.0", "tensorflow-estimator==2.8.0")
ACME += ("tensorflow_probability==0.15.0", "dm-sonnet==2.0.0", "jax==0.4.13", "jaxlib==0.4.13")
ACME += ("dm-haiku==0.0.10", "optax==0.1.5", "chex==0.1.8", "rlax==0.1.6", "distrax==0.1.4")
ACME += ("dm-tree==0.1.8", "numpy==1.23.5", "scipy==1.10.1", "protobuf==3.20.3", "gym==0.22.0")
ACME += ("pygame==2.6.1",)
RLLIB = ("ray[rllib]==2.60.0", "torch==2.13.0", "gymnasium==1.2.2", "numpy==2.4.6")
# What its requirements.txt names, where Python 3.11 has it; some of its versions call np.bool.
ZOO: tuple[str, ...] = ("gym==0.25.2", "numpy==1.23.5", "torch==2.13.0", "tensorboard==2.21.0")
ZOO += ("absl-py==1.4.0", "opencv-python==4.8.0.76", "python-snappy==0.7.3", "pygame==2.6.1")
ZOO += ("setuptools==80.9.0",)

Sizes = dict[str, Any]  # of a run: what every driver is given, and what rlx is given
CARTPOLE: Sizes = {
    "work": "cartpole",
    "lanes": 32,
    "batch": 32,  # sequences of an update
    "burn_in": 5,  # rows
    "unroll": 20,  # trained rows
    "n_step": 5,
    "stride": 10,
    "ratio": 4,  # trained rows per env step: an update each 160 env steps
    "capacity": 100_000,  # rows of the replay
    "warm_up": 5_000,  # env steps
    "settled": 20_000,  # env steps at which the measured part begins
    "target_env_steps": 16_000,  # or, where a peer counts updates, so many of them:
    "target_updates": 100,
    "threads": 1,  # of PyTorch
    "processes": False,  # one for each of rltime's environments
    "log_every": 10_000,  # env steps, rltime's own; it saves its network as often, and so does rlx
}
PONG = CARTPOLE | {"work": "pong", "burn_in": 20, "unroll": 40, "stride": 20, "capacity": 20_000}
PONG |= {"warm_up": 3_200, "settled": 5_120, "target_env_steps": 32_000, "log_every": 1_280}
PONG |= {"threads": 2, "processes": True}
ACTING = PONG | {"warm_up": int(NEVER), "settled": 1_280}
SEEN = CARTPOLE | {"ratio": 1, "settled": 100_000, "target_updates": 100}
WORKS = {"cartpole": CARTPOLE, "pong": PONG, "pong_acting": ACTING, "cartpole_seen": SEEN}


def env_steps_per_update(sizes: Sizes) -> int:
    return sizes["batch"] * sizes["unroll"] // sizes["ratio"]


# --- peers ---------------------------------------------------------------------------------------


def driver(python: Path, file: str, sizes: Sizes, folder: Path) -> list[str]:
    return [str(python), str(Path(__file__).resolve().parent / file), json.dumps(sizes)]


Marks = Callable[[Path], Iterator[Mark]]  # of a run in this folder
Command = Callable[[Path], list[str]]


def peer(name: str, sizes: Sizes, command: Command, marks: Marks, path: Path | None) -> Program:
    return Program(
        name=name, peer=name, start=sizes["settled"], command=command, marks=marks, path=path
    )


def rltime(name: str, sizes: Sizes, given: Mapping[str, str], folder: Path) -> Program:
    python = installed(folder, "rltime", RLTIME, 2 * float(given["deadline_s"]))
    marks = partial(rltime_marks, sizes["batch"] * sizes["unroll"])
    return peer(name, sizes, partial(driver, python, "rltime_r2d2.py", sizes), marks, None)


TOLD: Marks = partial(json_marks, "progress.jsonl", "seconds")  # by our drivers


def acme(name: str, sizes: Sizes, given: Mapping[str, str], folder: Path) -> Program:
    seconds = 2 * float(given["deadline_s"])
    python = installed(folder, "acme", ACME, seconds, given["acme_python"])
    return peer(name, sizes, partial(driver, python, "acme_r2d2.py", sizes), TOLD, None)


def rllib(name: str, sizes: Sizes, given: Mapping[str, str], folder: Path) -> Program:
    python = installed(folder, "rllib", RLLIB, 2 * float(given["deadline_s"]))
    command = partial(driver, python, "rllib_dqn.py", sizes | {"n_step": 1})
    return peer(name, sizes, command, TOLD, None)


ZOO_ACTORS = 2  # processes; deep_rl_zoo logs its first and its last actor


def zoo_command(python: Path, sizes: Sizes, folder: Path) -> list[str]:
    """Returns its R2D2 for classic control: an update each `batch` sequences, from the first on."""
    options = {
        **{"environment_name": "CartPole-v1", "num_actors": ZOO_ACTORS, "num_iterations": 1},
        **{"num_train_frames": sizes["steps"] // ZOO_ACTORS, "num_eval_frames": 0},
        **{"unroll_length": sizes["unroll"], "burn_in": sizes["burn_in"]},
        **{"batch_size": sizes["batch"], "n_step": sizes["n_step"]},
        **{"replay_capacity": sizes["capacity"] // sizes["unroll"]},
        **{"target_network_update_frequency": sizes["target_updates"]},
    }
    told = [f"--{name}={value}" for name, value in options.items()]
    return [str(python), "-m", "deep_rl_zoo.r2d2.run_classic", *told]


def zoo_marks(python: Path, folder: Path) -> Iterator[Mark]:
    """Yields the learner's events, with the env steps that its actors told of by then."""
    actors = []
    for which in (0, ZOO_ACTORS - 1):
        run = folder / "runs" / f"CartPole-v1-R2D2-actor{which}-train"
        events = scalars(python, run, "performance(env_steps)/num_episodes")
        actors.append([(seconds, step - episodes) for step, episodes, seconds in events])
    learner = folder / "runs" / "CartPole-v1-R2D2-learner-train"
    for _, updates, seconds in scalars(
        python, learner, "learner_statistics(learner_steps)/updates"
    ):
        ends = [bisect_right(events, (seconds,)) for events in actors]
        last = min(events[-1][0] for events in actors if events) if all(ends) else 0.0
        if seconds <= last:  # each of them had told of an episode, and told of more later
            acted = sum(events[end - 1][1] for events, end in zip(actors, ends, strict=True))
            yield Mark(int(acted), updates, seconds)


def zoo(name: str, sizes: Sizes, given: Mapping[str, str], folder: Path) -> Program:
    if not given["deep_rl_zoo"]:
        raise Failed("not given; say deep_rl_zoo=PATH of a checkout")
    python = installed(folder, "deep_rl_zoo", ZOO, 2 * float(given["deadline_s"]))
    command, marks = partial(zoo_command, python, sizes), partial(zoo_marks, python)
    return peer(name, sizes, command, marks, Path(given["deep_rl_zoo"]).resolve())


# --- rlx -----------------------------------------------------------------------------------------

PLAIN = (
    *("agent=r2d2", "exploration=ladder", "learner.platform=cpu", "evaluation.final_episodes=0"),
    *("checkpoint.replay=false", "logging.console=off"),
)
NETS = {
    "cartpole": ("env=cartpole_memory", "network=mlp_lstm", "agent.head.hidden=64"),
    "cartpole_seen": ("env=cartpole", "network=mlp_lstm", "agent.head.hidden=64"),
    "pong": (
        *("env=atari", "env.id=Pong-v5", "network=nature_lstm", "network.stack.observation=1"),
        *("network.dense_before_core=512", "agent.head.hidden=512"),
    ),
}
NETS["pong_acting"] = NETS["pong"]


def r2d2(work: str, sizes: Sizes, *more: str) -> list[str]:
    """Returns rlx's overrides for these sizes; it saves and logs as often as rltime does."""
    rows = [f"agent.{name}={sizes[name]}" for name in ("burn_in", "unroll", "n_step", "stride")]
    return [
        *(*PLAIN, *NETS[work], *rows, f"agent.block_rows={sizes['stride']}"),
        f"agent.target_period_updates={sizes['target_updates']}",
        *(f"replay.ratio={sizes['ratio']}", f"replay.capacity={sizes['capacity']}"),
        *(f"replay.min_env_steps={sizes['warm_up']}", f"learner.batch_size={sizes['batch']}"),
        *(
            f"acting.envs_per_actor={sizes['lanes']}",
            f"logging.every_env_steps={sizes['log_every']}",
        ),
        *more,
    ]


def turn(sizes: Sizes, *more: str) -> list[str]:
    """Returns the peer's turn: updates as often as it makes them, weights published after each.

    An update may run while rlx acts with the weights of the one before (README.md).
    """
    env_steps = env_steps_per_update(sizes)
    return [f"acting.env_steps_per_request={env_steps}", "learner.publish_every_updates=1", *more]


BLIND = ("network.prev_action=false", "network.prev_reward=false")
ACME_LADDER = ("exploration=redrawn", "exploration.count=8")
ACME_LADDER += ("exploration.highest=0.4", f"exploration.lowest={0.4**8:.8f}")
RLLIB_LOSS = ("agent.n_step=1", "agent.rescale_epsilon=null", "agent.error=huber", *BLIND)
RLLIB_LOSS += ("replay=uniform", "exploration=linear", "exploration.final=0.02")
REMOTE = ("acting=ray_pool", "acting.instances=1", "acting.env_steps_per_request=640")
SILENT = f"checkpoint.every_env_steps={NEVER}"
ONE = "acting.envs_per_actor=1"
REST = ("replay.ratio=0.001", "replay.min_env_steps=0")  # an update in 1,280,000 env steps


def beside(work: str, peer: str, sizes: Sizes) -> dict[str, list[str]]:
    """Returns rlx's runs beside a peer, by name."""
    whole = partial(r2d2, work, sizes)
    if peer == "rltime":
        saves = [f"checkpoint.every_env_steps={sizes['log_every']}"]
        saves += REST if work == "pong_acting" else ()
        runs = {
            "as rltime": whole(*saves, *turn(sizes)),
            "a Ray actor beside the learner": whole(*saves, *REMOTE),
        }
        own = {"its own turn": whole(*saves)}
        return runs | (own if work == "cartpole" else {})
    if peer == "deep_rl_zoo":
        two = ("acting=ray_pool", f"acting.instances={ZOO_ACTORS}", ONE, SILENT)
        return {"two Ray actors, 1 lane each": whole(*two), "its own turn, 32 lanes": whole(SILENT)}
    falls = f"exploration.decay_env_steps={sizes['steps']}"
    like = (*BLIND, *ACME_LADDER) if peer == "acme" else (*RLLIB_LOSS, falls)
    return {
        f"as {peer}, 1 lane": whole(*like, SILENT, *turn(sizes, ONE)),
        f"its own turn, 32 lanes, as {peer}": whole(*like, SILENT),
    }


# --- the comparison ------------------------------------------------------------------------------

Prepared = Callable[[str, Sizes, Mapping[str, str], Path], Program]
PEERS: dict[str, Prepared] = {"rltime": rltime, "acme": acme, "rllib": rllib, "deep_rl_zoo": zoo}
PAIRS: Mapping[str, Sequence[str]] = {
    "cartpole": ("rltime", "acme", "rllib"),
    "pong": ("rltime",),
    "pong_acting": ("rltime",),
    "cartpole_seen": ("deep_rl_zoo",),
}
STEPS = {"cartpole": "cartpole_steps", "pong": "pong_steps", "pong_acting": "pong_steps"}
STEPS |= {"cartpole_seen": "seen_steps"}
RLX_STEPS = 200_000  # env steps at most: rlx's log needs no flush of two minutes


def programs(given: Mapping[str, str], folder: Path, missing: dict[str, str]) -> list[Program]:
    """Returns the peers that can be installed, each followed by rlx's runs of the same work."""
    bound(int(given["cores"]))
    works, peers, found = chosen(given, "work", WORKS), chosen(given, "peers", PEERS), []
    for work in works:
        steps = int(given[STEPS[work]])
        sizes = WORKS[work] | {"steps": steps}
        for peer in (word for word in PAIRS[work] if word in peers):
            name = f"{work}: {peer}"
            with noted(missing, name):
                runs = {f"{work}: rlx, {n}": run for n, run in beside(work, peer, sizes).items()}
                program = PEERS[peer](name, sizes, given, folder)
                found += with_rlx(program, min(steps, RLX_STEPS), runs)
    return found


COMPARISON = Comparison(
    defaults=DEFAULTS,
    least={
        **{"rounds": 1, "cores": 1, "deadline_s": 1},
        "cartpole_steps": CARTPOLE["settled"] + 2 * CARTPOLE["log_every"],
        "pong_steps": PONG["settled"] + 2 * PONG["log_every"],
        "seen_steps": 2 * SEEN["settled"],
    },
    needs={"deep_rl_zoo": "deep_rl_zoo/r2d2/run_classic.py"},
    programs=programs,
    measures=("env steps", "updates"),
    shown={
        "rltime": ("rltime", "torch", "gym", "numpy", "ale-py"),
        "acme": ("dm-acme", "dm-reverb", "tensorflow", "jax", "dm-haiku", "gym", "numpy"),
        "rllib": ("ray", "torch", "gymnasium", "numpy"),
        "deep_rl_zoo": ("torch", "gym", "numpy"),
    },
)

if __name__ == "__main__":
    main(COMPARISON)
