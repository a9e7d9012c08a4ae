"""The one reader of run folders: where runs are, their settings now, states, rows and summaries.

Results, watch, diff, sweeps, `rlx.load` and resume ask here, so that they agree. The module loads
neither pandas nor JAX, and it reads only: what a file holds is data.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlx.config.documents import (
    MOST_YAML_BYTES,
    Unreadable,
    open_file,
    parse_json,
    parse_yaml,
    read_file,
    read_json,
    read_yaml,
)
from rlx.config.moved import renewed
from rlx.problems import MOST_SAID, cut, first_line, refuse
from rlx.runs.scores import differences

JSON = dict[str, Any]
Kind = TypeVar("Kind")

HYDRA = ".hydra"
CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
RESUME = "resume-"  # and a number: the folder in .hydra of the settings of a resume
METRICS_FILE = "metrics.jsonl"
STATUS_FILE = "status.json"
SUMMARY_FILE = "summary.json"
EVALUATION_FILE = "evaluation.json"
OTHER_EVALUATIONS_FILE = "other_evaluations.json"  # which are not of the run's own protocol
ENV_FILE = "env.json"
MARKS = (STATUS_FILE, METRICS_FILE, f"{HYDRA}/{CONFIG}")  # any of them makes a folder a run
DEPTH = 12  # folders below the given one that are searched

SILENT_S = 300.0  # a running process that told nothing for so long is called silent
START_S = 300.0  # a folder without any status is starting for so long
MOST_EXPANDED = 100_000  # values that the interpolations of settings may come to
LARGEST = 1e100  # what is larger than any return, and is summed without overflow
MOST_LINE = 1 << 20  # bytes of a row of metrics
MOST_OVERRIDES = 100  # of a run, that are told
CHOICES = "hydra.runtime.choices."  # begins the names of group choices in hydra.yaml


# --- where runs are ------------------------------------------------------------------------------


def find(root: Path, depth: int = DEPTH) -> list[Path]:
    """The folders of runs at or below a folder, sorted by name, 2 before 10.

    Folders within a run, hidden ones, links and unreadable ones are not searched.
    """
    return sorted(_below(root, depth), key=lambda path: natural(path.relative_to(root)))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    # Not Path's is_file, which lets some errors through: a folder of somebody else's.
    if any(os.path.isfile(folder / mark) for mark in MARKS):
        yield folder
        return
    try:
        entries = list(os.scandir(folder))
    except OSError:  # it went away, or may not be read
        return
    for entry in entries:
        if depth and entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _below(Path(entry.path), depth - 1)


def natural(path: Path) -> list[tuple[int, str]]:
    """The key that sorts 2 before 10, and resume-2 before resume-10."""
    ends = [(part, part.rpartition("-")[2]) for part in path.parts]
    return [(int(end) if is_number(end) else -1, part) for part, end in ends]


def is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def find_run(path: Path | str, key: str = "resume") -> Path:
    """The folder of a run with settings; ConfigError (of the setting `key`) if there is none."""
    if not os.path.isfile(Path(path) / HYDRA / CONFIG):
        says = "no run is there (no .hydra/config.yaml); give the folder of one, as under outputs/"
        raise refuse(key, says, given=str(path))
    return Path(path)


def is_used(folder: Path) -> bool:
    """Says whether a run has begun in that folder."""
    return os.path.exists(folder / ENV_FILE)  # whatever the name: Path's own raises at a long one


def has_checkpoint(folder: Path) -> bool:
    """Says whether a run's folder has any checkpoint."""
    return newest_checkpoint(folder) is not None


def newest_checkpoint(folder: Path) -> int | None:
    """The env steps of a run's newest checkpoint; None if it has none."""
    found = (folder / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in found if is_number(path.name)), default=None)


# --- settings ------------------------------------------------------------------------------------


def resumes(folder: Path) -> list[Path]:
    """The folders of the settings of a run's resumes, the newest last."""
    found = (folder / HYDRA).glob(f"{RESUME}[0-9]*")
    numbered = [path for path in found if is_number(path.name.removeprefix(RESUME))]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(RESUME)))


def next_resume(folder: Path) -> Path:
    """The folder for the settings of a run's next resume."""
    before = [int(path.name.removeprefix(RESUME)) for path in resumes(folder)]
    return folder / HYDRA / f"{RESUME}{1 + max(before, default=0)}"


