# SPDX-License-Identifier: Apache-2.0
"""The ledger against the installed vLLM, and against the sources of the other supported version."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vllm_specdecpp.engine import supported

OTHER_VERSION = "0.33.0"


def test_ledger_matches_the_installed_vllm():
    assert supported.problems() == ()


def test_every_entry_says_why():
    for hook in supported.LEDGER:
        assert hook.why, hook.symbol
    assert len({hook.symbol for hook in supported.LEDGER}) == len(supported.LEDGER)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "m:C.f is gone"),
        ("class C: pass", "m:C.f is gone"),
        ("class C:\n def f(self): pass", "m:C.f has no x"),
        ("class C:\n def f(self, *, x=1): pass", None),
        ("class C:\n async def f(self, x): pass", None),
    ],
)
def test_a_changed_symbol_is_found(source, expected):
    found = supported.find_problems(lambda _: source, (supported.Hook("m:C.f", ("self", "x")),))
    assert found == ([expected] if expected else [])


def test_a_folder_that_may_not_be_read_does_not_end_the_start(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(Path, "exists", lambda _: (_ for _ in ()).throw(PermissionError(13, "denied")))
    supported.problems.cache_clear()
    assert supported.problems() == ()


@pytest.mark.parametrize(("change", "times"), [("", 1), ("# another\n", 2)])
def test_sources_that_were_compared_are_not_parsed_again(monkeypatch, tmp_path, change, times):
    """Nor where something was missing: that is never kept."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(supported, "LEDGER", (supported.Hook("m:C.f", ("x",)),))
    sources, parsed = ["class C: pass", "class C:\n def f(self, x): pass\n"], []
    find = supported.find_problems

    def counted(get):
        parsed.append(1)
        return find(get, supported.LEDGER)

    monkeypatch.setattr(supported, "find_problems", counted)
    for source in [*sources[:1] * 2, sources[1], sources[1] + change]:
        monkeypatch.setattr(supported, "_installed_source", lambda _, source=source: source)
        supported.problems.cache_clear()
        assert bool(supported.problems()) is (source == sources[0])
    supported.problems.cache_clear()
    assert len(parsed) == 2 + times


@pytest.mark.parametrize("version", [None, "0.31.4", "0.34.0", "1.0"])
def test_an_unknown_vllm_is_refused_in_one_line(monkeypatch, version):
    supported.problems.cache_clear()
    monkeypatch.setattr(supported, "vllm_version", lambda: version)
    try:
        with pytest.raises(ValueError, match="supported version") as caught:
            supported.require_supported()
    finally:
        supported.problems.cache_clear()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0"])
def test_a_supported_vllm_is_checked_symbol_by_symbol(monkeypatch, version):
    supported.problems.cache_clear()
    monkeypatch.setattr(supported, "vllm_version", lambda: version)
    monkeypatch.setattr(supported, "_installed_source", lambda module: None)
    try:
        assert len(supported.problems()) == len(supported.LEDGER)
    finally:
        supported.problems.cache_clear()


@pytest.fixture(scope="session")
def other_sources(tmp_path_factory):
    """vLLM's sources of the other supported version, read from its wheel without installing it."""
    folder = tmp_path_factory.mktemp("vllm")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), f"vllm=={OTHER_VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        pytest.skip(f"vLLM {OTHER_VERSION} could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

        def read(module: str) -> str | None:
            base = Path(*module.split("."))
            for path in (base.with_suffix(".py"), base / "__init__.py"):
                if path.as_posix() in names:
                    return archive.read(path.as_posix()).decode()
            return None

        yield read


@pytest.mark.timeout(1000)
def test_ledger_matches_the_other_version(other_sources):
    assert supported.find_problems(other_sources) == []


@pytest.mark.timeout(1000)
def test_dispatch_with_the_other_versions_manager(other_sources, monkeypatch):
    """Its ``CudaGraphManager``, ours on top of it: full graphs for K = 0 and for rounds of different lengths."""
    import importlib
    import types

    import torch
    import vllm.v1.worker.gpu as package
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils, input_batch
    from vllm.v1.worker.utils import get_uniform_decode_token_count

    from vllm_specdecpp.engine.v2 import verify_graphs

    name = cudagraph_utils.__name__
    source = other_sources(name)
    if not hasattr(input_batch, "set_dummy_context"):  # only what captures calls it
        monkeypatch.setattr(input_batch, "set_dummy_context", None, raising=False)
    theirs: Any = types.ModuleType(name)
    exec(compile(source, name, "exec"), theirs.__dict__)
    theirs.get_pp_group = lambda: types.SimpleNamespace(is_first_rank=True, is_last_rank=True)
    theirs.current_platform = types.SimpleNamespace(get_global_graph_pool=lambda: (0, 1))
    theirs.is_breakable_cudagraph_enabled = lambda: False
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, theirs)
        patch.setattr(package, "cudagraph_utils", theirs)
        ours = importlib.reload(verify_graphs).VerifyGraphs
    importlib.reload(verify_graphs)
    assert issubclass(ours, theirs.ModelCudaGraphManager)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    config = types.SimpleNamespace(
        scheduler_config=types.SimpleNamespace(max_num_seqs=64),
        compilation_config=types.SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=512),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=types.SimpleNamespace(use_kda_recoverssm=False), num_speculative_tokens=10,
        speculative_config=types.SimpleNamespace(uses_dynamic_speculative_decoding=lambda: False),
    )  # fmt: skip
    manager = ours(config, torch.device("cpu"), CUDAGraphMode.FULL_AND_PIECEWISE, 11, varlen_decode=True)
    manager._graphs_captured = True
    for lengths in ([1], [1] * 64, [1] * 33, [7], [3, 1, 11], [2, 5] * 12):
        uniform = get_uniform_decode_token_count(len(lengths), sum(lengths), max(lengths), True)
        found = manager.dispatch(len(lengths), sum(lengths), uniform, 0, max_query_len=max(lengths))
        assert found.cg_mode == CUDAGraphMode.FULL, lengths
        assert (found.uniform_token_count == 1) == (max(lengths) == 1)
