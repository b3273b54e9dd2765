# SPDX-License-Identifier: Apache-2.0
"""Every unmasked lane of an interpreted load or store must hit an element of a tensor that the launch was given.

An element, not the storage around it: a gap between the rows of a strided matrix is out of bounds too, and so is a lane
that starts inside an element, or is wider than it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


class OutOfBounds(IndexError):
    """A kernel touched memory that is nobody's."""


_elements: dict[int, np.ndarray[Any, Any]] | None = None
"""During a launch: width in bytes -> the sorted addresses of all elements so wide."""


def install() -> None:
    """Watch all launches of this process; a second call changes nothing."""
    if getattr(interpreter.GridExecutor.__call__, "watched", False):
        return
    builder = interpreter.InterpreterBuilder
    launch, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store

    def watched_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _elements
        outer, _elements = _elements, _addresses([*args, *kwargs.values()])
        try:
            return launch(self, *args, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OutOfBounds):  # each device function wraps it once more
                cause = cause.__cause__
            raise cause or error from None
        finally:
            _elements = outer

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    watched_launch.watched = True  # type: ignore[attr-defined]
    interpreter.GridExecutor.__call__ = watched_launch
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store


def _addresses(arguments: list[Any]) -> dict[int, np.ndarray[Any, Any]]:
    found: dict[int, list[np.ndarray[Any, Any]]] = {}
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor):
            offsets = np.zeros((), dtype=np.int64)
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                offsets = offsets[..., None] + np.arange(size) * stride
            width = tensor.element_size()
            found.setdefault(width, []).append(tensor.data_ptr() + offsets.ravel() * width)
    return {width: np.unique(np.concatenate(parts)) for width, parts in found.items()}


def _check(what: str, pointers: Any, mask: Any) -> None:
    if _elements is None:
        return
    touched = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64)
    width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    known = _elements.get(width, np.empty(0, dtype=np.int64))
    where = np.searchsorted(known, touched)
    inside = where < len(known)
    inside[inside] = known[where[inside]] == touched[inside]
    if not inside.all():
        raise OutOfBounds(f"{what}: {int((~inside).sum())} of {touched.size} lanes outside every tensor of the launch")
