# SPDX-License-Identifier: Apache-2.0
"""What vLLM's V2 kernels use and Triton 3.9's interpreter gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter


def mend() -> None:
    """Patch the interpreter of this process."""
    _add_log1p()
    _make_comparisons_bool()
    _make_ranges_tensors()


def _add_log1p() -> None:
    """Calls into libdevice return None: nobody interprets them."""

    def log1p(x: Any) -> Any:
        data = x.handle.data
        with np.errstate(divide="ignore", invalid="ignore"):
            result = np.log1p(data).astype(data.dtype)
        return tl.tensor(interpreter.TensorHandle(result, x.dtype), x.type)

    libdevice.log1p = log1p


def _make_comparisons_bool() -> None:
    """A comparison's result carries its operands' type, which a mask made of it then has: "unsupported dtype"."""

    def as_bool(compare: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Any, left: Any, right: Any) -> Any:
            return interpreter.TensorHandle(np.asarray(compare(self, left, right).data, dtype=np.bool_), tl.int1)

        return wrapped

    builder = interpreter.InterpreterBuilder
    for name in [n for n in vars(builder) if n.startswith(("create_icmp", "create_fcmp"))]:
        setattr(builder, name, as_bool(getattr(builder, name)))


def _make_ranges_tensors() -> None:
    """``tl.range`` yields Python's integers, where compiled code has int32 tensors with their methods."""
    patch_language = interpreter._patch_lang_core

    def patch(language: Any, scope: Any) -> None:
        patch_language(language, scope)
        integers = language.range

        def tensors(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for value in integers(*args, **kwargs):
                yield tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.int32), tl.int32), tl.int32)

        scope.set_attr(language, "range", tensors)

    interpreter._patch_lang_core = patch
