# SPDX-License-Identifier: Apache-2.0
"""Rounds as lines of text: what was drafted, what of it was accepted, and the target's own token at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

GREEN, RED, CYAN, DIM = "32", "31", "36", "2"


def has_colour(stream: TextIO | None = None) -> bool:
    """Whether to colour: a terminal that is not dumb, and no NO_COLOR (https://no-color.org) in the environment."""
    stream = sys.stdout if stream is None else stream
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def round_line(number: int, row: Mapping[str, Any], decode: Callable[[Sequence[int]], str], colour: bool) -> str:
    """One round: accepted candidates, rejected ones in ``~...~``, then the recovered or bonus token after ``+``.

    Args:
        row: ``candidates`` (token ids), ``accepted`` (how many) and ``next_token``, as ``specdecpp_rounds`` gives them.
        decode: text of some token ids.
    """
    candidates, accepted = list(row["candidates"]), int(row["accepted"])

    def text(ids: Sequence[int]) -> str:
        return decode(ids).replace("\n", "\\n").replace("\t", "\\t")

    def paint(code: str, piece: str) -> str:
        return f"\033[{code}m{piece}\033[0m" if colour else piece

    kept = paint(GREEN, text(candidates[:accepted]))
    dropped = paint(RED, f"~{text(candidates[accepted:])}~") if accepted < len(candidates) else ""
    own = paint(CYAN, f"+{text([row['next_token']])}")
    head = paint(DIM, f"{number:4}  {accepted:2} of {len(candidates):2} accepted ")
    return f"{head} |{kept}{dropped}{own}|"
