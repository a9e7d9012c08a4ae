"""rlx from Python: compose a configuration, run it, load a run, make one object by name."""

from __future__ import annotations

import datetime
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig, OmegaConf

from rlx.config.build import (
    ROLES,
    build,
    check,
    plain,
    remember,
    runtime_names,
    setting_hints,
    unboxed,
)
from rlx.config.composing import compose
from rlx.config.marks import anchored, marked, refuse_modules
from rlx.config.targets import resolve
from rlx.interfaces import Agent, EnvFamily
from rlx.machine import xla
from rlx.problems import ConfigError, Problem, Sources, did_you_mean, refuse
from rlx.runs import provenance
from rlx.runs.files import only_one, write_whole
from rlx.runs.folders import (
    CONFIG,
    HYDRA,
    RunFolder,
    config_file,
    find_run,
    has_checkpoint,
    is_used,
    next_resume,
    settings_now,
)
from rlx.types import IsPath, Params, Weights

if TYPE_CHECKING:
    from rlx.evaluation.player import Player, State
    from rlx.training.checkpoint_files import Restored

log = logging.getLogger(__name__)

# What a run that is only loaded needs none of: hooks may be of packages that are not here.
OF_TRAINING: Mapping[str, Any] = {"hooks": [], "schedules": []}

__all__ = ["Loaded", "compose", "load", "make", "run"]


def run(
    cfg: DictConfig | Mapping[str, Any],
    output_dir: Path | str | None = None,
    *,
    began_in: Path | str = ".",
) -> dict[str, Any]:
    """Checks a configuration, runs it and returns the summary.

    began_in: relative paths among the settings start there. They are saved whole.
    """
    check(cfg)
    settings = anchored(plain(cfg), began_in)
    folder = open_output(settings, output_dir)
    for path in marked(settings, IsPath):
        if (given := path.node[path.name]) is not None:
            log.info("%s is %s", path.path, given)
    with only_one(folder), kept(settings, folder):
        return start(settings, folder)


