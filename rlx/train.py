"""Trains: `python -m rlx.train acting=ray_pool acting.instances=128`.

Compose, check, run. Everything here is about the command line; the training loop is
`rlx.training.loop.train`, and `rlx.run(rlx.compose([...]))` does the same from Python.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlx import api
from rlx.config import composing, paths
from rlx.config.build import ROLES, check, plain, remember
from rlx.config.marks import anchored, marked, refuse_modules
from rlx.problems import ConfigError, Problem, RunFailed, first_line, refuse, show
from rlx.runs.files import write_whole
from rlx.runs.folders import (
    CONFIG,
    HYDRA,
    RESUME,
    config_file,
    find_run,
    has_checkpoint,
    is_used,
    next_resume,
    settings_now,
)
from rlx.types import IsPath

RENEWED = "renewed"  # in .hydra: a copy of the settings that Hydra reads at a resume
ROOM_BYTES = 128 << 10  # more than a start writes before the first checkpoint
VERSION = {"execution_whitelist": ("rlx.*",)} if composing.HYDRA_14 else composing.VERSION


def main() -> None:
    """The console script `rlx-train`."""
    try:
        sys.argv[1:] = prepare(sys.argv[1:])
    except ConfigError as error:
        _leave(error)
    try:
        hydra.main(config_path=str(paths.config_dir()), config_name="config", **VERSION)(job)()
    except KeyboardInterrupt:
        print("rlx: interrupted", file=sys.stderr)
        sys.exit(130)


def job(cfg: DictConfig) -> Any:
    """One run, in the folder that Hydra made for it."""
    running: Any = HydraConfig.get()
    main_dir = next(s.path for s in running.runtime.config_sources if s.provider == "main")
    overrides = [*_searchpath(running), *running.overrides.task]
    sources = composing.find_sources(overrides, running.job.config_name, main_dir)
    try:
        began_in, folder = running.runtime.cwd, running.runtime.output_dir
        summary = api.run(remember(cfg, sources), folder, began_in=began_in)
    except (ConfigError, RunFailed) as error:
        if isinstance(error, ConfigError) and str(running.output_subdir).startswith(
            f"{HYDRA}/{RESUME}"
        ):
            # Nothing began with these settings, so nobody shall read them as the run's.
            shutil.rmtree(Path(running.runtime.output_dir) / running.output_subdir)
        if running.mode == RunMode.MULTIRUN or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise  # the sweep's other jobs go on
        if isinstance(error, ConfigError):
            _leave(error)
        print(f"rlx: {error}", file=sys.stderr)
        if has_checkpoint(Path(running.runtime.output_dir)):
            says = f"resume={running.runtime.output_dir} goes on from the last checkpoint"
            print(f"rlx: {says}", file=sys.stderr)
        sys.exit(1)
    if running.mode == RunMode.MULTIRUN and summary.get("state") == "interrupted":
        raise KeyboardInterrupt  # which was meant for the sweep
    return summary


def prepare(argv: list[str]) -> list[str]:
    """Checks a single run before Hydra starts it, and rewrites `resume=DIR` for Hydra."""
    args = get_args_parser().parse_args(argv)
    if args.experimental_rerun:
        raise refuse("--experimental-rerun", "reads a pickle; write resume=DIR instead")
    if args.config_path and not Path(args.config_path).is_absolute():
        says = "give an absolute path; or --config-dir, which adds a folder to rlx's own"
        raise refuse("--config-path", says, given=args.config_path)
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return argv
    resumed, given = _resumed(args.overrides), args.overrides
    if resumed is not None:
        argv = _resume_argv(resumed, args)
        args = get_args_parser().parse_args(argv)
    if sys.stderr.isatty():  # a second or two; elsewhere stderr has what went wrong, and that alone
        print("rlx: composing and checking the settings", file=sys.stderr)
    name = args.config_name or "config"
    where = {"config_dir": args.config_path, "extra_dir": args.config_dir, "keep_hydra": True}
    if args.multirun or "hydra.mode=MULTIRUN" in args.overrides:
        composing.check_sweep(args.overrides, name, **where)
        return argv
    cfg = composing.compose(args.overrides, name, **where)
    folder = _output(cfg)
    if cfg.hydra.mode == RunMode.MULTIRUN:  # as an experiment of sweeps/ says
        return argv
    if resumed is not None:
        named = {text.partition("=")[0].lstrip("+") for text in given}
        refuse_modules(plain(cfg), str(config_file(resumed)), named)
    check(cfg)
    if cfg.resume is None:
        api.refuse_used(folder)
    _make_output(folder, "hydra.run.dir" if cfg.resume in (None, "auto") else "resume")
    more = _whole_paths(plain(cfg))
    if cfg.resume == "auto" and is_used(folder):  # its own settings are kept as they were
        more.append(_resume_subdir(folder))
    if not more or not args.overrides:
        return [*argv, *more]
    at = len(argv) - argv[::-1].index(args.overrides[-1])  # Hydra's own options may follow
    return [*argv[:at], *more, *argv[at:]]


def _whole_paths(settings: Mapping[str, Any]) -> list[str]:
    """The overrides that make relative paths whole: Hydra saves what the command line says."""
    found = zip(marked(settings, IsPath), marked(anchored(settings, "."), IsPath), strict=True)
    return [
        f"{now.path}={composing.quote(now.node[now.name])}"
        for before, now in found
        if before.node[before.name] != now.node[now.name]
    ]


def _output(cfg: DictConfig) -> Path:
    """The folder of a single run, which Hydra's section names."""
    try:
        found = cfg.hydra.run.dir, cfg.hydra.output_subdir, cfg.hydra.job.name
    except OmegaConfBaseException as error:
        raise refuse(str(error.full_key), first_line(error)) from error
    if not isinstance(found[0], str) or not found[0]:
        raise refuse("hydra.run.dir", "accepted: a folder", given=show(found[0]))
    try:
        os.stat(found[0])
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # it is made, or what is in the way is named
    except (OSError, ValueError) as error:
        says = f"no folder can be named so ({first_line(error).partition(':')[0]}); give another"
        raise refuse("hydra.run.dir", says, given=found[0]) from error
    return Path(found[0])


