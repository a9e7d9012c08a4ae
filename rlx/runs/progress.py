"""Shows a run while it works: a live block on a terminal, plain lines elsewhere, or nothing.

It draws when it is given a row and has no clock or thread of its own, so it costs a run next to
nothing. A console that goes away (a closed terminal, a broken pipe) never stops a run.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
from collections.abc import Mapping
from time import monotonic
from typing import Any, Literal, NoReturn, TextIO

from rlx.runs.metrics import TASK_RETURN, Logging, tasks_in
from rlx.runs.times import bottleneck

REDRAW_S = 0.25  # s: the live block is drawn at most so often; drawing takes about 2 ms
TASKS_SHOWN = 8
SMOOTHING = 0.7  # weight of the past in the rate that the remaining time is told from

Mode = Literal["rich", "plain", "off"]


class Progress:
    """Shows a run's rows. Use it in a `with` block, which gives the cursor back in any case."""

    def __init__(
        self, total_env_steps: int, settings: Logging, stream: TextIO | None = None
    ) -> None:
        """stream: None is the standard output of the moment when the first row comes."""
        self._total = total_env_steps
        self._every_s = settings.console_every_s
        self._stream = stream
        self.mode: Mode = choose_mode(settings.console, stream or sys.stdout)
        self._live: Any = None
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._shown_at: float | None = None  # monotonic seconds
        self._waiting: Mapping[str, Any] | None = None  # the last row, where it was not shown
        self._rate: float | None = None  # env steps per second, smoothed

    @property
    def is_due(self) -> bool:
        """Says whether `update` would show a row now."""
        if self.mode == "off" or self._shown_at is None:
            return self.mode != "off"
        every_s = REDRAW_S if self.mode == "rich" else self._every_s
        return monotonic() - self._shown_at >= every_s

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows a row of metrics: the first at once, later ones not too often."""
        if self.mode == "off":
            return
        self._smooth(row.get("acting/env_steps_per_s"))
        if not self.is_due:
            self._waiting = row
            return
        self._show(row)

    def close(self) -> None:
        """Shows the last row if it was held back, and gives the terminal back; safe to repeat."""
        if self._waiting is not None:
            self._show(self._waiting)
        self._stop_live()
        self.mode = "off"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _smooth(self, rate: float | None) -> None:
        if rate is not None:
            past = rate if self._rate is None else self._rate
            self._rate = SMOOTHING * past + (1 - SMOOTHING) * rate

    def _show(self, row: Mapping[str, Any]) -> None:
        self._waiting = None
        self._shown_at = monotonic()
        make = _block if self.mode == "rich" else line
        shown = make(row, self._total, self._rate)
        try:
            if self.mode == "rich":
                self._draw(shown)
            else:
                print(shown, file=self._stream, flush=True)
        except (OSError, ValueError):  # ValueError: the stream was closed, or cannot encode it
            self.mode = "off"
            self._stop_live()

    def _draw(self, block: Any) -> None:
        if self._live is None:
            self._start_live(block)
        else:
            self._live.update(block, refresh=True)

    def _start_live(self, block: Any) -> None:
        import rich
        from rich.console import Console
        from rich.live import Live

        # The shared console, so that a RichHandler's lines appear above the block, not in it.
        shared = self._stream is None
        console = rich.get_console() if shared else Console(file=self._stream, force_terminal=True)
        console.on_broken_pipe = _raise_again  # type: ignore[method-assign]
        self._live = Live(block, console=console, auto_refresh=False, redirect_stdout=shared)
        atexit.register(self._stop_live)
        before = (sys.stdout, sys.stderr)
        self._live.start(refresh=True)
        self._redirect_logs(before)

    def _redirect_logs(self, before: tuple[TextIO, TextIO]) -> None:
        """Gives log handlers, which hold an older stream, the one that knows of the block."""
        now = (sys.stdout, sys.stderr)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in before:
                old = handler.setStream(now[before.index(handler.stream)])
                self._redirected.append((handler, old))

    def _stop_live(self) -> None:
        live, self._live = self._live, None
        for handler, stream in self._redirected:
            if stream is not None:
                handler.setStream(stream)
        self._redirected.clear()
        if live is None:
            return
        atexit.unregister(self._stop_live)
        with contextlib.suppress(Exception):  # of a console that is gone nothing can be asked
            live.stop()


def _raise_again() -> NoReturn:
    """Raises a broken pipe's error again; rich itself would end the process."""
    raise  # the BrokenPipeError that is being handled