def config_file(folder: Path) -> Path:
    """The file of a run's settings now: that of its newest resume, else what it began with."""
    files = [path / CONFIG for path in resumes(folder)]
    return next((file for file in reversed(files) if file.is_file()), folder / HYDRA / CONFIG)


def settings_now(folder: Path | str, key: str = "run", *, resolve: bool = True) -> JSON:
    """The settings that a run was last started with, as today's rlx writes them.

    `resolve` puts values in the place of interpolations. Raises ConfigError of the setting `key`
    where there is no run or its file cannot be read.
    """
    path = config_file(find_run(folder, key))
    try:
        return read_settings(path, resolve=resolve)
    except (OSError, Unreadable) as error:
        says = f"cannot be read ({first_line(error)}); restore the file"
        raise refuse(key, says, given=str(path)) from error


def read_settings(path: Path, *, resolve: bool = True) -> JSON:
    """The settings in a config.yaml; raises FileNotFoundError or Unreadable."""
    return parse_settings(read_file(path, MOST_YAML_BYTES), resolve=resolve)


def parse_settings(data: bytes, *, resolve: bool = True) -> JSON:
    """The settings in the bytes of a config.yaml; raises Unreadable.

    A section `hydra` counts as not there: it is never a run's, and it can start programs.
    """
    tree = parse_yaml(data)
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        raise Unreadable("it holds no settings")
    own = {key: value for key, value in tree.items() if key != "hydra"}
    if b"${" not in data:
        return renewed(own)
    found = _resolved(own)
    return renewed(found if resolve else own)


