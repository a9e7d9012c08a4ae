"""A million Atari rows: saved, killed while saving again, restored row by row (-m slow)."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_streams import ATARI_CARRY, ATARI_ROW, ATARI_SEQUENCE, IN_MEMORY, making, rollout

from rlx.replay.files.snapshots import Snapshots, read_blocks
from rlx.replay.uniform import Uniform

ROWS, LANES, AT_ONCE = 1_000_000, 64, 64


def make() -> Uniform:
    return making(
        Uniform,
        capacity=ROWS,
        ratio=None,
        min_sequences=1,
        sequence=ATARI_SEQUENCE,
        row_spec=ATARI_ROW,
        carry_spec=ATARI_CARRY,
        lanes=LANES,
        seed=0,
        **IN_MEMORY,
    )


def add(replay: Uniform, first: int) -> None:
    """One block of each lane, whose rows tell what they are."""
    replay.add(rollout([(lane, 0, first) for lane in range(LANES)], ATARI_SEQUENCE,
                       rows=ATARI_ROW, carry=ATARI_CARRY))  # fmt: skip


def save(folder: Path) -> None:
    """Fills, saves, goes on, and is killed while it saves again."""
    replay, keeper = make(), Snapshots(folder / "segments")
    rounds = ROWS // ATARI_SEQUENCE.block_rows // LANES
    for number in range(rounds):
        add(replay, number)
    began = time.monotonic()
    segments = keeper.complete(replay)
    seconds = time.monotonic() - began
    state = replay.state()
    arrays = {name: x for name, x in state.items() if isinstance(x, np.ndarray)}
    np.savez(folder / "tables.npz", **arrays)
    about = {name: x for name, x in state.items() if name not in arrays}
    saved = {"segments": segments, "state": about, "seconds": seconds}
    (folder / "saved.json").write_text(json.dumps(saved))
    for number in range(rounds, rounds + 40):
        add(replay, number)
    keeper.write_ahead(replay)
    before = len(segments)
    while len(list((folder / "segments").glob("[0-9]*.npz"))) < before + 3:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def restore(folder: Path) -> None:
    """Restores a snapshot in a process of its own, whose memory is looked at."""
    saved = json.loads((folder / "saved.json").read_text())
    state: dict[str, Any] = saved["state"] | dict(np.load(folder / "tables.npz"))
    replay, empty = make(), peak_bytes()
    began = time.monotonic()
    replay.restore(state, read_blocks(folder / "segments", saved["segments"]))
    seconds = time.monotonic() - began
    beside = peak_bytes() - empty - replay.nbytes
    assert replay.rows == ROWS // (40 * LANES) * 40 * LANES
    checked, key, (ring,) = 0, -1, replay.rings
    while True:
        blocks, last = ring.blocks_after(key, 64)
        if last == key:
            break
        number = blocks.keys // LANES
        time_ = number[:, None] * 40 + np.arange(40)
        assert (blocks.leaves["rows/inputs/time"] == time_).all()
        assert (blocks.leaves["rows/action"] == (blocks.keys % LANES)[:, None]).all()
        image = blocks.leaves["rows/inputs/observation/image"]
        assert (image == (time_ % 251)[:, :, None, None]).all()
        assert (blocks.leaves["carry/core/0"][:, 0] == number * 40).all()
        checked, key = checked + len(blocks.keys) * 40, last
    nbytes = sum(segment["nbytes"] for segment in saved["segments"])
    rates = nbytes / 1e6 / saved["seconds"], nbytes / 1e6 / seconds
    print(f"{checked:,} rows checked; {nbytes / 1e9:.2f} GB saved at {rates[0]:.0f} MB/s, "
          f"restored at {rates[1]:.0f} MB/s; peak {beside / 1e6:.0f} MB beside it")  # fmt: skip
    assert checked == replay.rows
    assert beside < 400e6


@pytest.mark.slow
def test_a_million_rows_survive_a_kill_in_the_middle_of_the_next_snapshot(tmp_path):
    def child(what: str) -> int:
        code = f"import test_large_snapshot as t; t.{what}(t.Path({str(tmp_path)!r}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False)
        return done.returncode

    assert child("save") == -signal.SIGKILL
    assert len(list((tmp_path / "segments").iterdir())) >= 3 + len(
        json.loads((tmp_path / "saved.json").read_text())["segments"]
    )
    assert child("restore") == 0
