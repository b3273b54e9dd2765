# SPDX-License-Identifier: Apache-2.0
"""What kernels use and Triton 3.9's interpreter gets wrong, or slow."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def mend() -> None:
    """Patch the interpreter of this process."""
    _add_log1p()
    _make_comparisons_bool()
    _make_ranges_tensors()
    _widen_bfloat16_products()
    _patch_the_language_once()
    _make_types_once()
    watch_for_overflow(False)


def watch_for_overflow(watch: bool) -> None:
    """Whether each sum, difference and product of integers is made twice, the second time in 64 bits: a third of all
    time. The kernels' own tests do."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=watch)


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


def _widen_bfloat16_products() -> None:
    """bfloat16 is kept as 16-bit integers, and those would be multiplied; float32 holds each exactly."""
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def widened(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        sides = [self.cast_impl(side, tl.float32) if side.dtype == tl.bfloat16 else side for side in (left, right)]
        return multiply(self, *sides, *rest)

    builder.create_dot = widened


def _patch_the_language_once() -> None:
    """Every launch, and every call of a device function, patches triton.language anew: most of all time."""
    patch_language = interpreter._patch_lang
    patched: set[frozenset[str]] = set()

    def patch(function: Any) -> Any:
        modules = _languages(function)
        if modules not in patched:
            patch_language(function)
            patched.add(modules)
        return interpreter._LangPatchScope()  # nothing to restore: nothing is compiled in this process

    interpreter._patch_lang = patch


@functools.cache
def _languages(function: Any) -> frozenset[str]:
    """The modules by which a kernel reaches the language."""
    return frozenset(name for name, value in function.__globals__.items() if value is tl or value is tl.core)


def _make_types_once() -> None:
    """Each operation makes its result's type, and the shape's tuple in Triton's own classes, anew."""
    pointer, scalars = np.dtype(np.uint64), functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda type: pointer if type.scalar.is_ptr() else scalars(type.scalar)
    TritonSemantic.computation_type_impl = functools.cache(TritonSemantic.computation_type_impl)
    same, block = tl.dtype.__eq__, tl.block_type.__init__
    tl.dtype.__eq__ = lambda self, other: self is other or same(self, other)
    made: dict[Any, dict[str, Any]] = {}

    def make_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (
            element_ty.name,
            getattr(element_ty, "address_space", None),
            *(getattr(size, "value", size) for size in shape),
        )
        if key not in made:
            block(self, element_ty, shape)
            made[key] = dict(vars(self))
        vars(self).update(made[key])

    @functools.cache
    def shape_of(sizes: Any) -> tuple[Any, Any]:
        return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(tuple(type.shape.values) if type.is_block() else ())

    tl.block_type.__init__, tl.tensor.__init__ = make_block, make_tensor
