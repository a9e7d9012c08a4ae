"""PPO, recurrent PQN and APPO on Pong: rlx beside CleanRL and Sample Factory, run in turn.

    python experiments/peers/pong_policies.py folder=/tmp/peers cleanrl=/path/to/cleanrl
    python experiments/peers/pong_policies.py folder=/tmp/peers peers=sf_rounds,sf_async rounds=5

folder      where environments and runs go, outside the repository; they are used again
cleanrl     a checkout of CleanRL; not given: both of its programs are left out
peers       all, or some of cleanrl_ppo, cleanrl_pqn, sf_rounds, sf_async and sf_lstm
rounds      3: each program runs so often, one after the other, round by round
steps       20_480: env steps (of four frames) of a run; schedules are as long as the run
cores       2: CPU cores that all programs are bound to
deadline_s  900: seconds that a run may take, and twice as many that an installation may

It runs on the Python that has rlx. Speeds are of whole programs, acting and learning; they come
from the programs' own logs, from env step 4,096 to the end (README.md says more).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from side_by_side import (
    NEVER,
    ROOT,
    Comparison,
    Failed,
    Program,
    bound,
    chosen,
    event_marks,
    installed,
    main,
    noted,
    with_rlx,
)

DEFAULTS = {"folder": "", "cleanrl": "", "peers": "all", "rounds": "3", "steps": "20_480"}
DEFAULTS |= {"cores": "2", "deadline_s": "900"}
SETTLED = 4_096  # env steps that are left out: there all is compiled, and the caches are warm
ROUND = 1_024  # rows of a round: 8 lanes of 128 env steps, four epochs of four minibatches
BATCH = 640  # rows of an update of APPO: 32 sequences of 20

# gym before 0.26 has the API that CleanRL calls; EnvPool 1.0.1 is the last one that speaks it;
# gym is for NumPy before 2.0.
CLEANRL: tuple[str, ...] = (
    "envpool==1.0.1",
    "gym==0.23.1",
    "gymnasium==1.4.0",
    "numpy==1.26.4",
    "tyro==1.0.17",
)
CLEANRL += ("tensorboard==2.21.0", "torch==2.13.0")
# Sample Factory wants gymnasium below 1.0 and NumPy below 2.0; ale-py 0.10 brings the ROMs.
SAMPLE_FACTORY: tuple[str, ...] = (
    "sample-factory==2.1.1",
    "ale-py==0.10.2",
    "gymnasium==0.29.1",
    "numpy==1.26.4",
)
SAMPLE_FACTORY += ("signal-slot-mp==1.0.5", "faster-fifo==1.5.2", "opencv-python==4.11.0.86")
SAMPLE_FACTORY += ("tensorboard==2.21.0", "tensorboardX==2.6.5", "torch==2.13.0")


# --- CleanRL -------------------------------------------------------------------------------------


def cleanrl_command(python: Path, file: Path, steps: int, folder: Path) -> list[str]:
    return [str(python), str(file), "--env-id", "Pong-v5", "--total-timesteps", str(steps)]


def cleanrl(name: str, file: str, given: Mapping[str, str], folder: Path) -> Program:
    """Returns a script of the checkout with its defaults; it logs each round."""
    if not given["cleanrl"]:
        raise Failed("not given; say cleanrl=PATH of a checkout")
    checkout = Path(given["cleanrl"]).resolve()
    path = checkout / "cleanrl" / file
    if not path.is_file():
        raise Failed(f"no {path}")
    python = installed(folder, "cleanrl_envpool", CLEANRL, 2 * float(given["deadline_s"]))
    return Program(
        name=name,
        peer=name,
        start=SETTLED,
        command=partial(cleanrl_command, python, path, int(given["steps"])),
        marks=partial(event_marks, python, "runs/*", "charts/SPS", ROUND),
        path=checkout,
    )


# --- Sample Factory ------------------------------------------------------------------------------

SAMPLE_FACTORY_RUN = (  # env steps are counted, not frames; two workers, as there are two cores
    *("--algo=APPO", "--env=atari_pong", "--device=cpu", "--experiment=run"),
    *("--summaries_use_frameskip=False", "--num_workers=2"),
    *("--normalize_input=False", "--normalize_returns=False"),
    "--lr_schedule=constant",  # at a rate of 0, before its run ends, it would leave epochs out
)
SAMPLE_FACTORY_PPO = ("--num_envs_per_worker=4",)  # all else is as its Atari example has it
SAMPLE_FACTORY_LSTM = (
    *("--num_envs_per_worker=16", "--worker_num_splits=2", "--env_framestack=1"),
    *("--encoder_conv_architecture=resnet_impala", "--encoder_conv_mlp_layers", "256"),
    *("--use_rnn=True", "--rnn_type=lstm", "--rnn_size=256", "--rollout=20", "--recurrence=20"),
    *(f"--batch_size={BATCH}", "--num_batches_per_epoch=1", "--num_epochs=1"),
    "--async_rl=True",  # without V-trace, with which Sample Factory 2.1.1 ends in its own metrics
)


def sample_factory_command(
    python: Path, settings: Sequence[str], steps: int, folder: Path
) -> list[str]:
    script = ROOT / "experiments" / "peers" / "sample_factory_pong.py"
    ends = (f"--train_dir={folder}/train_dir", f"--train_for_env_steps={steps}")
    return [str(python), str(script), *SAMPLE_FACTORY_RUN, *settings, *ends]


def sample_factory(
    name: str, settings: Sequence[str], rows: int, given: Mapping[str, str], folder: Path
) -> Program:
    """Returns the Atari example with these settings; it logs after a round, at most each 2 s."""
    deadline = 2 * float(given["deadline_s"])
    python = installed(folder, "sample_factory", SAMPLE_FACTORY, deadline)
    return Program(
        name=name,
        peer=name,
        start=SETTLED,
        command=partial(sample_factory_command, python, settings, int(given["steps"])),
        marks=partial(event_marks, python, "train_dir/run/.summary/0", "train/loss", rows),
        path=None,
    )


# --- rlx -----------------------------------------------------------------------------------------

PLAIN = (  # a row of metrics and events each round; no evaluation, and a checkpoint only at the end
    *("env.id=Pong-v5", "learner.platform=cpu", f"logging.every_env_steps={ROUND}"),
    *("evaluation.every_env_steps=null", "checkpoint.replay=false", "logging.console=off"),
    f"checkpoint.every_env_steps={NEVER}",
)


def ppo(steps: int, value_clip: float) -> list[str]:
    return [
        *("experiment=atari_ppo", *PLAIN, f"agent.value_clip={value_clip}"),
        f"agent.optimizer.decay_gradient_steps={steps * 16 // ROUND}",
    ]


def pqn(steps: int) -> list[str]:
    return [
        *("experiment=atari_pqn_lstm", *PLAIN, f"exploration.decay_env_steps={steps // 10}"),
        f"agent.optimizer.decay_gradient_steps={steps * 16 // ROUND}",
    ]


def appo(steps: int, *acting: str) -> list[str]:
    """Returns IMPALA with Sample Factory's clipped ratio, Adam, and LSTM on features alone."""
    return [
        *("experiment=atari_impala", *PLAIN, "env.options.use_fire_reset=true", *acting),
        *("network.prev_action=false", "network.prev_reward=false", "agent.clip=0.1"),
        *("agent.normalize_advantage=true", "agent.optimizer.max_grad_norm=0.5"),
        *("agent.optimizer.rule=adam", "agent.optimizer.b1=0.9", "agent.optimizer.b2=0.999"),
        *("agent.optimizer.epsilon=1e-5", "agent.optimizer.learning_rate=2.5e-4"),
        f"agent.optimizer.decay_gradient_steps={steps // BATCH}",
    ]


