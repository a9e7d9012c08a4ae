"""Arrays in files: of a replay's snapshots, of recorded experience and of the training state.

A segment is a .npz file, which `np.load` opens: a zip of one array for each leaf (of M blocks
[M, ...]), each with its checksum, and `about`, a JSON object as text. It is written whole, then
renamed; no pickle.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlx.config.documents import open_file, parse_json
from rlx.problems import first_line
from rlx.types import ArraySpec

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


def read_segment(
    path: Path, check: Callable[[Mapping[str, ArraySpec]], None] | None = None
) -> tuple[dict[str, np.ndarray], JSON]:
    """(arrays, about) of a segment; raises SegmentError for any other file.

    check: is told what each array is before any of them is read, and raises ValueError for what is
    not expected. An array is never larger than its part of the file.
    """
    try:
        with open_file(path) as raw, zipfile.ZipFile(raw) as file:
            parts = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            about = _checked_about(path, parse_json(str(_read_part(file, parts.pop(ABOUT)))))
            named = about["dtypes"]
            if check is not None:
                check({name: _spec(file, info, named.get(name)) for name, info in parts.items()})
            arrays = {name: _read_part(file, info) for name, info in parts.items()}
            return {name: _as_named(x, named.get(name)) for name, x in arrays.items()}, about
    except FileNotFoundError:
        raise SegmentError(f"{path}: missing.") from None
    except SegmentError:
        raise
    except Exception as error:  # zipfile and NumPy raise anything at files of any kind
        line = " ".join(str(error).split())[:160]
        raise SegmentError(f"{path}: no segment of rlx, or a damaged one ({line}).") from error


def _read_part(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    _header(file, info)
    with file.open(info) as part:
        return np.lib.format.read_array(part, allow_pickle=False)


def _spec(file: zipfile.ZipFile, info: zipfile.ZipInfo, named: str | None) -> ArraySpec:
    shape, dtype = _header(file, info)
    return ArraySpec(shape=shape, dtype=named or dtype.name)


def _header(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of an array that lies in the file as it is; raises ValueError for another."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{info.filename} is compressed, which rlx never does")
    with file.open(info) as part:
        if np.lib.format.read_magic(part) != (1, 0):
            raise ValueError(f"{info.filename} has a header that rlx never writes")
        shape, _, dtype = np.lib.format.read_array_header_1_0(part)
        if math.prod(shape) * dtype.itemsize != info.file_size - part.tell():
            raise ValueError(f"{info.filename} has not the bytes of {dtype}{list(shape)}")
    return shape, dtype


def check_segment(path: Path, nbytes: int) -> None:
    """Reads all of a file against its checksums; raises SegmentError if it is not whole."""
    try:
        size = path.stat().st_size
        if size != nbytes:
            raise SegmentError(f"{path}: damaged: {size} bytes, {nbytes} were written.")
        with open_file(path) as raw, zipfile.ZipFile(raw) as file:
            damaged = file.testzip()
    except FileNotFoundError:
        raise SegmentError(f"{path}: missing.") from None
    except SegmentError:
        raise
    except Exception as error:  # zipfile and NumPy raise anything at files of any kind
        raise SegmentError(f"{path}: damaged ({first_line(error)}).") from error
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
