"""DQN on plain CartPole: rlx beside rltime's and CleanRL's JAX DQN, in one run, in turn.

    python experiments/peers/cartpole_dqn.py folder=/tmp/peers cleanrl=/path/to/cleanrl
    python experiments/peers/cartpole_dqn.py folder=/tmp/peers rounds=5 steps=200_000

folder      where environments and runs go, outside the repository; they are used again
cleanrl     a checkout of CleanRL, which PyPI has without dqn_jax.py; not given: left out
rounds      3: each program runs so often, one after the other, round by round
steps       100_000: env steps of a run; schedules are as long as the run
deadline_s  900: seconds that a run may take, and twice as many that an installation may

It runs on the Python that has rlx. Speeds come from the programs' own logs, over the part of a run
that begins 10,000 env steps after its warm-up, when all is compiled (README.md says more).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from side_by_side import (
    NEVER,
    Comparison,
    Failed,
    Mark,
    Program,
    answer,
    event_marks,
    installed,
    main,
    noted,
    with_rlx,
)

DEFAULTS = {"folder": "", "cleanrl": "", "rounds": "3", "steps": "100_000", "deadline_s": "900"}
BATCH = 128  # rows of every update, of every program
SETTLED = 10_000  # env steps after the warm-up that are left out: there all is compiled

# gym 0.22 is the last one that has what rltime imports (ImageEncoder) and installs on Python 3.11;
# it asks for no pygame, but its CartPole imports it; NumPy 1.24 took away names that it uses;
# ale-py is for Pong (recurrent.py, which has the same environment).
RLTIME = ("rltime==0.1.2", "gym==0.22.0", "numpy==1.23.5", "pygame==2.6.1", "torch==2.13.0")
RLTIME += ("opencv-python==4.8.1.78", "ale-py==0.10.2")
# gymnasium 1.0 tells of ended episodes in another way than dqn_jax.py reads.
CLEANRL = ("jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "gymnasium==0.29.1", "tyro==1.0.17")
CLEANRL += ("stable-baselines3==2.9.2", "tensorboard==2.21.0", "torch==2.13.0")


# --- rltime --------------------------------------------------------------------------------------


def rltime_command(python: Path, steps: int, folder: Path) -> list[str]:
    code = "import rltime; print(list(rltime.__path__)[0])"
    config = Path(answer(python, code)) / "configs" / "cartpole_dqn.json"
    update = json.dumps({"training": {"args": {"total_steps": steps}}})
    return [
        *(str(python), "-m", "rltime.train", str(config)),
        *("--log-dir", str(folder), "--conf-update", update),
    ]


def rltime_marks(rows: int, folder: Path) -> Iterator[Mark]:
    """Yields the rows of train.json; its trained rows are updates of so many `rows`."""
    for file in folder.glob("*/train.json"):
        for line in file.read_text().splitlines():
            total = json.loads(line)["total"]
            trained = total.get("steps_trained", 0)
            yield Mark(int(total["steps_acted"]), trained / rows, total["seconds"])


# --- CleanRL -------------------------------------------------------------------------------------


def cleanrl_command(python: Path, checkout: Path, steps: int, folder: Path) -> list[str]:
    return [str(python), str(checkout / "cleanrl" / "dqn_jax.py"), "--total-timesteps", str(steps)]


# --- rlx -----------------------------------------------------------------------------------------

PLAIN = (  # what both have in common: single rows, the Markov observation alone, one linear head
    *("env=cartpole", "network=mlp", "network.prev_action=false", "network.prev_reward=false"),
    *("agent=dqn", "agent.unroll=1", "agent.double_q=false", "agent.target_period_updates=null"),
    *("agent.head._target_=rlx.networks.heads.Plain", "agent.head.hidden=null"),
    *("agent.optimizer.max_grad_norm=null", "agent.optimizer.epsilon=1e-8"),
    *("replay=uniform", "replay.capacity=10_000", f"replay.min_sequences={BATCH}"),
    *("exploration=linear", f"learner.batch_size={BATCH}", "learner.platform=cpu"),
    *("evaluation.final_episodes=0", "checkpoint.replay=false", "logging.console=off"),
)


def as_rltime(steps: int) -> list[str]:
    return [
        *("env.max_episode_steps=1000", "network.torso.layers=[64]", "network.core.units=64"),
        *("agent.n_step=10", "agent.target_period_env_steps=10_000"),
        f"agent.optimizer.decay_gradient_steps={(steps - 20_000) * 4 // BATCH}",
        *("replay.ratio=4", "replay.min_env_steps=20_000"),
        *("exploration.final=0.01", f"exploration.decay_env_steps={steps // 2}"),
        *("acting.envs_per_actor=16", "logging.every_env_steps=10_000"),
        *("logging.tensorboard=false", "checkpoint.every_env_steps=10_000"),
    ]


def as_cleanrl(steps: int) -> list[str]:
    return [
        *("network.torso.layers=[120]", "network.core.units=84", "agent.n_step=1"),
        *("agent.error=squared", "agent.target_period_env_steps=500"),
        *("agent.optimizer.learning_rate=2.5e-4", "replay.ratio=12.8"),
        *("replay.min_env_steps=10_000", "exploration.final=0.05"),
        f"exploration.decay_env_steps={steps // 2}",
        f"checkpoint.every_env_steps={NEVER}",
    ]


def turn(env_steps: int, *more: str) -> list[str]:
    """Returns the peer's turn: updates as often as it makes them, weights published after each.

    An update may run while rlx acts with the weights of the one before (README.md).
    """
    return [f"acting.env_steps_per_request={env_steps}", "learner.publish_every_updates=1", *more]


# --- the comparison ------------------------------------------------------------------------------


def programs(given: Mapping[str, str], folder: Path, missing: dict[str, str]) -> list[Program]:
    """Returns the peers that can be installed, each followed by rlx's runs of the same work."""
    steps, seconds, found = int(given["steps"]), 2 * float(given["deadline_s"]), []
    with noted(missing, "rltime"):
        python = installed(folder, "rltime", RLTIME, seconds)
        peer = Program(
            name="rltime",
            peer="rltime",
            start=20_000 + SETTLED,
            command=partial(rltime_command, python, steps),
            marks=partial(rltime_marks, BATCH),
            path=None,
        )
        work = [*PLAIN, *as_rltime(steps)]
        same = {"rlx, as rltime": work + turn(32), "rlx, its own turn, 16 lanes": work}
        found += with_rlx(peer, steps, same)
    with noted(missing, "CleanRL"):
        if not given["cleanrl"]:
            raise Failed("not given; say cleanrl=PATH of a checkout")
        checkout = Path(given["cleanrl"]).resolve()
        python = installed(folder, "cleanrl", CLEANRL, seconds)
        peer = Program(
            name="CleanRL",
            peer="CleanRL",
            start=10_000 + SETTLED,
            command=partial(cleanrl_command, python, checkout, steps),
            marks=partial(
                event_marks, python, "runs/*", "losses/td_loss", 10
            ),  # each 100 env steps
            path=checkout,
        )
        work = [*PLAIN, *as_cleanrl(steps)]
        same = {
            "rlx, as CleanRL, 1 lane": work + turn(10, "acting.envs_per_actor=1"),
            "rlx, its own turn, 32 lanes": work,
        }
        found += with_rlx(peer, steps, same)
    return found


SHOWN = ("rltime", "jax", "flax", "torch", "gym", "gymnasium", "numpy", "stable_baselines3")
COMPARISON = Comparison(
    defaults=DEFAULTS,
    least={"rounds": 1, "steps": 40_000, "deadline_s": 1},
    needs={"cleanrl": "cleanrl/dqn_jax.py"},
    programs=programs,
    measures=("env steps", "updates"),
    shown={"rltime": SHOWN, "cleanrl": SHOWN},
)

if __name__ == "__main__":
    main(COMPARISON)
