"""Tests of what the terminal shows, on a real pseudo-terminal and elsewhere."""

import io
import itertools
import os
import pty
import subprocess
import sys
import time
from typing import Any

import pytest

from rlx.runs.metrics import Logging
from rlx.runs.progress import Progress, choose_mode, line, remaining

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"

ROW = {
    "env_steps": 2500,
    "updates": 40,
    "acting/env_steps_per_s": 1250.0,
    "learner/updates_per_s": 20.0,
    "train/return_mean": 12.5,
    "replay/fill": 0.25,
    "replay/ratio": 0.98,
    "weights/age_updates": 3.0,
    "time/acting": 0.71,
    "learner/loss": None,
}


def settings(console: Any, every_s: float = 0.0) -> Logging:
    return Logging(
        every_env_steps=1, every_s=None, window_episodes=1, tensorboard=False, wandb=None,
        console=console, console_every_s=every_s,
    )  # fmt: skip


def test_a_plain_line_tells_what_is_known() -> None:
    assert line(ROW, 10_000, 1250.0) == (
        "env steps 2,500/10,000 (25 %)  1,250 env steps/s  return 12.5  40 updates  "
        "20.0 updates/s  replay 25% full  ratio 0.98  weights 3 updates old  left 0:00:06"
    )
    assert line({"env_steps": 0, "updates": None}, 10, None) == "env steps 0/10 (0 %)  left ?"


def test_remaining_time() -> None:
    assert remaining(36_000_000, 1000.0) == "10:00:00"
    assert remaining(61, 1.0) == "0:01:01"
    assert remaining(-5, 1.0) == "0:00:00"
    assert remaining(5, 0.0) == "?"


def test_plain_shows_the_first_row_at_once_then_not_too_often_and_the_last() -> None:
    stream = io.StringIO()
    with Progress(100, settings("plain", every_s=0.1), stream) as progress:
        progress.update({"env_steps": 1})
        assert stream.getvalue().startswith("env steps 1/100")
        for n in range(2, 10):
            progress.update({"env_steps": n})
        assert stream.getvalue().count("\n") == 1
        time.sleep(0.12)
        progress.update({"env_steps": 10})
        assert stream.getvalue().count("\n") == 2
        progress.update({"env_steps": 11})
    shown = [text.split()[2] for text in stream.getvalue().splitlines()]
    assert shown == ["1/100", "10/100", "11/100"]
    assert "\x1b" not in stream.getvalue()


def test_off_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, settings("off")) as progress:
        progress.update(ROW)
    assert capsys.readouterr() == ("", "")


def test_auto_is_plain_where_no_terminal_is() -> None:
    assert choose_mode("auto", io.StringIO()) == "plain"
    assert choose_mode("rich", io.StringIO()) == "rich"


def test_rich_draws_a_block_and_gives_the_cursor_back_after_an_exception() -> None:
    stream = io.StringIO()

    def failing_run() -> None:
        with Progress(10_000, settings("rich"), stream) as progress:
            progress.update(ROW)
            assert SHOW not in stream.getvalue()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_run()
    for word in ("2,500/10,000", "25 %", "1,250 env steps/s", "20.0 updates/s", "return 12.5",
                 "replay 25% full", "ratio 0.98", "weights 3 updates old", "left 0:00:06",
                 "acting 71 % of the time", "acting.envs_per_actor"):  # fmt: skip
        assert word in stream.getvalue()
    assert stream.getvalue().rindex(SHOW) > stream.getvalue().rindex(HIDE)


def test_a_console_that_goes_away_never_stops_the_run() -> None:
    class Gone(io.StringIO):
        writes_left = 0
        error: type[OSError] = BrokenPipeError

        def write(self, text: str) -> int:
            self.writes_left -= 1
            if self.writes_left < 0:
                raise self.error
            return super().write(text)

    for mode, left, error in itertools.product(("plain", "rich"), range(3), (OSError, Gone.error)):
        stream = Gone()
        stream.writes_left, stream.error = left, error
        with Progress(10, settings(mode), stream) as progress:
            for n in range(4):
                progress._shown_at = None  # no waiting between two drawings
                progress.update({"env_steps": n})
            assert progress.mode == "off"
    closed = io.StringIO()
    with Progress(10, settings("plain"), closed) as progress:
        closed.close()
        progress.update({"env_steps": 1})


def test_showing_a_row_is_cheap() -> None:
    with Progress(10**6, settings("rich"), io.StringIO()) as progress:
        progress.update(ROW)
        begun = time.perf_counter()
        for _ in range(1000):
            progress.update(ROW)
        assert (time.perf_counter() - begun) / 1000 < 0.001


TERMINAL = """
import logging, sys, time
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="LOG %(message)s")
from rlx.runs.metrics import Logging
from rlx.runs.progress import Progress
settings = Logging(every_env_steps=1, every_s=None, window_episodes=1, tensorboard=False,
    wandb=None, console="auto",
                   console_every_s=10.0)
with Progress(100, settings) as progress:
    progress.update({"env_steps": 1})
    logging.info("hello")
    time.sleep(0.3)
    progress.update({"env_steps": 50})
    if "fail" in sys.argv:
        raise RuntimeError("boom")
logging.info("after")
print("given back:", logging.getLogger().handlers[0].stream is sys.__stdout__ is sys.stdout)
"""


def run_on_terminal(*arguments: str) -> str:
    """The text that the script writes to a real pseudo-terminal."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *arguments], stdout=theirs, stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        shown += data
    child.wait()
    os.close(ours)
    return shown.decode()


def test_on_a_terminal_auto_is_rich_and_log_lines_stay_above_the_block() -> None:
    text = run_on_terminal()
    assert text.index(HIDE) < text.index("1/100") < text.index("LOG hello")
    # The block is wiped before the log line and drawn again after it.
    after = text[text.index("LOG hello") :]
    assert "1/100 env steps" in after[: after.index("50/100")]
    assert text.rindex(SHOW) < text.index("LOG after")
    assert "given back: True" in text


def test_on_a_terminal_a_failing_run_gives_the_cursor_back() -> None:
    text = run_on_terminal("fail")
    assert "RuntimeError: boom" in text
    assert HIDE in text
    assert text.rindex(SHOW) < text.index("RuntimeError: boom")


def test_through_a_pipe_the_same_run_gives_plain_lines() -> None:
    text = subprocess.run(
        [sys.executable, "-c", TERMINAL], capture_output=True, text=True, check=True
    ).stdout
    assert "\x1b" not in text
    assert [t.split()[2] for t in text.splitlines() if t.startswith("env")] == ["1/100", "50/100"]
