"""Keeps compiled programs from one start to the next, in a folder of the user.

JAX does the keeping, and finds a program by its text, by its own version and by XLA's flags.
Programs depend on the CPU and on the number of threads as well: a machine with other instructions
would stop at one, and other threads add numbers up in another order. So each kind of machine has a
folder of its own, also where several share a home directory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 30  # of all folders together; the programs that were used last stay
PROGRAMS = "*-cache"  # JAX's names for them; its other files are not ours to judge
CHECKED = ".checked"  # its time: up to it all programs of a folder were found whole
ZSTD = b"\x28\xb5\x2f\xfd"  # how a file in that format begins


def keep(wanted: bool = True) -> None:
    """Lets JAX keep the programs that this process compiles, and find those of earlier ones.

    Call it before the first program and after the process was bound to its cores. A folder that
    the user gave JAX is used as it is. Where none can be had, that is logged, and nothing is kept.
    wanted: False lets JAX compile each program anew.
    """
    given = _folder_in_use()
    if given is not None and not Path(given).is_relative_to(base_folder()):
        return
    found = _opened() if wanted else None
    if found == given:
        return
    import jax  # only here: processes that do without JAX import what imports this
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", found)
    # Programs that take no time to compile are many: together they take as long as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # which JAX opens once, with the first program


def is_kept() -> bool:
    """Says whether this process keeps its programs."""
    return _folder_in_use() is not None


def _folder_in_use() -> str | None:
    import jax

    found: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return found


def _opened() -> str | None:
    """The folder for this process's programs, in good order; None if it cannot be had."""
    try:
        found = own_folder(base_folder(), machine_kind())
        remove_broken(found)
        remove_oldest(base_folder(), MOST_BYTES)
    except OSError as error:
        log.warning("compiled programs are not kept: %s", error)
        return None
    return str(found)


def base_folder() -> Path:
    """Names the folder with a folder for each kind of machine: $XDG_CACHE_HOME/rlx/xla."""
    given = os.environ.get("XDG_CACHE_HOME", "")  # its specification says to ignore relative paths
    base = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    return Path(base) / "rlx" / "xla"


def machine_kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Names what a program for the CPU depends on: its instructions, and XLA's threads."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = [f"model name: {platform.processor()}"]
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features")
    about = sorted({line for line in lines if line.partition(":")[0].strip() in names})
    digest = hashlib.sha256("\n".join([platform.machine(), *about]).encode()).hexdigest()
    return f"{digest[:16]}-{_threads()}"


def _threads() -> str:
    """The number of XLA's threads, as XLA counts them."""
    if given := os.environ.get("NPROC"):
        return given
    return str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def own_folder(base: Path, kind: str) -> Path:
    """Makes a folder that nobody else may write into: who writes programs there runs them here."""
    folder = base / kind
    for path in (base, folder):  # one by one: parents get the mode that the umask leaves them
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            says = f"{path} must be this user's, and nobody else's to write; chmod go-w it"
            raise PermissionError(says)
    return folder


def remove_broken(folder: Path) -> None:
    """Removes the new programs that are cut short: by a kill, or on a full disk.

    JAX would complain of such a file at each start and never write it anew.
    """
    stamp, begun = folder / CHECKED, folder / f"{CHECKED}-{os.getpid()}"
    since = stamp.stat().st_mtime_ns if stamp.exists() else 0
    begun.touch()
    for path, found in _programs(folder):
        if found.st_mtime_ns >= since and _is_cut_short(path):
            path.unlink(missing_ok=True)
    begun.replace(stamp)  # only now, and with the time of the beginning: a kill leaves the old one


def _is_cut_short(path: Path) -> bool:
    """Says so of a program that is surely broken: not of one that cannot be read."""
    try:
        data = path.read_bytes()
        if not data.startswith(ZSTD):
            return _fails(zlib.decompress, data, zlib.error)
        zstandard = import_module("zstandard")  # JAX writes so where it is installed
    except (OSError, ImportError):
        return False  # another process has removed it, or only others read this format
    return _fails(zstandard.ZstdDecompressor().decompress, data, zstandard.ZstdError)


def _fails(decompress: Callable[[bytes], bytes], data: bytes, error: type[Exception]) -> bool:
    try:
        decompress(data)
    except error:
        return True
    return False


def remove_oldest(base: Path, most_bytes: int) -> None:
    """Removes the programs that were longest unused, until the rest is small enough."""
    total = 0
    for path, found in sorted(_programs(base), key=lambda file: -_used_ns(file[1])):
        total += found.st_size
        if total > most_bytes:
            path.unlink(missing_ok=True)


def _used_ns(found: os.stat_result) -> int:
    return max(found.st_atime_ns, found.st_mtime_ns)  # not every file system notes the reading


def _programs(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.rglob(PROGRAMS):
        with suppress(FileNotFoundError):  # another process has removed it
            if path.is_file():
                yield path, path.stat()
