"""Learner processes on Ray: `learner.processes=2`.

Each is a whole run in small: actors, a part of the replay, a loop. They do everything at the same
count of env steps, which they tell each other before each update (`rlx.training.stages`), and the
gradients of an update are averaged over the devices of all of them: `jax.distributed` joins the
processes, and the `pmap` of `rlx.training.learner` does the rest.

The process that called `rlx.run` only watches. A lost process takes the group with it, as an update
needs all of them; a new group goes on from the last checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import ray
from jax.errors import JaxRuntimeError
from ray import exceptions as ray_errors

from rlx.cluster.cluster import Cluster
from rlx.config.build import build
from rlx.config.targets import allowed_here
from rlx.machine.signals import stop_on_signals
from rlx.problems import ConfigError, RunFailed, refuse
from rlx.runs import status
from rlx.runs.folders import METRICS_FILE
from rlx.runs.progress import Progress
from rlx.training.agreement import check_agreement
from rlx.training.checkpoint import Checkpointer
from rlx.training.group_process import LearnerProcess
from rlx.training.learner import Group
from rlx.training.shares import log_file, share_of

log = logging.getLogger(__name__)

T = TypeVar("T")

WATCH_S = 0.5  # between two looks at the processes
LISTEN_S = 5.0  # between two looks at whether any is silent
ANSWER_S = 60.0  # for the rendezvous to say so
GRIEF_S = 20.0  # in which the death shows that made another process fail
STORE_BYTES = 1_000_000_000
TAIL_BYTES = 65_536


class Rendezvous:
    """The processes exchange values here: a Ray actor, all of whose calls wait at once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._given: dict[int, Any] = {}  # by rank, in the round that is not complete
        self._answer: Any = None  # a future of what all gave
        self._began_s = monotonic()

    async def exchange(self, rank: int, mine: Any) -> list[Any]:
        """Returns what each process gives, by rank, when the last one has given it."""
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
        answer = self._answer
        self._given[rank] = mine
        if len(self._given) == self._count:
            answer.set_result([self._given[rank] for rank in range(self._count)])
            self._given, self._answer, self._began_s = {}, None, monotonic()
        everything: list[Any] = await answer
        return everything

    async def silence(self) -> tuple[float, list[int]]:
        """Seconds since the last complete round, and who is awaited."""
        awaited = [rank for rank in range(self._count) if rank not in self._given]
        return monotonic() - self._began_s, awaited


class RendezvousPeers:
    """The interfaces.Peers of one of several learner processes."""

    def __init__(self, rendezvous: Any, rank: int, count: int, restarts: int) -> None:
        self.rank, self.count, self.restarts = rank, count, restarts
        self._rendezvous = rendezvous

    def exchange(self, mine: T) -> Sequence[T]:
        """Exchanges values; it has no deadline, as the watcher ends a silent group."""
        given: list[T] = ray.get(self._rendezvous.exchange.remote(self.rank, mine))
        if len({type(each) for each in given}) > 1:
            raise RunFailed("the learner processes are out of step; resume goes on")
        return given


class ProcessLost(Exception):
    """A process of the group is gone, or silent: the group must begin anew."""


def run_group(settings: Mapping[str, Any], output_dir: Path, *, resume: bool) -> dict[str, Any]:
    """Runs all learner processes to the end; returns the first one's summary.

    Raises ConfigError for what cannot work, RunFailed when the group was lost too often.
    """
    count = settings["learner"]["processes"]
    group: Group = build(settings["learner"]["group"], Group)
    build(settings["learner"], "learner")  # what is wrong in it is said before Ray starts
    check_agreement(settings)
    own = share_of(settings, count)
    _check_devices(settings["learner"]["platform"], group)
    console = Console(settings, output_dir, count)
    cluster = _join_cluster(group, settings["acting"], output_dir)
    with _failure_in_status(output_dir), closing(cluster):  # its processes write the status, too
        _check_room(settings, group, cluster)
        with stop_on_signals() as stop:
            group_of = partial(Life, output_dir, group, count, cluster.check)
            return _live(group_of, own, output_dir, group, stop, console, resume=resume)


