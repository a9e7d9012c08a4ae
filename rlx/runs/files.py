"""Files that are written whole: a reader, or a run after a kill, sees the old or the new one."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlx.problems import RunFailed, refuse

LOCK_FILE = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
LEAST_BYTES = 1 << 20  # with less a place counts as full


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file in one step: a reader, or a run after a kill, sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")  # what a kill leaves, the next write replaces
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path | str, value: Mapping[str, Any]) -> None:
    """Replaces a JSON file in one step; numbers that are not finite become null."""
    text = json.dumps(clean(value), indent=2, allow_nan=False)
    write_whole(Path(path), text.encode() + b"\n")


def as_float(value: Any) -> float:
    """The mean of an array's numbers; NaN of none."""
    array = np.asarray(value, dtype=np.float64)
    if array.size == 1:
        return float(array.item())  # a mean takes five times as long
    return float(array.mean()) if array.size else math.nan


def clean(value: Any) -> Any:
    """The value in JSON's types; numbers that are not finite become None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): clean(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [clean(child) for child in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    number = as_float(value)
    return number if math.isfinite(number) else None


@contextmanager
def full_disk_is_a_failure(folder: Path) -> Iterator[None]:
    """Raises RunFailed, of one line, where the disk has no room or is none any more."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        is_known = error.filename or error.errno != errno.ENOSPC
        full = str(folder) if is_known else _full_ones(folder)
        says = f"{full} cannot be written ({error.strerror}); make room there"
        raise RunFailed(says) from error


def _full_ones(folder: Path) -> str:
    """Names those of the places where a run writes that have no room: its folder, if none is full.

    An error of a lock between processes, which takes room in /dev/shm, names no file.
    """
    places = (folder, Path("/dev/shm"), Path(tempfile.gettempdir()))
    full = [str(place) for place in places if place.is_dir() and _free_bytes(place) < LEAST_BYTES]
    return " and ".join(full) or str(folder)


def _free_bytes(folder: Path) -> int:
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize


@contextmanager
def only_one(folder: Path, key: str = "output_dir", name: str = LOCK_FILE) -> Iterator[None]:
    """Holds the folder's lock, which the system frees however a process ends.

    key: the setting that a ConfigError names where another process holds it.
    """
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            says = "another process is at work in it; wait for its end, or give another folder"
            raise refuse(key, says, given=str(folder)) from error
        yield
