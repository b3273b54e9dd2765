# SPDX-License-Identifier: Apache-2.0
"""A first Ctrl-C lets a long command end cleanly, a second one ends it at once."""

from __future__ import annotations

import signal
import sys
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
