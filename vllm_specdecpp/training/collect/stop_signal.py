# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM end a long command cleanly."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a wish to stop; the second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after this unit; once more to stop at once", file=sys.stderr)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """In here SIGTERM raises KeyboardInterrupt, as Ctrl-C does; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ends_with_children(clear_away: Callable[[], object] = lambda: None) -> Iterator[None]:
    """In here Ctrl-C and SIGTERM end this process at once, with status 130, and all that it has started.

    For whoever starts vLLM's engines: while one starts, an exception out of a signal handler can get lost. Outside the
    main thread nothing changes.

    Args:
        clear_away: called before this process ends so; not at the end of the block.
    """

    def end(number: int, frame: object) -> None:
        end_children()
        clear_away()
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_children() -> None:
    """Kill all processes that this one has started, and theirs, but for multiprocessing's tracker of shared memory: it
    ends by itself, and clears away what the others left."""
    import psutil

    def runs(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in str(process.cmdline())
        except psutil.NoSuchProcess:
            return False

    # Again and again: one may start another before it is killed.
    while running := [process for process in psutil.Process().children(recursive=True) if runs(process)]:
        for process in running:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(running, timeout=1)