def _resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with values in the place of its interpolations; those of nothing stay."""
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError, OmegaConfBaseException

    if _expansion(tree) > MOST_EXPANDED:
        raise Unreadable("its interpolations refer to too many others")
    try:
        found: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except GrammarParseError as error:
        raise Unreadable(f"an interpolation: {first_line(error)}") from error
    except OmegaConfBaseException:  # of Hydra's own section, which is not in the file
        return tree
    except (RecursionError, ValueError, TypeError) as error:
        raise Unreadable(f"an interpolation: {first_line(error)}") from error
    return found


def _expansion(value: Any) -> int:
    """At most so many values come of one if each part with interpolations refers to the next."""
    if isinstance(value, str):
        return max(1, value.count("${"))
    if not isinstance(value, Mapping | list):
        return 1
    parts = list(value.values()) if isinstance(value, Mapping) else value
    own = max(1, sum(isinstance(part, str) and "${" in part for part in parts))
    return own * math.prod(map(_expansion, parts))


def flat(tree: Mapping[str, Any], prefix: str = "") -> JSON:
    """{"agent.n_step": 3, ...} of a nested configuration; lists and empty mappings are values."""
    out: JSON = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


# --- one folder ----------------------------------------------------------------------------------


class RunFolder:
    """The folder of one run; its small files are read again when they have changed.

    A file that is missing, broken or of another kind counts as empty, so that it hides no run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[Path, tuple[tuple[int, int], Any]] = {}  # path -> (stamp, content)

    @property
    def status(self) -> JSON:
        """The content of status.json: what the run says it does now."""
        return self._read(self.path / STATUS_FILE, read_json, dict)

    @property
    def summary(self) -> JSON:
        """The content of summary.json: the run's results."""
        return self._read(self.path / SUMMARY_FILE, read_json, dict)

    @property
    def settings(self) -> JSON:
        """The newest settings, nested; see `settings_now`, which raises if they cannot be read."""
        return self._read(config_file(self.path), read_settings, dict)

    @property
    def evaluations(self) -> list[JSON]:
        """The evaluations in evaluation.json by the run's own protocol, the newest last."""
        found = self._read(self.path / EVALUATION_FILE, read_json, dict).get("evaluations")
        entries = [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []
        newest = newest_checkpoint(self.path)
        return [e for e in entries if not differences(e, self.settings, newest)]

    @property
    def choices(self) -> dict[str, str]:
        """Group -> the YAML chosen for it, where Hydra wrote it down."""
        about = flat(self._read(self.path / HYDRA / "hydra.yaml", read_yaml, dict))
        named = {k.removeprefix(CHOICES): v for k, v in about.items() if k.startswith(CHOICES)}
        return {k: cut(str(v)) for k, v in named.items() if not k.startswith("hydra/")}

    @property
    def overrides(self) -> list[str]:
        """Returns what the command lines of start and resumes said; the newest of each key."""
        found: dict[str, str] = {}
        for folder in (self.path / HYDRA, *resumes(self.path)):
            for text in map(str, self._read(folder / OVERRIDES, read_yaml, list)):
                found[text.partition("=")[0].lstrip("+~")] = cut(text)
        return [text for key, text in found.items() if key != "resume"][:MOST_OVERRIDES]

    def state(self) -> tuple[str, str]:
        """(state, note): what the run does, by its own word and by what is seen of its process.

        The state is starting, running, finished, interrupted or failed as the run says, or
        "died" (it says that it works, and its process is gone; or it never said anything) or
        "silent" (it wrote nothing for SILENT_S). The note says why, and is "" where all is well.
        """
        status = self.status
        state = status.get("state")
        if not isinstance(state, str):
            if time.time() - changed_at(self.path / HYDRA / CONFIG) < START_S:
                return "starting", ""
            return "died", "it left no status.json: refused, or ended before its first env step"
        if state not in ("starting", "running"):
            return cut(state), cut(str(status.get("error") or ""), MOST_SAID)
        pid, host, age = number(status.get("pid")), status.get("host"), age_s(status)
        if is_gone(status):
            return "died", f"process {pid} is gone; resume={self.path} goes on"
        if age is not None and age > SILENT_S:
            where = "" if host in (None, platform.node()) else f" on {host}"
            return "silent", f"process {pid}{cut(where)} told nothing for {age / 60:.0f} minutes"
        return state, ""

    def _read(self, path: Path, read: Callable[[Path], Any], kind: type[Kind]) -> Kind:
        try:
            found = path.stat()
            stamp, known = (found.st_mtime_ns, found.st_size), self._files.get(path)
            if known is None or known[0] != stamp:
                known = self._files[path] = (stamp, _or_none(read, path))
        except OSError:
            return kind()
        return known[1] if isinstance(known[1], kind) else kind()


def _or_none(read: Callable[[Path], Any], path: Path) -> Any:
    try:
        return read(path)
    except Unreadable:
        return None


def read_object(path: Path, *, strict: bool = False) -> JSON:
    """The object in a JSON file; {} where there is no file, or, unless `strict`, no object.

    Raises ConfigError of the setting `run` if it is strict and the file cannot be read.
    """
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise Unreadable("it holds no JSON object")
    except FileNotFoundError:
        return {}
    except Unreadable as error:
        if strict:
            raise refuse("run", f"cannot be read ({error})", given=str(path)) from error
        return {}
    return found


def number(value: Any) -> float | None:
    """A finite number as it is, None for anything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < LARGEST else None


# --- rows ----------------------------------------------------------------------------------------


def read_rows(path: Path | str) -> list[JSON]:
    """The rows of a metrics.jsonl; a last line that a killed run left half-written is skipped."""
    with open_file(Path(path)) as file:
        lines = list(iter(partial(file.readline, MOST_LINE), b""))
    rows = []
    for line_number, line in enumerate(lines, start=1):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif line.strip(b"\n") and line.endswith(b"\n"):
            raise ValueError(
                f"{path}, line {line_number}: not a row of metrics: {line[:60]!r}; "
                "delete this line."
            )
    return rows


def parse_row(line: bytes) -> JSON | None:
    """The row of metrics in a line: numbers, and None; None if it is no row."""
    try:
        row = parse_json(line)
    except Unreadable:
        return None
    if not isinstance(row, dict) or not _is_count(row.get("env_steps")):
        return None
    return {name: number(value) for name, value in row.items()}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


# --- processes and clocks ------------------------------------------------------------------------


def is_gone(status: Mapping[str, Any]) -> bool:
    """Says whether the process that wrote a status.json has ended, as far as one can tell here."""
    pid, host = status.get("pid"), status.get("host")
    if not isinstance(pid, int) or not _is_count(pid):
        return False
    return host in (None, platform.node()) and not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Says whether a process of this number runs here, and does more than wait for its end."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in (b"Z", b"X")


def age_s(status: Mapping[str, Any]) -> float | None:
    """Seconds since a status.json was written, by its own clock."""
    try:
        updated_s = datetime.fromisoformat(status["updated_at"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None
    return max(0.0, time.time() - updated_s)


def changed_at(path: Path) -> float:
    """Returns when a file was last written, in seconds since 1970; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
