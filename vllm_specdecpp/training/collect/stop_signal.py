# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM end a long command cleanly."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any


@contextmanager
def handling(handler: Callable[[int, Any], object], *numbers: int) -> Iterator[None]:
    """In here ``handler`` gets these signals; outside the main thread nothing changes."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if in_main_thread}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@dataclass
class StopSignal:
    """Whether a first SIGINT or SIGTERM came: see :func:`stop_on_signal`."""

    requested: bool = False


@contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """In here the first SIGINT or SIGTERM is a wish to stop; the second one interrupts at once."""
    stop = StopSignal()

    def on_signal(number: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print("stopping after this unit; once more to stop at once", file=sys.stderr)

    with handling(on_signal, signal.SIGINT, signal.SIGTERM):
        yield stop


def sigterm_interrupts() -> AbstractContextManager[None]:
    """In here SIGTERM raises KeyboardInterrupt, as Ctrl-C does; outside the main thread nothing changes."""
    return handling(signal.default_int_handler, signal.SIGTERM)


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

    with handling(end, signal.SIGINT, signal.SIGTERM):
        yield


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