def choose_mode(console: Literal["auto", "rich", "plain", "off"], stream: TextIO) -> Mode:
    """Resolves `logging.console`: auto is rich on a terminal, plain where it is none."""
    if console != "auto":
        return console
    import rich.console

    found = rich.console.Console(file=stream)
    return "rich" if found.is_terminal and not found.is_dumb_terminal else "plain"


def line(row: Mapping[str, Any], total_env_steps: int, rate: float | None) -> str:
    """One plain line for a row; what is unknown is left out. `rate`: env steps per second."""
    env_steps = row["env_steps"]
    parts = [
        f"env steps {env_steps:,}/{total_env_steps:,} ({_percent(env_steps, total_env_steps)})",
        *_acting(row),
        *_tasks(row),
        *_learner(row),
        *_replay(row),
        f"left {remaining(total_env_steps - env_steps, rate)}",
    ]
    return "  ".join(parts)


def remaining(env_steps: int, rate: float | None) -> str:
    """The time that so many env steps take at `rate` per second, as h:mm:ss."""
    if not rate or rate <= 0:
        return "?"
    seconds = round(max(0, env_steps) / rate)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / max(whole, 1):.0f} %"


def _formatted(row: Mapping[str, Any], *formats: tuple[str, str]) -> list[str]:
    """The formatted values of those names that the row has."""
    return [text.format(row[name]) for name, text in formats if row.get(name) is not None]


def _acting(row: Mapping[str, Any]) -> list[str]:
    ready, wanted = row.get("acting/actors_ready"), row.get("acting/actors_wanted")
    actors = [] if wanted is None else [f"{ready:.0f}/{wanted:.0f} actors ready"]
    return actors + _formatted(
        row,
        ("acting/env_steps_per_s", "{:,.0f} env steps/s"),
        ("train/return_mean", "return {:.4g}"),
        ("evaluation/return_mean", "evaluation {:.4g}"),
    )


def _tasks(row: Mapping[str, Any]) -> list[str]:
    """The return of each task by the last part of its id, where a run has several."""
    found = tasks_in(row)
    shown = [
        f"{task.rpartition('/')[2]} {row[TASK_RETURN.replace('*', task)]:.4g}"
        for task in found[:TASKS_SHOWN]
        if row[TASK_RETURN.replace("*", task)] is not None
    ]
    return shown + ([f"and {len(found) - TASKS_SHOWN} more"] if len(found) > TASKS_SHOWN else [])


def _learner(row: Mapping[str, Any]) -> list[str]:
    return _formatted(
        row,
        ("updates", "{:,} updates"),
        ("learner/updates_per_s", "{:,.1f} updates/s"),
        ("learner/loss", "loss {:.3g}"),
    )


def _replay(row: Mapping[str, Any]) -> list[str]:
    return _formatted(
        row,
        ("replay/fill", "replay {:.0%} full"),
        ("replay/ratio", "ratio {:.2f}"),
        ("weights/age_updates", "weights {:.3g} updates old"),
        ("waiting_for", "learning waits for {}"),
    )


def _block(row: Mapping[str, Any], total_env_steps: int, rate: float | None) -> Any:
    """The live block, a rich renderable."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    env_steps = row["env_steps"]
    head = Table.grid(padding=(0, 1))
    head.add_row(
        ProgressBar(total=max(total_env_steps, 1), completed=env_steps, width=24),
        Text(f"{env_steps:,}/{total_env_steps:,} env steps"),
        Text(_percent(env_steps, total_env_steps), style="bold"),
        Text(f"left {remaining(total_env_steps - env_steps, rate)}"),
    )
    body = Table.grid(padding=(0, 2))
    for title, parts in (
        ("acting", _acting(row)),
        *([("tasks", tasks)] if (tasks := _tasks(row)) else []),
        ("learner", _learner(row)),
        ("replay", _replay(row)),
        ("time", [bottleneck(row)]),
    ):
        body.add_row(Text(title, style="cyan"), Text("  ".join(parts)))
    return Group(head, body)
