# SPDX-License-Identifier: Apache-2.0
"""What the requests of an engine have emitted, so that one may go on as another did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer[Any]]

SIZE = 65_536
"""Tokens held at most; 256 KiB."""
END = -1
"""Behind each text: no token."""


class SuffixCache:
    """The outputs of the requests in the batch and of the latest that have left it. Prompts are not held.

    Args:
        size: tokens held at most, those that end each text included.

    Attributes:
        text: [<= size] all of them, each with :data:`END` behind it, the batch's last.
    """

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._live: dict[str, Tokens] = {}
        self._left: dict[str, Tokens] = {}
        self.text: Tokens = np.empty(0, dtype=np.int32)

    def update(self, outputs: Mapping[str, Tokens]) -> None:
        """A round begins.

        Args:
            outputs: request id -> [num] tokens that it has emitted; of the whole batch.
        """
        self._left |= {name: text for name, text in self._live.items() if name not in outputs}
        for name in outputs:  # it was preempted, or there was no room for it
            self._left.pop(name, None)
        most = max(self._size // max(len(outputs), 1), 1)  # one long text leaves room for the others
        end = np.array([END], dtype=np.int32)
        self._live = {
            name: np.concatenate([tokens[max(len(tokens) + 1 - most, 0) :], end])
            for name, tokens in outputs.items()
            if len(tokens)
        }
        num = sum(map(len, (*self._left.values(), *self._live.values())))
        while self._left and num > self._size:
            num -= len(self._left.pop(next(iter(self._left))))
        self.text = np.concatenate([end[:0], *self._left.values(), *self._live.values()])
