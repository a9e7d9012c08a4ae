"""Many runs, each in a process of its own: `hydra/launcher=rlx` and `rlx_ray` start them by this.

A job is the command line of one run, as it could be typed. One that fails, is killed or cannot
start loses nothing but itself. `runs.csv` in the sweep's folder says what became of each.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol

from rlx.machine.signals import sigterm_interrupts
from rlx.runs.files import write_whole
from rlx.runs.folders import STATUS_FILE, SUMMARY_FILE, read_object

CONSOLE_FILE = "console.log"
RUNS_FILE = "runs.csv"
RESULTS = ("evaluation_return", "env_steps", "wall_s", "error", "folder")  # its last columns
TAIL_BYTES = 1 << 16  # of a console, where its last line is looked for
POLL_S = 0.2
KILL_S = 10.0  # after SIGKILL a process is gone by then


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep."""

    number: int
    overrides: tuple[str, ...]  # what it has of its own
    folder: Path
    sweep: Path  # the folder of all, where runs.csv is
    command: tuple[str, ...]

    @property
    def label(self) -> str:
        """`job 3 (seed=1)`."""
        return f"job {self.number} ({' '.join(self.overrides) or 'no overrides'})"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A job ended in this state."""

    state: str  # finished, interrupted, failed, not started
    summary: Mapping[str, Any]  # of summary.json; empty if there is none
    error: str | None  # in one line

    @property
    def succeeded(self) -> bool:
        """Says whether the job finished or was pruned; an interrupted run did not succeed."""
        return self.state in ("finished", "pruned")


class Running(Protocol):
    """A job under way, wherever it is."""

    def poll(self) -> int | str | None:
        """None while it runs, then its exit status, or why it has none."""

    def stop(self) -> None:
        """Asks the job to end, which it does with a checkpoint."""

    def kill(self) -> None: ...


Start = Callable[[Job, int], Running]  # (job, slot): raises OSError if it cannot
Watch = Callable[[Job], bool]  # of a running job, now and then: whether it is to end early


@dataclass(frozen=True, kw_only=True)
class Before:
    """Lists what an earlier run left in a job's folder; it says nothing about this job."""

    stamps: Mapping[str, tuple[int, ...]]  # by name, of status.json and summary.json
    console_bytes: int

    @classmethod
    def of(cls, folder: Path) -> Before:
        """The folder's files as they are now."""
        stamps = {name: _stamp(folder / name) for name in (STATUS_FILE, SUMMARY_FILE)}
        console = folder / CONSOLE_FILE
        return cls(stamps=stamps, console_bytes=console.stat().st_size if console.exists() else 0)


NOTHING_BEFORE = Before(stamps={}, console_bytes=0)


@dataclass(kw_only=True)
class _Live:
    job: Job
    process: Running
    began: float
    before: Before
    asked: float | None = None  # when it was asked to end early


def run_jobs(
    jobs: Sequence[Job],
    start: Start,
    *,
    slots: int,
    grace_s: float,
    done: Mapping[int, Outcome] | None = None,
    watch: Watch = lambda job: False,
) -> list[Outcome]:
    """Runs all, `slots` at once, and answers in their order.

    done: outcomes of jobs that need not run again. One that is to end early is "pruned". On SIGINT
    or SIGTERM every job is asked to end, killed after `grace_s` (or at a second signal), and
    KeyboardInterrupt raised.
    """
    outcomes: dict[int, Outcome] = dict(done or {})
    waiting = [job for job in jobs if job.number not in outcomes]
    live: dict[int, _Live] = {}  # by slot
    slots = min(slots, len(waiting))
    record(jobs, outcomes)
    with sigterm_interrupts():
        try:
            while waiting or live:
                for slot in range(slots):
                    if slot not in live and waiting:
                        _begin(waiting.pop(0), slot, start, live, outcomes)
                for slot, one in list(live.items()):
                    if (status := one.process.poll()) is not None:
                        del live[slot]
                        _book(one, status, outcomes)
                        record(jobs, outcomes)
                    else:
                        _ask_or_kill(one, watch, grace_s)
                sleep(POLL_S)
        except BaseException:
            _end([one.process for one in live.values()], grace_s)
            for one in live.values():
                status = one.process.poll()
                _book(one, "could not be ended" if status is None else status, outcomes)
            record(jobs, outcomes)
            raise
    return [outcomes[job.number] for job in jobs]


def _ask_or_kill(one: _Live, watch: Watch, grace_s: float) -> None:
    """Asks a job to end early if the watch says so, and kills it if it does not."""
    if one.asked is None and watch(one.job):
        one.process.stop()
        one.asked = monotonic()
    elif one.asked is not None and monotonic() - one.asked > grace_s:
        one.process.kill()


def _book(one: _Live, status: int | str, outcomes: dict[int, Outcome]) -> None:
    found = outcome(one.job, status, one.before)
    if one.asked is not None and found.state != "finished":
        found = Outcome(state="pruned", summary=found.summary, error=None)
    outcomes[one.job.number] = found
    _tell(one.job, found, monotonic() - one.began)