def _live(
    group_of: Callable[[int], Life],
    settings: Mapping[str, Any],
    output_dir: Path,
    group: Group,
    stop: threading.Event,
    console: Console,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Runs one group after the other, until one finishes."""
    restarts, in_a_row, saved = 0, 0, _newest(output_dir)
    while True:
        life = group_of(restarts)
        try:
            life.begin(settings, stop, resume=resume)
            return {**life.watch(stop, console), "learner_restarts": restarts}
        except ProcessLost as error:
            before, saved = saved, _newest(output_dir)
            in_a_row = in_a_row + 1 if saved == before else 1
            if in_a_row > group.max_restarts or stop.is_set():
                says = f"{error}; learner processes were lost {in_a_row} times without a checkpoint"
                raise RunFailed(says) from error
            restarts, resume = restarts + 1, saved is not None
            whence = "the last checkpoint" if resume else "the beginning"
            log.warning("%s; all learner processes begin anew from %s", error, whence)
        finally:
            life.end()
            console.close()


def _newest(output_dir: Path) -> str | None:
    """The name of the run's last checkpoint."""
    paths = Checkpointer(output_dir, None).paths()
    return paths[-1].name if paths else None


@contextmanager
def _failure_in_status(output_dir: Path) -> Iterator[None]:
    """Writes a failure into status.json, which a killed process has left as it was."""
    try:
        yield
    except ConfigError:
        raise
    except BaseException as error:
        state: status.State = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        status.write_status(output_dir, state, last_row(output_dir), error=line)
        raise


def _join_cluster(group: Group, acting: Mapping[str, Any], run: Path) -> Cluster:
    """Joins the learner processes' cluster, which the actors join, too."""
    address, setting, own = group.address, "learner.group.address", acting.get("address")
    if None not in (address, own) and address != own:
        raise refuse("acting.address", f"the learner processes are at {address}", given=str(own))
    if address is None:
        address, setting = own, "acting.address"
    store = 2 * acting.get("max_in_flight_bytes", STORE_BYTES // 2)
    return Cluster(address=address, store_bytes=store, setting=setting, run=run)


def _check_devices(platform: str | None, group: Group) -> None:
    """Refuses devices that no cluster can give."""
    gpus = group.gpus_per_learner
    if gpus != int(gpus):
        says = "accepted: whole GPUs, as two processes on one cannot exchange gradients"
        raise refuse("learner.group.gpus_per_learner", says, given=f"{gpus:g}")
    if platform == "gpu" and not gpus:
        says = "each of several learner processes has the GPUs it asks for; set "
        raise refuse("learner.platform", says + "learner.group.gpus_per_learner=1", given="gpu")


def _check_room(settings: Mapping[str, Any], group: Group, cluster: Cluster) -> None:
    """Refuses what the cluster does not have, with its numbers."""
    count, acting, have = settings["learner"]["processes"], settings["acting"], cluster.resources
    for name, resource in (("cpus_per_learner", "CPU"), ("gpus_per_learner", "GPU")):
        each, there = getattr(group, name), have.get(resource, 0.0)
        if each * count > there:
            says = f"{count} learner processes ask for {each * count:g} {resource}, the cluster "
            says += f"has {there:g}"
            raise refuse(f"learner.group.{name}", says, given=f"{each:g}")
    actors = acting.get("cpus_per_actor", 0.0) * acting["instances"]
    free = have.get("CPU", 0.0) - group.cpus_per_learner * count
    if cluster.is_own and actors > free:
        says = f"{acting['instances']} actors ask for {actors:g} CPU, the learner processes leave "
        says += f"{free:g}; set it to {math.floor(1000 * free / acting['instances']) / 1000:g}"
        raise refuse("acting.cpus_per_actor", says, given=f"{acting['cpus_per_actor']:g}")


class Life:
    """One life of the group: its processes, and the place where they meet."""

    def __init__(
        self,
        output_dir: Path,
        group: Group,
        count: int,
        check: Callable[[], None],
        restarts: int,
    ) -> None:
        """check: raises NodeLost where the cluster is gone."""
        self._check = check
        self._group, self._count, self._restarts = group, count, restarts
        options: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}
        self._rendezvous = ray.remote(Rendezvous).options(num_cpus=0, **options).remote(count)
        on_cpu = {} if group.gpus_per_learner else {"JAX_PLATFORMS": "cpu"}
        make = ray.remote(LearnerProcess).options(
            num_cpus=group.cpus_per_learner,
            num_gpus=group.gpus_per_learner,
            scheduling_strategy={"PACK": "DEFAULT", "SPREAD": "SPREAD"}[group.placement],
            runtime_env={"env_vars": on_cpu},
            max_concurrency=2,  # `stop` is heard while `run` runs
            **options,
        )
        given = {"output_dir": str(output_dir.absolute()), "allowed": allowed_here()}
        self._processes = [make.remote(rank=rank, count=count, **given) for rank in range(count)]
        self._runs: list[Any] = []
        self._listened_s = monotonic()

    def begin(self, settings: Mapping[str, Any], stop: threading.Event, *, resume: bool) -> None:
        """Starts the processes, joins them, and lets them run; raises ProcessLost or RunFailed."""
        hellos = self._all([p.hello.remote() for p in self._processes], "found no room", stop)
        for rank, (address, pid) in enumerate(hellos):
            log.info("learner process %d: %s, process id %d", rank, address, pid)
        limit_s, coordinator = self._group.start_timeout_s, hellos[0][0]
        joins = [p.join.remote(coordinator, limit_s, settings) for p in self._processes]
        self._all(joins, f"did not find each other at {coordinator}", stop)
        for rank, process in enumerate(self._processes):
            peers = RendezvousPeers(self._rendezvous, rank, self._count, self._restarts)
            self._runs.append(process.run.remote(settings, resume, peers))

    def watch(self, stop: threading.Event, console: Console) -> dict[str, Any]:
        """Waits for the end of all; raises what one raised, or ProcessLost."""
        waiting, stop_sent = list(self._runs), False
        while waiting:
            if stop.is_set() and not stop_sent:
                stop_sent = True
                for process in self._processes:
                    process.stop.remote()
            self._check()
            done, waiting = ray.wait(waiting, num_returns=1, timeout=WATCH_S)
            console.look()
            for run in done:
                self._answer(run)
            self._listen()
        summaries: list[dict[str, Any]] = ray.get(self._runs)
        if len({summary["params_sha256"] for summary in summaries}) > 1:
            log.error("the processes' parameters differ at the end, which they never should")
        return summaries[0]

    def end(self) -> None:
        """Kills the processes, and with them their actors."""
        for actor in (*self._processes, self._rendezvous):
            ray.kill(actor, no_restart=True)

    def _all(self, references: list[Any], late: str, stop: threading.Event) -> list[Any]:
        """The answers of all processes to one call while they start."""
        limit_s, began_s, waiting = self._group.start_timeout_s, monotonic(), list(references)
        while waiting:
            self._check()
            done, waiting = ray.wait(waiting, num_returns=1, timeout=WATCH_S)
            for reference in done:
                self._answer(reference)
            if stop.is_set():
                raise RunFailed("stopped before all learner processes had started")
            if waiting and monotonic() - began_s > limit_s:
                ranks = [rank for rank, ref in enumerate(references) if ref in waiting]
                says = f"learner processes {_listed(ranks)} {late} within {limit_s:.0f} s "
                says += "(learner.group.start_timeout_s)"
                raise ProcessLost(says) if self._restarts else RunFailed(says)
        answers: list[Any] = ray.get(references)
        return answers

    def _answer(self, reference: Any) -> Any:
        """A call's answer; raises the ConfigError or RunFailed of a process, or ProcessLost."""
        try:
            return ray.get(reference)
        except ray_errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ConfigError):
                raise self._as_of_one(cause) from None
            if lost := self._dead():
                raise lost from error
            if isinstance(cause, RunFailed):
                raise cause from None
            if isinstance(cause, (JaxRuntimeError, ray_errors.RayError)):  # as of a connection
                says = f"a learner process failed ({type(cause).__name__}: {_first_line(cause)})"
                raise ProcessLost(says) from error
            raise
        except ray_errors.RayError as error:
            raise ProcessLost(f"a learner process was lost ({_first_line(error)})") from error

    def _as_of_one(self, error: ConfigError) -> ConfigError:
        """The refusal, with a note that its numbers are those of one process's share."""
        of = f" (in one of {self._count} learner processes, for its share)"
        return ConfigError([replace(problem, says=problem.says + of) for problem in error.problems])

    def _dead(self) -> ProcessLost | None:
        """Returns the error of a learner process, or the rendezvous, that has died; else None."""
        calls = [process.__ray_ready__.remote() for process in (*self._processes, self._rendezvous)]
        names = [f"learner process {rank}" for rank in range(self._count)] + ["their rendezvous"]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=GRIEF_S)
        for name, call in zip(names, calls, strict=True):
            try:
                if call in done:
                    ray.get(call)
            except ray_errors.RayActorError:
                return ProcessLost(f"{name} was lost")
        return None

    def _listen(self) -> None:
        """Raises ProcessLost when the processes have been silent for too long."""
        if monotonic() - self._listened_s < LISTEN_S:
            return
        self._listened_s = monotonic()
        try:
            silence_s, awaited = ray.get(self._rendezvous.silence.remote(), timeout=ANSWER_S)
        except ray_errors.RayError as error:
            raise ProcessLost("the learner processes' rendezvous was lost") from error
        if silence_s > (limit_s := self._group.silence_timeout_s):
            says = f"no sign of learner processes {_listed(self._asleep() or awaited)} for "
            says += f"{limit_s:.0f} s "
            raise ProcessLost(says + "(learner.group.silence_timeout_s)")

    def _asleep(self) -> list[int]:
        """The processes that answer no call; the others may only be waiting for them."""
        calls = [process.__ray_ready__.remote() for process in self._processes]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=LISTEN_S)
        return [rank for rank, call in enumerate(calls) if call not in done]


