"""Turns a Hydra sweep into jobs: what each runs, what it may take, what is done already.

`hydra_plugins/rlx` tells Hydra of the launchers; `rlx.sweeps.jobs` runs the jobs.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, open_dict

from rlx.config.build import check, plain
from rlx.config.composing import quote
from rlx.problems import ConfigError, Problem, first_line, refuse, show
from rlx.runs.files import LOCK_FILE, only_one
from rlx.runs.folders import config_file, flat, read_settings
from rlx.sweeps.jobs import RUNS_FILE, Job, Outcome, Start, Watch, outcome, record, run_jobs, say

# Hydra's own settings that are the sweep's and not its jobs'.
OF_THE_SWEEP = ("mode", "launcher", "sweeper", "sweep", "run", "output_subdir")
GPU_SHARE = 0.9  # of a GPU's memory, for all jobs on it together


class Refused(CompactHydraException):
    """A refusal that Hydra prints as it is, without a traceback."""


class JobFailed(CompactHydraException):
    """A job of a sweep did not come to its end."""


Composed = tuple[Job, DictConfig]


class Sweep:
    """The jobs of a sweep over all its batches: Hydra's sweepers launch one or many."""

    def __init__(self, config: DictConfig, load: Callable[[list[str]], DictConfig]) -> None:
        """config: the sweep's own, with Hydra's section; load: overrides -> one job's."""
        self.watch: Watch = lambda job: False  # a sweeper that prunes sets its own
        self.searched: frozenset[str] = frozenset()  # a search's keys; the sweeper sets them
        self._config, self._load = config, load
        self._jobs: list[Job] = []
        self._outcomes: dict[int, Outcome] = {}
        self._folder = Path(config.hydra.sweep.dir).absolute()
        make_folder(self._folder)

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
        with refused_in_lines(), only_one(self._folder, "hydra.sweep.dir"):
            composed = self._compose(batch, first, skip_done, also)
            return self._run(composed, start, slots, grace_s)

    def _run(
        self,
        composed: Sequence[Composed],
        start: Start,
        slots: Callable[[Sequence[DictConfig]], int],
        grace_s: float,
    ) -> list[JobReturn]:
        self._jobs += [job for job, _ in composed]
        to_run = [cfg for job, cfg in composed if job.number not in self._outcomes]
        found = run_jobs(
            self._jobs,
            start,
            slots=slots(to_run) if to_run else 1,
            grace_s=grace_s,
            done=self._outcomes,
            watch=self.watch,
        )
        self._outcomes = {job.number: one for job, one in zip(self._jobs, found, strict=True)}
        if len(composed) > 1:  # again, as many lines may lie between
            for one, _ in composed:
                tell_again(one, self._outcomes[one.number])
        _sum_up(self._jobs, found)
        return [_as_return(self._outcomes[job.number], job, cfg) for job, cfg in composed]

    def _compose(
        self,
        batch: Sequence[Sequence[str]],
        first: int,
        skip_done: bool,
        also: Callable[[DictConfig], list[str]],
    ) -> list[Composed]:
        """All jobs of a batch, each checked as a single run is; raises ConfigError of all.

        In a search those with bad settings are failed jobs, unless there was never a good one.
        """
        problems: list[Problem] = []
        refused: dict[int, list[Problem]] = {}
        composed: list[Composed] = []
        varying = self.searched or _varying(batch)
        for number, overrides in enumerate(batch, start=first):
            cfg, more = self._numbered(number, overrides), []
            folder = self._folder / str(cfg.hydra.sweep.subdir)
            try:
                _refuse_shared(folder, number, [*self._jobs, *(job for job, _ in composed)])
                check(cfg)
                more = also(cfg)
            except ConfigError as error:
                refused[number] = [_of_job(problem, number) for problem in error.problems]
            try:
                done, on = self._before(folder, cfg, skip_done, more)
            except ConfigError as error:
                problems += [_of_job(problem, number) for problem in error.problems]
                continue
            if done is not None:
                self._outcomes[number] = done
            job = self._job(number, folder, overrides, [*on, *more], varying)
            composed.append((job, cfg))
        if not self.searched or (len(refused) == len(batch) and not self._jobs):
            problems = [*(one for found in refused.values() for one in found), *problems]
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        self._count_as_failed(refused, composed)
        return composed

    def _numbered(self, number: int, overrides: Sequence[str]) -> DictConfig:
        cfg = self._load(list(overrides))
        with open_dict(cfg):
            cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
        return cfg

    def _job(
        self,
        number: int,
        folder: Path,
        overrides: Sequence[str],
        more: Sequence[str],
        varying: Collection[str],
    ) -> Job:
        """more: overrides that it is started with, and that are not its own."""
        where = [f"hydra.run.dir={quote(str(folder))}", f"hydra.job.num={number}"]
        last = _last_of_each(overrides)
        return Job(
            number=number,
            overrides=tuple(text for key, text in last.items() if key in varying),
            folder=folder,
            sweep=self._folder,
            command=(*command_line(self._config), *overrides, *more, "hydra.mode=RUN", *where),
        )

    def _count_as_failed(
        self, refused: Mapping[int, Sequence[Problem]], composed: Sequence[Composed]
    ) -> None:
        for job, _ in composed:
            if job.number in refused:
                reasons = "; ".join(map(str, refused[job.number]))
                self._outcomes[job.number] = Outcome(state="not started", summary={}, error=reasons)
                say(f"{job.label} is refused: {reasons}")

    def _before(
        self, folder: Path, cfg: DictConfig, skip_done: bool, also: Sequence[str]
    ) -> tuple[Outcome | None, list[str]]:
        """The outcome of a run that ended there already, or what makes one go on there."""
        if not (folder / "env.json").exists():
            return None, []
        if not skip_done:
            says = "holds runs already; hydra.launcher.skip_done=true goes on with that sweep, or "
            raise refuse("hydra.sweep.dir", says + "give another folder", given=str(self._folder))
        with only_one(folder, "hydra.sweep.dir"):  # a run may outlive its sweep for a while
            pass
        _refuse_changes(folder, cfg, [text.partition("=")[0] for text in also])
        job = Job(number=0, overrides=(), folder=folder, sweep=self._folder, command=())
        found = outcome(job, 0)
        if found.state == "finished":
            return found, []
        return None, ["resume=auto"]