def _make_output(folder: Path, key: str) -> None:
    """Refuses a folder that cannot be made or written into, before Hydra tries to."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        says = f"cannot be made: {existing} is not a folder that can be written; give another"
        raise refuse(key, says, given=str(folder))
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".room-") as file:
            file.write(bytes(ROOM_BYTES))
        if is_new:  # Hydra makes its own: its name tells the microsecond, and that is a later one
            folder.rmdir()
    except (OSError, ValueError) as error:  # as under /proc, where root seems to be allowed
        says = (
            f"cannot be made or written ({getattr(error, 'strerror', None) or first_line(error)}); "
        )
        says += "give another" if key != "resume" else "make room, then resume again"
        raise refuse(key, says, given=str(folder)) from error


# --- resume --------------------------------------------------------------------------------------


def _resumed(overrides: list[str]) -> Path | None:
    """The run that `resume=DIR` names; None for `resume=auto` and for none."""
    for text in overrides:
        if text.partition("=")[0].lstrip("+") == "resume":
            try:
                given = OverridesParser.create().parse_override(text).value()
            except HydraException:
                return None  # composing will say what is wrong with it
            return None if given in (None, "auto") else find_run(str(given)).resolve()
    return None


def _resume_argv(folder: Path, args: Any) -> list[str]:
    """The command line that continues a run: its own configuration, its own folder."""
    if args.multirun or args.config_path or args.config_name or args.config_dir:
        says = "continues one run with its own configuration; leave -m and --config-* out"
        raise refuse("resume", says, given=str(folder))
    names = (text.partition("=") for text in args.overrides)
    groups = {key: value for key, _, value in names if key.lstrip("+~") in (*ROLES, "experiment")}
    if groups:
        says = "a resumed run keeps its groups, its checkpoint was made with them; change single "
        says += "values (total_env_steps=2_000_000), or start a new run"
        source = composing.COMMAND_LINE
        raise ConfigError(
            [Problem(path=k, given=v, source=source, says=says) for k, v in groups.items()]
        )
    values = [text for text in args.overrides if text.partition("=")[0].lstrip("+") != "resume"]
    return [
        *("--config-path", str(_settings(folder)), "--config-name", "config"),
        composing.search(paths.config_dir()),
        "hydra/job_logging=rlx",
        f"hydra.run.dir={composing.quote(str(folder))}",
        _resume_subdir(folder),
        f"resume={composing.quote(str(folder))}",
        *values,
    ]


def _settings(folder: Path) -> Path:
    """A folder for Hydra that holds a run's settings, as today's rlx writes them, and nothing else.

    The run's own folder may hold groups of Hydra, and its settings a section of Hydra's, which
    can start programs; nothing of either is read.
    """
    now = settings_now(folder, "resume", resolve=False)
    if "defaults" in now:
        says = "names groups, as settings of a run do not; restore the file"
        raise refuse("resume", says, given=str(config_file(folder)))
    try:
        OmegaConf.resolve(OmegaConf.create(now))
    except OmegaConfBaseException:  # it refers to settings by what they were called
        now = settings_now(folder, "resume")
    found = folder / HYDRA / RENEWED
    try:
        shutil.rmtree(found, ignore_errors=True)
        found.mkdir()
        write_whole(found / CONFIG, OmegaConf.to_yaml(OmegaConf.create(now)).encode())
    except OSError as error:
        says = f"cannot be written ({error.strerror}); make room, then resume again"
        raise refuse("resume", says, given=str(found)) from error
    return found


def _resume_subdir(folder: Path) -> str:
    """Names the folder in which Hydra shall write the settings of the next resume."""
    return f"hydra.output_subdir={next_resume(folder).relative_to(folder)}"


def _searchpath(running: DictConfig) -> list[str]:
    """Hydra's further search folders, as `find_sources` takes them."""
    sources = running.runtime.config_sources
    more = [s.path for s in sources if s.schema == "file" and s.provider != "main"]
    return [composing.search(*more)] if more else []


def _leave(error: ConfigError) -> NoReturn:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    for problem in error.problems:
        print(f"rlx: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
