"""Ctrl-C and SIGTERM: how a run, or a sweep of runs, is stopped."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

log = logging.getLogger(__name__)

TOGETHER_S = 5.0  # SIGTERMs that come within it are one


class Interrupted(KeyboardInterrupt):
    """A signal of somebody who wants this process to end at once."""


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second one interrupts at once.

    A SIGTERM soon after another does not count as the second: batch systems send it to a sweep and
    its runs alike, the sweep hands its own on, and when a sweep is killed Linux may signal a run
    once for each thread.
    """
    stop, is_again = threading.Event(), _repetition()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        again = is_again(number)
        if not stop.is_set():
            log.warning("%s: stopping with a checkpoint", signal.Signals(number).name)
            stop.set()
        elif not again:
            raise Interrupted

    with _handled(handle, signal.SIGINT, signal.SIGTERM):
        yield stop


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM do what Ctrl-C does; one soon after it (timeout sends two) is ignored."""
    is_again = _repetition()

    def handle(number: int, frame: Any) -> None:
        if not is_again(number):
            raise Interrupted

    with _handled(handle, signal.SIGTERM):
        yield


def _repetition() -> Callable[[int], bool]:
    """A function that says of each signal whether it is a SIGTERM soon after another signal."""
    told_at = -TOGETHER_S

    def is_again(number: int) -> bool:
        nonlocal told_at
        before, told_at = told_at, monotonic()
        return number == signal.SIGTERM and told_at - before < TOGETHER_S

    return is_again


@contextmanager
def _handled(handle: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    kept = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