RAY = ("acting.instances=2", "acting.envs_per_actor=16")
THREAD = ("acting=threads", "acting.instances=1", "acting.envs_per_actor=32")


# --- the comparison ------------------------------------------------------------------------------


# a peer's name, how its program is prepared, and rlx's runs beside it: names and overrides
Pair = tuple[str, Callable[[str], Program], Mapping[str, Sequence[str]]]


def pairs(given: Mapping[str, str], folder: Path) -> dict[str, Pair]:
    """Returns each peer by its word for `peers`."""
    steps, of_cleanrl = int(given["steps"]), partial(cleanrl, given=given, folder=folder)
    of_factory = partial(sample_factory, given=given, folder=folder)
    rounds, turns = SAMPLE_FACTORY_PPO, (*SAMPLE_FACTORY_PPO, "--async_rl=True")
    return {
        "cleanrl_ppo": (
            "CleanRL's PPO",
            partial(of_cleanrl, file="ppo_atari_envpool.py"),
            {"rlx, as CleanRL's PPO": ppo(steps, 0.1)},
        ),
        "cleanrl_pqn": (
            "CleanRL's PQN",
            partial(of_cleanrl, file="pqn_atari_envpool_lstm.py"),
            {"rlx, as CleanRL's PQN": pqn(steps)},
        ),
        "sf_rounds": (
            "Sample Factory, in rounds",
            partial(of_factory, settings=rounds, rows=ROUND),
            {"rlx's PPO, as Sample Factory": ppo(steps, 1.0)},
        ),
        "sf_async": (
            "Sample Factory, asynchronous",
            partial(of_factory, settings=(*turns, "--worker_num_splits=2"), rows=ROUND),
            {"rlx's PPO, in rounds": ppo(steps, 1.0)},
        ),
        "sf_lstm": (
            "Sample Factory, LSTM, one pass",
            partial(of_factory, settings=SAMPLE_FACTORY_LSTM, rows=BATCH),
            {
                "rlx's APPO, two Ray actors": appo(steps, *RAY),
                "rlx's APPO, a thread": appo(steps, *THREAD),
            },
        ),
    }


def programs(given: Mapping[str, str], folder: Path, missing: dict[str, str]) -> list[Program]:
    """Returns the peers that can be installed, each followed by rlx's runs of the same work."""
    bound(int(given["cores"]))
    known, found = pairs(given, folder), []
    for word in chosen(given, "peers", known):
        name, prepared, runs = known[word]
        with noted(missing, name):
            found += with_rlx(prepared(name), int(given["steps"]), runs)
    return found


COMPARISON = Comparison(
    defaults=DEFAULTS,
    least={"rounds": 1, "steps": SETTLED + 2 * ROUND, "cores": 1, "deadline_s": 1},
    needs={"cleanrl": "cleanrl/ppo_atari_envpool.py"},
    programs=programs,
    measures=("env steps",),
    shown={
        "cleanrl_envpool": ("torch", "envpool", "gym", "gymnasium", "numpy", "tensorboard"),
        "sample_factory": ("sample-factory", "torch", "ale-py", "gymnasium", "numpy"),
    },
)

if __name__ == "__main__":
    main(COMPARISON)
