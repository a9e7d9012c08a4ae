"""From a Hydra sweep to jobs: what each runs, what it may take, what is done already.

`hydra_plugins/rlx` tells Hydra of the launchers; `rlx.jobs` runs the jobs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from rlx.composing import quote
from rlx.config import check, plain
from rlx.folders import flat
from rlx.jobs import RUNS_FILE, Job, Outcome, Start, Watch, outcome, record, run_jobs, say
from rlx.problems import ConfigError, Problem, refuse, show

# Hydra's own settings that are the sweep's and not its jobs'.
OF_THE_SWEEP = ("mode", "launcher", "sweeper", "sweep", "run", "output_subdir")
GPU_SHARE = 0.9  # of a GPU's memory, for all jobs on it together


class Refused(CompactHydraException):
    """What Hydra prints as it is, without a traceback."""


class JobFailed(CompactHydraException):
    """A job of a sweep did not come to its end."""


Composed = tuple[Job, DictConfig]


class Sweep:
    """The jobs of a sweep over all its batches: Hydra's sweepers launch one or many."""

    def __init__(self, config: DictConfig, load: Callable[[list[str]], DictConfig]) -> None:
        """config: the sweep's own, with Hydra's section; load: overrides -> one job's."""
        self.watch: Watch = lambda job: False  # a sweeper that prunes sets its own
        self._config, self._load = config, load
        self._jobs: list[Job] = []
        self._outcomes: dict[int, Outcome] = {}

    def launch(
        self,
        batch: Sequence[Sequence[str]],
        first: int,
        start: Start,
        *,
        slots: Callable[[Sequence[DictConfig]], int],
        grace_s: float,
        skip_done: bool,
        also: Callable[[DictConfig], list[str]] = lambda _: [],
    ) -> list[JobReturn]:
        """Runs a batch of jobs, numbered from `first`; raises Refused before anything has begun.

        slots: how many at once, from their configurations. also: further overrides of each.
        """
        try:
            composed = self._compose(batch, first, skip_done, also)
        except ConfigError as error:
            lines = "\n".join(f"rlx: {problem}" for problem in error.problems)
            raise Refused(lines) from None
        self._jobs += [job for job, _ in composed]
        found = run_jobs(
            self._jobs,
            start,
            slots=slots([cfg for _, cfg in composed]),
            grace_s=grace_s,
            done=self._outcomes,
            watch=self.watch,
        )
        self._outcomes = {job.number: one for job, one in zip(self._jobs, found, strict=True)}
        _sum_up(self._jobs, found)
        return [_as_return(self._outcomes[job.number], job, cfg) for job, cfg in composed]

    def _compose(
        self,
        batch: Sequence[Sequence[str]],
        first: int,
        skip_done: bool,
        also: Callable[[DictConfig], list[str]],
    ) -> list[Composed]:
        """All jobs of a batch, each checked as a single run is; raises ConfigError of all."""
        problems: list[Problem] = []
        composed: list[Composed] = []
        varying = _varying(batch)
        for number, overrides in enumerate(batch, start=first):
            try:
                cfg = self._load(list(overrides))
                with open_dict(cfg):
                    cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
                check(cfg)
                sweep = Path(cfg.hydra.sweep.dir).absolute()
                folder = sweep / str(cfg.hydra.sweep.subdir)
                done, more = self._before(folder, cfg, skip_done)
            except ConfigError as error:
                problems += [_of_job(problem, number) for problem in error.problems]
                continue
            command = [*command_line(self._config), *overrides, *more, *also(cfg)]
            where = [f"hydra.run.dir={quote(str(folder))}", f"hydra.job.num={number}"]
            last = _last_of_each(overrides)
            own = tuple(text for key, text in last.items() if key in varying)
            job = Job(
                number=number,
                overrides=own,
                folder=folder,
                sweep=sweep,
                command=(*command, "hydra.mode=RUN", *where),
            )
            if done is not None:
                self._outcomes[number] = done
            composed.append((job, cfg))
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        return composed

    def _before(
        self, folder: Path, cfg: DictConfig, skip_done: bool
    ) -> tuple[Outcome | None, list[str]]:
        """The outcome of a run that ended there already, or what makes one go on there."""
        if not (folder / "env.json").exists():
            return None, []
        if not skip_done:
            says = "holds runs already; hydra.launcher.skip_done=true goes on with that sweep, or "
            raise refuse("hydra.sweep.dir", says + "give another folder", given=str(folder.parent))
        _refuse_changes(folder, cfg)
        job = Job(number=0, overrides=(), folder=folder, sweep=folder.parent, command=())
        found = outcome(job, 0)
        if found.state == "finished":
            return found, []
        return None, ["resume=auto"]


