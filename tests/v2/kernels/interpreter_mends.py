# SPDX-License-Identifier: Apache-2.0
"""What Triton 3.9's interpreter gets wrong, or slow, besides what ``tests.v2.interpreted_triton`` mends."""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    if not getattr(interpreter.InterpreterBuilder.create_dot, "mended", False):
        _widen_bfloat16_products()
        _patch_the_language_once_a_launch()


def _widen_bfloat16_products() -> None:
    """bfloat16 is kept as 16-bit integers, and those would be multiplied; float32 holds each exactly."""
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def widened(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        sides = [self.cast_impl(side, tl.float32) if side.dtype == tl.bfloat16 else side for side in (left, right)]
        return multiply(self, *sides, *rest)

    widened.mended = True  # type: ignore[attr-defined]
    builder.create_dot = widened


def _patch_the_language_once_a_launch() -> None:
    """Every call of a device function patches triton.language anew, half of all time; once a launch will do."""
    launch, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[frozenset[str]] = set()

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = _languages(self.fn)
        if modules not in patched:
            patch_language(self.fn)
            patched.add(modules)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_once
    interpreter.InterpretedFunction.__call__ = call


@functools.cache
def _languages(function: Any) -> frozenset[str]:
    """The modules by which a device function reaches the language."""
    return frozenset(name for name, value in function.__globals__.items() if value is tl or value is tl.core)