class Console:
    """Shows how far the run is, and what its processes log."""

    def __init__(self, settings: Mapping[str, Any], output_dir: Path, count: int) -> None:
        self._output_dir = output_dir
        self._total, self._logging = settings["total_env_steps"], settings["logging"]
        self._logs = [log_file(output_dir, rank) for rank in range(count)]
        self._read = [path.stat().st_size if path.exists() else 0 for path in self._logs]
        self._shown = -1  # env steps
        self._progress = self._open()

    def look(self) -> None:
        """Shows what is new."""
        for rank in range(len(self._logs)):
            for line in self._new_lines(rank):
                log.info("learner process %d: %s", rank, line)
        row = last_row(self._output_dir) if self._progress.is_due else {}
        if row and row["env_steps"] != self._shown:
            self._shown = row["env_steps"]
            self._progress.update(row)

    def close(self) -> None:
        """Shows the rest; the terminal is as it was."""
        self.look()
        self._progress.close()
        self._progress = self._open()

    def _open(self) -> Progress:
        return Progress(self._total, build(self._logging, "logging"))

    def _new_lines(self, rank: int) -> Iterator[str]:
        """Whole lines that the process has written since the last look."""
        path = self._logs[rank]
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read[rank])
            whole = file.read().rpartition(b"\n")[0]
        if whole:
            self._read[rank] += len(whole) + 1
            yield from whole.decode(errors="replace").splitlines()


def last_row(output_dir: Path) -> dict[str, Any]:
    """The newest row of a run's metrics; {} if there is none."""
    try:
        with (output_dir / METRICS_FILE).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().splitlines()
        row: dict[str, Any] = json.loads(lines[-1])
    except (OSError, IndexError, ValueError):
        return {}
    return row


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