def command_line(config: DictConfig) -> list[str]:
    """This program's own, as far as all jobs share it: without what is swept."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec is not None else [os.path.abspath(sys.argv[0])]
    args = get_args_parser().parse_args(sys.argv[1:])
    flags = {"config-path": args.config_path, "config-name": args.config_name}
    flags["config-dir"] = args.config_dir
    given = [text for name, value in flags.items() if value for text in (f"--{name}", value)]
    own = [text for text in config.hydra.overrides.hydra if not _is_of_the_sweep(text)]
    return [sys.executable, *program, *given, *own]


def _is_of_the_sweep(override: str) -> bool:
    parts = override.lstrip("+~").partition("=")[0].replace("/", ".").split(".")
    return parts[1:2] != [] and parts[1] in OF_THE_SWEEP


def _varying(batch: Sequence[Sequence[str]]) -> set[str]:
    """The keys whose values differ between jobs; of a single job, all of them."""
    values: dict[str, set[str]] = {}
    for overrides in batch:
        for key, text in _last_of_each(overrides).items():
            values.setdefault(key, set()).add(text)
    return {key for key, seen in values.items() if len(seen) > 1 or len(batch) == 1}


def _last_of_each(overrides: Sequence[str]) -> dict[str, str]:
    """{key: override}: the last one counts."""
    return {text.partition("=")[0]: text for text in overrides}


def _refuse_changes(folder: Path, cfg: DictConfig) -> None:
    """Raises ConfigError where a job's configuration is not the one that its folder has."""
    saved = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert isinstance(saved, DictConfig)
    before, now = flat(plain(saved)), flat(plain(cfg))
    changed = [key for key in before | now if before.get(key) != now.get(key) and key != "resume"]
    says = (
        f"was {{}} in {folder}; a sweep goes on as it was: change it back, or give another folder"
    )
    if changed:
        raise ConfigError(
            [
                Problem(path=key, given=show(now.get(key)), says=says.format(show(before.get(key))))
                for key in changed
            ]
        )


def _of_job(problem: Problem, number: int) -> Problem:
    if problem.path.startswith("hydra."):
        return problem  # of the sweep as a whole
    source = f"job {number}" if not problem.source else f"{problem.source}, job {number}"
    return Problem(path=problem.path, says=problem.says, given=problem.given, source=source)


def _sum_up(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> None:
    record(jobs, {job.number: one for job, one in zip(jobs, outcomes, strict=True)})
    counts: dict[str, int] = {}
    for one in outcomes:
        counts[one.state] = counts.get(one.state, 0) + 1
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    say(f"{len(jobs)} jobs: {told}; {jobs[0].sweep / RUNS_FILE}")


def _as_return(one: Outcome, job: Job, cfg: DictConfig) -> JobReturn:
    """For Hydra's sweepers: the run's summary, or an exception for who asks for it."""
    failed = one.error is not None
    value: Any = JobFailed(f"rlx: {job.label}: {one.error}")
    if not failed:
        value = {**one.summary, "state": one.state}
    return JobReturn(
        overrides=list(job.overrides),
        cfg=cfg,
        hydra_cfg=cfg,
        working_dir=str(job.folder),
        task_name=str(cfg.hydra.job.name),
        status=JobStatus.FAILED if failed else JobStatus.COMPLETED,
        _return_value=value,
    )


# --- shares of one machine -----------------------------------------------------------------------


def visible_gpus() -> list[str]:
    """Of CUDA_VISIBLE_DEVICES, else all that this machine has."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def share_of_gpus(slot: int, gpus: Sequence[str], jobs_per_gpu: int) -> dict[str, str]:
    """Environment variables that give a job its GPU, and its part of the memory."""
    if not gpus:
        return {}
    share = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if jobs_per_gpu > 1:
        share["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{GPU_SHARE / jobs_per_gpu:.3f}"
    return share


def share_of_cores(slot: int, cores: Sequence[int], cpus_per_job: int) -> list[int]:
    """The cores of a slot; slots share them where there are not enough for all."""
    begin = slot * cpus_per_job
    return sorted({cores[(begin + i) % len(cores)] for i in range(min(cpus_per_job, len(cores)))})


def refuse_shares(n_jobs: int | None, cpus_per_job: int | None, jobs_per_gpu: int) -> None:
    """Raises Refused for numbers that no machine can be shared by."""
    given = {"n_jobs": n_jobs, "cpus_per_job": cpus_per_job, "jobs_per_gpu": jobs_per_gpu}
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise Refused(f"rlx: hydra.launcher.{name}={value}: must be an integer of at least 1")