@contextmanager
def refused_in_lines() -> Iterator[None]:
    """Turns a ConfigError into what Hydra prints as it is."""
    try:
        yield
    except ConfigError as error:
        raise Refused("\n".join(f"rlx: {problem}" for problem in error.problems)) from None


def make_folder(folder: Path) -> None:
    """Makes a sweep's folder; raises Refused where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK_FILE).touch()
    except OSError as error:
        says = f"cannot be written ({error.strerror}); give another"
        raise Refused(f"rlx: hydra.sweep.dir={folder}: {says}") from None


def _refuse_shared(folder: Path, number: int, jobs: Sequence[Job]) -> None:
    """Raises ConfigError where two jobs of a sweep would write into one folder."""
    for job in jobs:
        if job.folder == folder and job.number != number:
            says = f"jobs {job.number} and {number} would share {folder}; name all that varies, or "
            raise refuse("hydra.sweep.subdir", says + "leave it at the job's number")


def command_line(config: DictConfig) -> list[str]:
    """This program's command line, without the swept keys, as all jobs share it."""
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


def _refuse_changes(folder: Path, cfg: DictConfig, given: Sequence[str]) -> None:
    """Raises ConfigError where a job's configuration is not the one that its folder has.

    given: keys that the launcher sets, such as the address of this time's cluster.
    """
    path = config_file(folder)
    try:
        saved = read_settings(path)
    except (OSError, ValueError) as error:
        says = f"{path} cannot be read ({first_line(error)}); restore or move that folder"
        raise refuse("hydra.sweep.dir", says, given=str(folder.parent)) from error
    before, now = flat(saved), flat(plain(cfg))
    free = ("resume", *given)
    changed = [key for key in before | now if before.get(key) != now.get(key) and key not in free]
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


def tell_again(job: Job, found: Outcome) -> None:
    """Says a job's name and what came of it, if it did not come to its end."""
    if not found.succeeded:
        say(f"{job.label} {found.state}: {found.error or 'skip_done=true goes on with it'}")


def _sum_up(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> None:
    record(jobs, {job.number: one for job, one in zip(jobs, outcomes, strict=True)})
    counts: dict[str, int] = {}
    for one in outcomes:
        counts[one.state] = counts.get(one.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    say(f"{len(jobs)} jobs: {states}; {jobs[0].sweep / RUNS_FILE}")


def _as_return(one: Outcome, job: Job, cfg: DictConfig) -> JobReturn:
    """The job's result for Hydra's sweepers: the run's summary, or an exception."""
    failed = not one.succeeded
    value: Any = JobFailed(f"rlx: {job.label}: {one.error or one.state}")
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
    """The GPUs of CUDA_VISIBLE_DEVICES, else all that this machine has."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def share_of_gpus(
    slot: int, gpus: Sequence[str], jobs_per_gpu: int, slots: int = 1
) -> dict[str, str]:
    """Environment variables that give a job its GPU, and its part of the memory.

    slots: jobs at once; where they are more than jobs_per_gpu allows for, the parts are smaller.
    """
    if not gpus:
        return {}
    share = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if (sharing := max(jobs_per_gpu, -(-slots // len(gpus)))) > 1:
        share["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{GPU_SHARE / sharing:.3f}"
    return share


def share_of_cores(slot: int, cores: Sequence[int], cpus_per_job: int) -> list[int]:
    """The cores of a slot; slots share them where there are not enough for all."""
    begin = slot * cpus_per_job
    return sorted({cores[(begin + i) % len(cores)] for i in range(min(cpus_per_job, len(cores)))})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "count": (
        lambda value: _is_number(value) and isinstance(value, int) and value >= 1,
        "must be an integer of at least 1",
    ),
    "amount": (
        lambda value: _is_number(value) and 0 <= value < math.inf,
        "must be a number of at least 0",
    ),
    "list": (
        lambda value: isinstance(value, Sequence) and not isinstance(value, str),
        "must be a list, such as [0,1]",
    ),
    "mapping": (lambda value: isinstance(value, Mapping), "must be a mapping, such as {NAME:1}"),
}


def refuse_settings(kind: str, **given: Any) -> None:
    """Raises Refused for settings of a launcher that are not of a kind (of KINDS)."""
    fits, says = KINDS[kind]
    for name, value in given.items():
        if not fits(value):
            raise Refused(f"rlx: hydra.launcher.{name}={show(value)}: {says}")
