"""The memory that this process may still use, and the pages that it comes in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"


def begin_with_huge_pages() -> None:
    """Begins this command anew, as the same process, so that its memory comes in huge pages.

    XLA takes the memory of an update anew each time, page by page: an update of Atari's networks
    takes a tenth less with pages of 2 MB (experiments/benchmarks/learner.md). glibc reads the
    variable before Python begins. Call it before anything else is done.
    """
    environ = with_huge_pages(os.environ)
    if environ is not None and sys.executable:
        with suppress(OSError):  # it goes on as it is
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


def with_huge_pages(environ: Mapping[str, str], root: Path = Path("/")) -> dict[str, str] | None:
    """The environment in which malloc asks for huge pages.

    None where a process need not begin anew: it has the variable, whatever it says of them, or its
    glibc or kernel gives none to those who ask.
    """
    given = environ.get(TUNABLES, "")
    modes = "".join(_lines(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    if HUGE_PAGES in given or "[madvise]" not in modes or _glibc() < (2, 35):
        return None
    return {**environ, TUNABLES: ":".join(filter(None, (given, f"{HUGE_PAGES}=1")))}


def _glibc() -> tuple[int, ...]:
    """The version of glibc; (0,) where there is another library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else (0,)
    except (ValueError, OSError, AttributeError):  # AttributeError: on Windows
        return (0,)


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes this process may still take: MemAvailable or what its cgroups (v1, v2) leave.

    The smallest of those that can be read under `root`; sys.maxsize if none can.
    """
    meminfo = _named_numbers(root / "proc/meminfo").get("MemAvailable:")
    found = [] if meminfo is None else [meminfo * 1024]
    return min(found + list(_cgroup_headrooms(root)), default=sys.maxsize)


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """Bytes left in each cgroup above this process that has a limit."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            yield from _headroom((root / base).joinpath(*parts[:depth]), *names)


def _headroom(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    limit, usage = _lines(folder / limit_name), _lines(folder / usage_name)
    if limit and usage and limit[0].isdigit():
        cache = _named_numbers(folder / "memory.stat").get(cache_name, 0)  # given back on demand
        yield max(0, int(limit[0]) - int(usage[0]) + cache)


def _named_numbers(path: Path) -> dict[str, int]:
    """Lines of `name number ...`."""
    words = [line.split() for line in _lines(path)]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
