"""Ctrl-C and SIGTERM: how a run, or a sweep of runs, is stopped."""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

AGAIN_S = 0.1  # after which an interrupt that was lost is raised again
TOGETHER_S = 5.0  # SIGTERMs that come within it are one


class Interrupted(KeyboardInterrupt):
    """A signal of somebody who wants this process to end at once."""


def interrupts_in_a_line() -> None:
    """Makes Ctrl-C a line wherever it comes, as in the seconds in which libraries are imported.

    Compiled libraries may crash if an exception comes while they are imported, so there the process
    ends at once. Python ignores what is raised in a finalizer or in a callback of its garbage
    collector. JAX has such a callback, so an interrupt that comes in one is raised again after it.
    """
    told, ignored = sys.excepthook, sys.unraisablehook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("rlx: interrupted", file=sys.stderr)
        else:
            told(kind, error, trace)

    def again(lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(AGAIN_S, _thread.interrupt_main).start()
        else:
            ignored(lost)

    sys.excepthook, sys.unraisablehook = hook, again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, _interrupt)


def raises() -> bool:
    """Says whether Ctrl-C raises KeyboardInterrupt now, and is not handled in another way."""
    return signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _imports(frame):
        os.write(sys.stderr.fileno(), b"rlx: interrupted\n")
        os._exit(128 + number)
    raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    """Says whether an import is going on in this frame, or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


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
