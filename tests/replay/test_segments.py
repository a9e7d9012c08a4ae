"""Blocks in files: what is read is what was written, or the file is refused by name."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rlx.replay.files.segments import SegmentError, check_segment, read_segment, write_segment

ARRAYS = {
    "rows/inputs/observation/image": np.arange(240, dtype=np.uint8).reshape(2, 4, 30),
    "carry/core/h": np.ones((2, 3), ml_dtypes.bfloat16),
    "key": np.array([5, 6]),
}


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "some.npz"
    nbytes = write_segment(path, ARRAYS, {"kind": "snapshot", "lanes": 2})
    assert path.stat().st_size == nbytes
    assert [p.name for p in tmp_path.iterdir()] == ["some.npz"]
    check_segment(path, nbytes)
    arrays, about = read_segment(path)
    assert about["kind"] == "snapshot"
    assert about["lanes"] == 2
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert np.array_equal(arrays[name], array)
    assert np.array_equal(np.load(path)["key"], [5, 6])  # no rlx needed


@pytest.mark.parametrize("at", [0, 0.1, 0.5, 0.9])
def test_a_changed_byte_is_found(tmp_path, at):
    path = tmp_path / "some.npz"
    nbytes = write_segment(path, {"x": np.zeros(5000, np.uint8)}, {})
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 255
    path.write_bytes(data)
    with pytest.raises(SegmentError, match=r"some\.npz: .*damaged"):
        check_segment(path, nbytes)
    with pytest.raises(SegmentError, match=r"some\.npz: "):
        read_segment(path)


def test_a_file_cut_short_foreign_or_missing_is_refused_by_name(tmp_path):
    path = tmp_path / "some.npz"
    nbytes = write_segment(path, ARRAYS, {})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SegmentError, match=rf"damaged: {nbytes - 50} bytes, {nbytes} were written"):
        check_segment(path, nbytes)
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, x=np.zeros(3))
    with pytest.raises(SegmentError, match=r"foreign\.npz: no segment of rlx"):
        read_segment(foreign)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(SegmentError, match=r"text\.npz: no segment of rlx"):
        read_segment(tmp_path / "text.npz")
    for read in (read_segment, lambda p: check_segment(p, 3)):
        with pytest.raises(SegmentError, match=r"absent\.npz: missing"):
            read(tmp_path / "absent.npz")


def test_a_pipe_is_no_segment_whatever_its_size_is_said_to_be(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(SegmentError, match=r"pipe\.npz: damaged"):
        check_segment(tmp_path / "pipe.npz", 0)


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "later.npz"
    np.savez(path, about=np.array(json.dumps({"format": 99})))
    with pytest.raises(SegmentError, match="format 99, this rlx reads 1"):
        read_segment(path)


def member(path: Path, name: str, data: bytes, kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, data, kind)


@pytest.mark.parametrize("kind", ["bomb", "claim", "header", "magic", "dtypes", "about", "pipe"])
def test_nothing_inflates_and_no_header_is_believed(tmp_path, kind):
    path = tmp_path / "evil.npz"
    write_segment(path, {"x": np.zeros(1)}, {"dtypes": []} if kind == "dtypes" else {})
    head = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    claimed = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode()
    if kind == "bomb":  # 256 MiB in a quarter of a MiB
        member(path, "y.npy", bytes(1 << 28), zipfile.ZIP_DEFLATED)
    elif kind == "claim":
        member(path, "y.npy", claimed + bytes(8))
    elif kind == "header":
        member(path, "y.npy", claimed.replace(b"(1000000000000,)", b"[[[[[[[[[[[[[[[["))
    elif kind == "magic":
        member(path, "y.npy", b"")
    elif kind == "about":
        path.unlink()
        np.savez(path, about=np.array("[" * 50_000))
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    tracemalloc.start()
    with pytest.raises(SegmentError, match=r"evil\.npz: ") as refused:
        read_segment(path)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert "\n" not in str(refused.value)


def test_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "evil.npz"
    write_segment(path, {"x": np.zeros(1)}, {})
    np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
    with zipfile.ZipFile(path, "a") as file:
        file.write(tmp_path / "x.npy", "y.npy")
    with pytest.raises(SegmentError, match=r"evil\.npz: no segment of rlx"):
        read_segment(path)
    with pytest.raises(ValueError, match="Object arrays"):
        write_segment(tmp_path / "out.npz", {"x": np.array([{}], object)}, {})
    assert not (tmp_path / "out.npz").exists()