def outcome(job: Job, status: int | str, before: Before = NOTHING_BEFORE) -> Outcome:
    """Tells what a job came to, from its exit status and what is new in its folder."""
    summary = _new_object(job.folder / SUMMARY_FILE, before)
    if status == 0 and summary:
        return Outcome(state=str(summary.get("state")), summary=summary, error=None)
    error = _new_object(job.folder / STATUS_FILE, before).get("error") or _last_line(
        job.folder / CONSOLE_FILE, before.console_bytes
    )
    if isinstance(status, str):
        why = status
    elif status < 0:
        why = f"was killed by {_signal_name(-status)}"
    else:
        why = f"ended with status {status}"
    return Outcome(state="failed", summary={}, error=f"{why}: {error}" if error else why)


def _new_object(path: Path, before: Before) -> dict[str, Any]:
    return {} if _stamp(path) == before.stamps.get(path.name) else read_object(path)


def _stamp(path: Path) -> tuple[int, ...]:
    """A stamp that changes with each write; it uses no clock, as a file server's may be wrong."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"


def record(jobs: Sequence[Job], outcomes: Mapping[int, Outcome]) -> None:
    """Writes the sweep's runs.csv: one line for each job, those of before included.

    A full disk does not end the jobs: it is reported, and the next write may succeed.
    """
    try:
        _record(jobs, outcomes)
    except OSError as error:
        say(f"{jobs[0].sweep / RUNS_FILE} cannot be written: {error}")


def _record(jobs: Sequence[Job], outcomes: Mapping[int, Outcome]) -> None:
    folder = jobs[0].sweep
    folder.mkdir(parents=True, exist_ok=True)
    rows = {int(row["job"]): row for row in _rows_before(folder / RUNS_FILE)}
    for job in jobs:
        found = outcomes.get(job.number) or Outcome(state="", summary={}, error=None)
        result = {name: found.summary.get(name) for name in ("evaluation_return", "env_steps")}
        result |= {"wall_s": found.summary.get("wall_s"), "error": found.error}
        about = {"job": job.number, "state": found.state}
        about |= {"folder": os.path.relpath(job.folder, folder)}
        rows[job.number] = about | dict(_pairs(job)) | result
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    columns = ["job", "state", *(key for key in keys if key not in RESULTS), *RESULTS]
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(columns)), restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows[number] for number in sorted(rows))
    write_whole(folder / RUNS_FILE, text.getvalue().encode())


def _rows_before(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier sweep; lines that are no rows, as after an edit, are left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = [{key: row[key] for key in row if key} for row in csv.DictReader(file)]
    return [row for row in rows if (row.get("job") or "").isdecimal()]


def say(text: str) -> None:
    """Prints one line of the sweep's own on the terminal."""
    print(f"rlx: {text}", file=sys.stderr, flush=True)


def _begin(
    job: Job, slot: int, start: Start, live: dict[int, _Live], outcomes: dict[int, Outcome]
) -> None:
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        before = Before.of(job.folder)
        live[slot] = _Live(job=job, process=start(job, slot), began=monotonic(), before=before)
    except OSError as error:
        outcomes[job.number] = Outcome(state="not started", summary={}, error=str(error))
        say(f"{job.label} could not be started: {error}")
    else:
        say(f"{job.label} started; {job.folder / CONSOLE_FILE} has its output")


def _tell(job: Job, found: Outcome, seconds: float) -> None:
    if found.error:
        say(f"{job.label} failed after {seconds:.0f} s: {found.error}")
    else:
        result = found.summary.get("evaluation_return")
        shown = "" if result is None else f", evaluation return {result:.4g}"
        say(f"{job.label} {found.state} after {seconds:.0f} s{shown}")


def _end(processes: Sequence[Running], grace_s: float) -> None:
    """Asks all to end, waits, and kills what is left; a second signal kills at once."""
    if not processes:
        return
    say(
        f"{len(processes)} jobs end with a checkpoint (at most {grace_s:.0f} s; again to kill them)"
    )
    try:
        for process in processes:
            process.stop()
        _wait(processes, grace_s)
    finally:
        left = [process for process in processes if process.poll() is None]
        for process in left:
            process.kill()
        _wait(left, KILL_S)


def _wait(processes: Sequence[Running], limit_s: float) -> None:
    end = monotonic() + limit_s
    while monotonic() < end and any(process.poll() is None for process in processes):
        sleep(POLL_S)


def _pairs(job: Job) -> list[tuple[str, str]]:
    pairs = (text.partition("=") for text in job.overrides)
    return [(key.lstrip("+~"), value) for key, _, value in pairs]


def _last_line(path: Path, begin: int = 0) -> str:
    """The last line after `begin`; a job may have written gigabytes, so only the end is read."""
    try:
        with path.open("rb") as file:
            file.seek(max(begin, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = re.split(r"[\r\n]", file.read().decode(errors="replace"))
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


# --- a process on this machine -------------------------------------------------------------------


class LocalProcess:
    """A job in a process of this machine, in a session of its own: Ctrl-C reaches only us."""

    def __init__(self, job: Job, environment: Mapping[str, str], cores: Sequence[int]) -> None:
        """environment: added to this process's own. cores: that it may run on; none: all."""
        become = [
            sys.executable,
            "-m",
            "rlx.machine.tied",
            str(os.getpid()),
            ",".join(map(str, cores)),
        ]
        with (job.folder / CONSOLE_FILE).open("ab") as console:
            self._process = subprocess.Popen(
                [*become, *job.command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
