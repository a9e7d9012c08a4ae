"""Blocks in files: the one format of a replay's snapshots and of recorded experience.

A segment is a .npz file, which `np.load` opens: a zip of one array [M, ...] per leaf for M blocks,
each with its checksum, and `about`, a JSON object as text. Written whole, then renamed; no pickle.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
ABOUT = "about"
SEGMENT_BYTES = 64 << 20  # about as large as one file gets

JSON = dict[str, Any]


class SegmentError(RuntimeError):
    """A file that is no segment, or not the one that was written; names it and says why."""


def write_segment(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> int:
    """Writes one segment; answers the bytes of its file."""
    named = {name: x.dtype.name for name, x in arrays.items() if _is_nameless(x.dtype)}
    text = json.dumps({"format": FORMAT, "dtypes": named, **about}, sort_keys=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            members: dict[str, Any] = {ABOUT: np.array(text), **arrays}
            np.savez(file, allow_pickle=False, **members)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # its name, too
        finally:
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path.stat().st_size


def read_segment(path: Path) -> tuple[dict[str, np.ndarray], JSON]:
    """(arrays, about) of a segment; raises SegmentError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = _checked_about(path, json.loads(str(file[ABOUT])))
            arrays = {name: file[name] for name in file.files if name != ABOUT}
    except FileNotFoundError:
        raise SegmentError(f"{path}: missing.") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        line = " ".join(str(error).split())[:100]
        raise SegmentError(f"{path}: no segment of rlx, or a damaged one ({line}).") from error
    return {name: _as_named(x, about["dtypes"].get(name)) for name, x in arrays.items()}, about


def check_segment(path: Path, nbytes: int) -> None:
    """Reads all of a file against its checksums; raises SegmentError if it is not whole."""
    try:
        size = path.stat().st_size
        if size != nbytes:
            raise SegmentError(f"{path}: damaged: {size} bytes, {nbytes} were written.")
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except FileNotFoundError:
        raise SegmentError(f"{path}: missing.") from None
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise SegmentError(f"{path}: damaged ({error}).") from error
    if damaged is not None:
        raise SegmentError(f"{path}: damaged: {damaged} is not what was written.")


def _checked_about(path: Path, about: Any) -> JSON:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise SegmentError(f"{path}: format {found}, this rlx reads {FORMAT}.")
    return about


def _is_nameless(dtype: np.dtype[Any]) -> bool:
    """bfloat16 and its like, which .npy files store as nameless bytes."""
    return dtype.kind == "V" and dtype.names is None


def _as_named(array: np.ndarray, name: str | None) -> np.ndarray:
    if name is None:
        return array
    import ml_dtypes  # noqa: F401  registers the names of bfloat16 and its like

    return array.view(np.dtype(name))
