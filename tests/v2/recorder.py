# SPDX-License-Identifier: Apache-2.0
"""Records what a CUDA graph would, and replays that and nothing else: no line of Python runs again.

A graph is the aten calls, Triton launches and passes of the oracle that ran during its capture, with their arguments as
they were: a number that came from the host stays what it was. Tensors that were there before are held by address, as a
GPU does: one that is gone by the time of a replay is noticed. What was made inside is filled with garbage first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.v2.epochs import EpochBackend, EpochGraph, Epochs

GARBAGE = 987_654_321
ON_HOST = ("query_start_loc_cpu", "seq_lens_cpu_upper_bound")
"""Fields of attention metadata that a GPU has no use for: the oracle compares them."""


class FreedMemory(AssertionError):
    """A replay would read or write memory that has been given back."""


class Address:
    """A tensor that the graph does not own."""

    def __init__(self, tensor: torch.Tensor, owner: str) -> None:
        self._owner = owner
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._form = tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise FreedMemory(f"{self._owner}: a tensor of {self._form} is gone")
        dtype, *form = self._form
        return torch.empty(0, dtype=dtype).set_(storage, *form)


class Call:
    """One thing that the device does, with its arguments, and the tensors that it fills."""

    def __init__(self, name: str, run: Callable[..., Any], args: Any, kwargs: Any, outs: list[torch.Tensor]) -> None:
        self.name, self._run, self._args, self._kwargs, self.outs = name, run, args, kwargs, outs

    def replay(self) -> None:
        results = self._run(*_given(self._args), **_given(self._kwargs))
        for out, result in zip(self.outs, _tensors(results), strict=True) if self.outs else ():
            out.copy_(result)


class If:
    """An IF node."""

    def __init__(self, predicate: Address) -> None:
        self.predicate, self.body = predicate, list[Any]()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple | list) else []


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with its tensors, or addresses, changed; of metadata a copy."""
    if isinstance(value, torch.Tensor | Address):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        if any(isinstance(v, torch.Tensor | Address) for v in fields.values()):
            changed = {k: v if k in ON_HOST else _map(v, change) for k, v in fields.items()}
            return dataclasses.replace(value, **changed)
    return value


def _given(value: Any) -> Any:
    return _map(value, lambda t: t.tensor() if isinstance(t, Address) else t)


class RecordedGraph(EpochGraph):
    """What was captured, in order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.entries: list[Any] = []
        self.own: set[int] = set()  # storages made inside

    def calls(self, entries: list[Any] | None = None) -> Iterator[Call]:
        """All calls, those in IF nodes too."""
        for entry in self.entries if entries is None else entries:
            if isinstance(entry, If):
                yield from self.calls(entry.body)
            else:
                yield entry

    def replay(self) -> None:
        super().replay()
        for call in self.calls():
            for out in call.outs:
                out.fill_(float("nan") if out.is_floating_point() else GARBAGE if out.dtype == torch.int64 else 77)
        self._run(self.entries)

    def _run(self, entries: list[Any]) -> None:
        for entry in entries:
            if isinstance(entry, Call):
                entry.replay()
            elif bool(entry.predicate.tensor()):
                self._run(entry.body)


class RecordingBackend(EpochBackend):
    """Captures by recording; used inside :func:`recording`."""

    def __init__(self, epochs: Epochs, **options: Any) -> None:
        super().__init__(epochs, **options)
        self.graphs: list[RecordedGraph] = []
        self.inside: RecordedGraph | None = None
        self.entries: list[Any] = []

    @contextmanager
    def capture(self) -> Iterator[Any]:
        with super().capture():
            graph = RecordedGraph(self.epochs, "draft", self.pool)
            self.graphs.append(graph)
            self.inside, self.entries = graph, graph.entries
            with _Watch(self):
                yield graph
            self.inside = None

    @contextmanager
    def if_node(self, graph: Any, predicate: torch.Tensor) -> Iterator[None]:
        before, node = self.entries, If(Address(predicate, "IF node"))
        before.append(node)
        self.entries = node.body
        yield
        self.entries = before

    def fetch(self, flag: torch.Tensor) -> Callable[[], bool]:
        value = bool(flag)
        return lambda: value

    def note(self, name: str, run: Callable[..., Any], args: Any, kwargs: Any, outs: list[torch.Tensor]) -> None:
        """Record a call that has just run."""
        graph = self.inside
        assert graph is not None
        graph.own |= {t.untyped_storage()._cdata for t in outs}

        def held(tensor: torch.Tensor) -> Any:
            # A single number may be one of the code, which a kernel takes by value.
            own = tensor.untyped_storage()._cdata in graph.own or tensor.dim() == 0
            return tensor if own else Address(tensor, name)

        self.entries.append(Call(name, run, _map(args, held), _map(kwargs, held), outs))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs here is one call, whatever it is made of."""
        graph, self.inside = self.inside, None
        yield
        self.inside = graph


class _Watch(TorchDispatchMode):
    """Records aten calls."""

    def __init__(self, backend: RecordingBackend) -> None:
        super().__init__()
        self._backend = backend

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._backend.inside is not None:
            given = {t.untyped_storage()._cdata for t in _tensors([*args, *kwargs.values()])}
            made = [t for t in _tensors(result) if t.untyped_storage()._cdata not in given]
            writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
            if made or writes:  # else a view
                self._backend.note(str(func), func, args, kwargs, made)
            elif isinstance(result, bool | int | float):  # the host's from now on
                self._backend.note(str(func), lambda *_, **__: None, args, kwargs, [])
        return result


@contextmanager
def recording(backend: RecordingBackend, speculator: Any) -> Iterator[None]:
    """Record Triton launches, and the oracle's passes, while ``backend`` captures."""
    from triton.runtime.interpreter import InterpretedFunction

    launch, model = InterpretedFunction.run, speculator._run_model

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if backend.inside is None:
            return launch(self, *args, **kwargs)
        with backend.aside():
            launch(self, *args, **kwargs)
        backend.note(self.__name__, lambda *a, **k: launch(self, *a, **k), args, kwargs, [])
        return None

    def run_model(*args: Any) -> Any:
        if backend.inside is None:
            return model(*args)
        with backend.aside():
            hidden_states = model(*args)
        backend.note("draft model", model, args, {}, [hidden_states])
        return hidden_states

    InterpretedFunction.run, speculator._run_model = run, run_model
    try:
        yield
    finally:
        InterpretedFunction.run = launch
        del speculator._run_model