@contextmanager
def kept(settings: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Saves the changed settings of a resume from Python, as Hydra does for one by command.

    A refused resume leaves no settings behind: nothing began with them.
    """
    before = RunFolder(folder).settings
    if not is_used(folder) or before | {"resume": settings["resume"]} == settings:
        yield
        return
    saved = next_resume(folder)
    saved.mkdir(parents=True)
    text = OmegaConf.to_yaml(OmegaConf.create(dict(settings)))
    write_whole(saved / CONFIG, text.encode())
    try:
        yield
    except ConfigError:
        shutil.rmtree(saved)
        raise


def start(settings: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """Builds the parts in order, each from the ones before it, and trains."""
    log.info("loading JAX and what the run is made of")
    from rlx.training.assemble import assemble
    from rlx.training.loop import train

    if settings["deterministic"]:
        refuse_chance(settings)
    xla.prepare(settings)
    resume = settings["resume"]
    if resume == "auto" and not has_checkpoint(output_dir):
        resume = None  # it begins anew; resume=DIR demands a checkpoint
    if settings["learner"]["processes"] > 1:
        from rlx.training.group import run_group

        return run_group(settings, output_dir, resume=resume is not None)
    parts = assemble(settings, output_dir, resume=resume is not None)
    with parts:
        provenance.save(output_dir)  # nothing is refused any more: the folder counts as used
        return train(parts)


def refuse_chance(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for settings that cannot give the same bits."""
    from rlx.training.agreement import by_clock, takes_turns

    if by_clock(settings):
        says = "a clock is never the same twice; schedule over env_steps or updates"
        raise refuse("schedules", says, given="over: seconds")
    if not takes_turns(settings):
        says = "only acting=local gives the same bits; choose it, or deterministic=false"
        raise refuse("deterministic", says, given="true")
    if settings["replay"].get("prefetch"):
        says = "a thread draws when it can; set it to 0, or deterministic=false"
        raise refuse("replay.prefetch", says, given=str(settings["replay"]["prefetch"]))


def open_output(settings: Mapping[str, Any], output_dir: Path | str | None) -> Path:
    """Makes the run's folder and puts the configuration into it."""
    resume = settings["resume"]
    resumed = find_run(resume) if resume not in (None, "auto") else None
    now = datetime.datetime.now()
    folder = Path(output_dir or resumed or f"outputs/{now:%Y-%m-%d}/{now:%H-%M-%S-%f}")
    if resume is None:
        refuse_used(folder)
    saved = folder / HYDRA / CONFIG
    try:
        saved.parent.mkdir(parents=True, exist_ok=True)
        if not is_used(folder):  # else it is that of the run that was here
            OmegaConf.save(OmegaConf.create(dict(settings)), saved)
    except OSError as error:
        raise refuse(
            "output_dir", f"cannot be written ({error}); give another", given=str(folder)
        ) from error
    return folder


def refuse_used(folder: Path) -> None:
    """Raises a ConfigError if the folder already holds a run."""
    if is_used(folder):
        says = f"holds a run already; continue it with resume={folder}, or give another folder"
        raise refuse("output_dir", says, given=str(folder))


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A run from its folder; its parts are built when they are first asked for."""

    cfg: DictConfig
    output_dir: Path

    @property
    def family(self) -> EnvFamily:
        """The environment's settings, which make lanes of it."""
        return self._built[0]

    @cached_property
    def evaluated(self) -> EnvFamily:
        """The environment of the run's own evaluations: with what evaluation.env changes."""
        from rlx.evaluation.elsewhere import changed

        settings = plain(self.cfg)
        own = settings["evaluation"]["env"]
        return changed(settings["env"], own, self.family, self.agent.spec)

    def _other(self, name: str) -> tuple[EnvFamily, dict[str, Any]]:
        """The environment of one of evaluation.others, and its settings."""
        from rlx.evaluation.elsewhere import changed, check_name

        check_name(name, "other")
        settings = plain(self.cfg)
        others = settings["evaluation"]["others"]
        if name not in others:
            accepted = ", ".join(others) or "none: the run has no evaluation.others"
            raise refuse("other", f"no evaluation of the run; accepted: {accepted}", given=name)
        own, where = others[name], f"evaluation.others.{name}.env"
        return changed(settings["env"], own["env"], self.family, self.agent.spec, where), own

    @property
    def agent(self) -> Agent:
        """The agent, with its network."""
        return self._built[1]

    def restore(self, which: str | Path = "latest") -> Restored:
        """A checkpoint without its replay: "latest", "best", or the folder of one."""
        import jax

        from rlx.training.checkpoint import Checkpointer
        from rlx.training.checkpoint_files import CheckpointError
        from rlx.training.restoring import check_meta

        like = jax.eval_shape(lambda: self.agent.init(jax.random.PRNGKey(0)))
        try:
            checkpoints = Checkpointer(self.output_dir, None)
            return check_meta(checkpoints.restore(like, which, with_replay=False))
        except CheckpointError as error:
            raise refuse("which", str(error), given=str(which)) from error

    def params(self, which: str | Path = "latest") -> Params:
        """The parameters that act, as NumPy arrays."""
        return self.agent.acting_params(self.restore(which).state)

    def act(
        self,
        observation: Any,
        state: State | None = None,
        *,
        reward: Any = None,
        first: Any = None,
        greedy: bool | None = None,
        epsilon: float | None = None,
        seed: int | None = None,
        which: str | Path = "latest",
    ) -> tuple[Any, State]:
        """(action, state) for an observation as the environment itself gives it.

            action, state = run.act(observation)  # an episode begins
            action, state = run.act(observation, state, reward=reward)  # it goes on

        One unbatched observation (an array, or a dict of leaves) gives an int; where an action is
        an array, i32[k] of choices or f32[*] within the bounds. A batch [N, *] of N environments
        gives [N] of them and takes reward [N] and `first` bool[N] as well: where this
        observation is an episode's first one, so that reward and state before it do not count.
        `greedy`: the best action the agent knows, which is the default; False: as it samples, of
        an agent with a distribution of its own. `epsilon`: instead, the share of sampled (of other
        agents: random) actions. They are drawn from `seed` (null: from chance), which is given
        where a state is not. `which`: read once, when it is first asked for. ValueError
        for what does not fit the environment.
        """
        key = str(which)
        if key not in self._players:
            from rlx.envs.observations import raw_spaces_of
            from rlx.evaluation.player import Player

            raw_spaces = raw_spaces_of(self.family, self.agent.spec)
            self._players[key] = Player(
                agent=self.agent, raw_spaces=raw_spaces, params=self.params(which)
            )
        return self._players[key].act(
            observation,
            state,
            reward=reward,
            first=first,
            greedy=greedy,
            epsilon=epsilon,
            seed=seed,
        )

    def evaluate(
        self,
        *,
        episodes: int = 100,
        which: str | Path = "latest",
        other: str | None = None,
        epsilon: float | None = None,
        envs: int | None = None,
        seed: int = 0,
        record: bool | Literal["grid"] = False,
        record_fps: float = 30.0,
        grid: int = 9,
    ) -> dict[str, Any]:
        """Plays episodes with a checkpoint's parameters; `rlx.evaluate` explains the arguments."""
        from rlx.evaluation.playing import evaluate
        from rlx.evaluation.video import GridRecorder, VideoFile, VideoRecorder

        settings, restored = plain(self.cfg)["evaluation"], self.restore(which)
        family, own = (self.evaluated, settings) if other is None else self._other(other)
        version, name = restored.meta["updates"], f"evaluation-{restored.env_steps}"
        lanes = settings["envs"] if envs is None else envs
        name += f"-{other}" if other is not None else ""
        name += "-grid" if record == "grid" else ""
        folder = self.output_dir / "videos"
        with VideoFile(folder, name, record_fps) if record else nullcontext() as file:
            recorder: VideoRecorder | GridRecorder | None = None
            if file is not None:
                count = min(grid, lanes, episodes)
                recorder = GridRecorder(file, count) if record == "grid" else VideoRecorder(file)
            result = evaluate(
                agent=self.agent,
                weights=Weights(version=version, params=self.agent.acting_params(restored.state)),
                family=family,
                episodes=episodes,
                lanes=lanes,
                epsilon=own["epsilon"] if epsilon is None else epsilon,
                seed=seed,
                most_env_steps=settings["max_env_steps_per_episode"],
                recorder=recorder,
            )
        about = {"checkpoint": str(restored.path), "env_steps": restored.env_steps}
        video = str(file.path) if file else None
        named = {} if other is None else {"other": other}
        return {**about, "updates": version, **named, **result, "video": video}

    @cached_property
    def _players(self) -> dict[str, Player]:
        return {}

    @cached_property
    def _built(self) -> tuple[EnvFamily, Agent]:
        from rlx.training.assemble import build_agent

        return build_agent(plain(self.cfg))


def load(run_dir: Path | str, *, allow: Sequence[str] = ()) -> Loaded:
    """A finished or interrupted run; its configuration is checked like any other.

    It is only data: a module that it names (`env.id=module:Name`) is not imported for its sake.
    allow: packages that may be. One that is imported already needs no permission.
    """
    saved, settings = config_file(find_run(run_dir, "run")), settings_now(run_dir)
    xla.prepare(compile_cache=settings.get("compile_cache", True))
    refuse_modules(settings, str(saved), allow)
    cfg = OmegaConf.create({**settings, **OF_TRAINING})
    names = {key: str(saved) for key in map(str, cfg)}
    check(remember(cfg, Sources(names=names)))
    return Loaded(cfg=cfg, output_dir=Path(run_dir))


def make(
    choice: str,
    *,
    config_dir: Path | str | None = None,
    extra_dir: Path | str | None = None,
    **given: Any,
) -> Any:
    """One object by name: `make("agent=r2d2", unroll=4, network=network, spec=spec)`.

    Keywords are settings, which replace those of the YAML, or what the run would supply; the
    folders are those of `compose`.
    """
    group = choice.partition("=")[0]
    if group not in ROLES:
        raise refuse(group, f"no such group; {did_you_mean(group, ROLES)}")
    node = compose([choice], config_dir=config_dir, extra_dir=extra_dir)[group]
    cls, why = resolve(node["_target_"])
    if cls is None:
        raise refuse(f"{group}._target_", why, given=str(node["_target_"]))
    hints, runtime = setting_hints(cls), runtime_names(cls)
    if unknown := [name for name in given if name not in (*hints, *runtime)]:
        raise ConfigError(
            [
                Problem(path=n, says=f"no such setting; {did_you_mean(n, [*hints, *runtime])}")
                for n in unknown
            ]
        )
    settings: Any = OmegaConf.merge(node, {k: unboxed(v) for k, v in given.items() if k in hints})
    return build(settings, group, **{k: v for k, v in given.items() if k in runtime})
