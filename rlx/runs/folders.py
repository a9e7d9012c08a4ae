"""The one reader of run folders: where runs are, their settings now, states, rows and summaries.

Results, watch, diff, sweeps, `rlx.load` and resume ask here, so that they agree. The module loads
neither pandas nor JAX, and it reads only: what a file holds is data.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rlx.config.moved import renewed
from rlx.problems import refuse
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
CHOICES = "hydra.runtime.choices."  # begins the names of group choices in hydra.yaml

LOADER: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
LOADER.add_implicit_resolver(  # 1e-3 is a number, as for Hydra; of YAML 1.1 it is a word
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    [*"-+.0123456789"],
)
YAML_ERRORS = (OSError, ValueError, RecursionError, yaml.YAMLError)


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
    return [(int(end) if _is_number(end) else -1, part) for part, end in ends]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def find_run(path: Path | str, key: str = "resume") -> Path:
    """The folder of a run with settings; ConfigError (of the setting `key`) if there is none."""
    if not os.path.isfile(Path(path) / HYDRA / CONFIG):
        says = "no run is there (no .hydra/config.yaml); give the folder of one, as under outputs/"
        raise refuse(key, says, given=str(path))
    return Path(path)


def is_used(folder: Path) -> bool:
    """Whether a run has begun in that folder."""
    return (folder / ENV_FILE).exists()


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder has any checkpoint."""
    return newest_checkpoint(folder) is not None


def newest_checkpoint(folder: Path) -> int | None:
    """The env steps of a run's newest checkpoint; None if it has none."""
    found = (folder / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in found if _is_number(path.name)), default=None)


# --- settings ------------------------------------------------------------------------------------


def resumes(folder: Path) -> list[Path]:
    """The folders of the settings of a run's resumes, the newest last."""
    found = (folder / HYDRA).glob(f"{RESUME}[0-9]*")
    numbered = [path for path in found if _is_number(path.name.removeprefix(RESUME))]
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
        return parse_settings(path.read_bytes(), resolve=resolve)
    except YAML_ERRORS as error:
        says = f"cannot be read ({_first_line(error)}); restore the file"
        raise refuse(key, says, given=str(path)) from error


def parse_settings(data: bytes, *, resolve: bool = True) -> JSON:
    """The settings in the bytes of a config.yaml; raises one of YAML_ERRORS."""
    tree = load_yaml(data)
    if not isinstance(tree, Mapping):
        raise ValueError("it holds no settings")
    return renewed(_resolved(tree) if resolve and b"${" in data else tree)


def _resolved(tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found: Any = OmegaConf.to_container(OmegaConf.create(dict(tree)), resolve=True)
    except OmegaConfBaseException:  # of Hydra's own section, which is not in the file
        return tree
    return found if isinstance(found, Mapping) else tree


def load_yaml(data: bytes) -> Any:
    """YAML of plain values; raises one of YAML_ERRORS."""
    return yaml.load(data, LOADER)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
        return self._read(self.path / STATUS_FILE, json.loads, dict)

    @property
    def summary(self) -> JSON:
        """The content of summary.json: the run's results."""
        return self._read(self.path / SUMMARY_FILE, json.loads, dict)

    @property
    def settings(self) -> JSON:
        """The newest settings, nested; see `settings_now`, which raises if they cannot be read."""
        return self._read(config_file(self.path), parse_settings, dict)

    @property
    def evaluations(self) -> list[JSON]:
        """The evaluations in evaluation.json by the run's own protocol, the newest last."""
        found = self._read(self.path / EVALUATION_FILE, json.loads, dict).get("evaluations")
        entries = [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []
        newest = newest_checkpoint(self.path)
        return [e for e in entries if not differences(e, self.settings, newest)]

    @property
    def choices(self) -> dict[str, str]:
        """Group -> the YAML chosen for it, where Hydra wrote it down."""
        about = flat(self._read(self.path / HYDRA / "hydra.yaml", load_yaml, dict))
        named = {k.removeprefix(CHOICES): v for k, v in about.items() if k.startswith(CHOICES)}
        return {k: str(v) for k, v in named.items() if not k.startswith("hydra/")}

    @property
    def overrides(self) -> list[str]:
        """Returns what the command lines of start and resumes said; the newest of each key."""
        found: dict[str, str] = {}
        for folder in (self.path / HYDRA, *resumes(self.path)):
            for text in map(str, self._read(folder / OVERRIDES, load_yaml, list)):
                found[text.partition("=")[0].lstrip("+~")] = text
        return [text for key, text in found.items() if key != "resume"]

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
            return state, str(status.get("error") or "")
        pid, host, age = status.get("pid"), status.get("host"), age_s(status)
        if is_gone(status):
            return "died", f"process {pid} is gone; resume={self.path} goes on"
        if age is not None and age > SILENT_S:
            where = "" if host in (None, platform.node()) else f" on {host}"
            return "silent", f"process {pid}{where} told nothing for {age / 60:.0f} minutes"
        return state, ""

    def _read(self, path: Path, parse: Callable[[bytes], Any], kind: type[Kind]) -> Kind:
        try:
            found = path.stat()
            stamp, known = (found.st_mtime_ns, found.st_size), self._files.get(path)
            if known is None or known[0] != stamp:
                self._files[path] = known = (stamp, parse(path.read_bytes()))
        except YAML_ERRORS:
            return kind()
        return known[1] if isinstance(known[1], kind) else kind()


def read_object(path: Path, *, strict: bool = False) -> JSON:
    """The object in a JSON file; {} where there is no file, or, unless `strict`, no object.

    Raises ConfigError of the setting `run` if it is strict and the file cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if strict:
            raise refuse("run", f"cannot be read ({error})", given=str(path)) from error
        return {}
    return found


def number(value: Any) -> float | None:
    """A finite number as it is, None for anything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


# --- rows ----------------------------------------------------------------------------------------


def read_rows(path: Path | str) -> list[JSON]:
    """The rows of a metrics.jsonl; a last line that a killed run left half-written is skipped."""
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for line_number, line in enumerate(lines, start=1):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif line and line_number < len(lines):
            raise ValueError(
                f"{path}, line {line_number}: not a row of metrics: {line[:60]!r}; "
                "delete this line."
            )
    return rows


def parse_row(line: bytes) -> JSON | None:
    """The row of metrics in a line; None if it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("env_steps"), int) else None


# --- processes and clocks ------------------------------------------------------------------------


def is_gone(status: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a status.json has ended, as far as this machine can tell."""
    pid, host = status.get("pid"), status.get("host")
    return isinstance(pid, int) and host in (None, platform.node()) and not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs here, and does more than wait for its end."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")


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
