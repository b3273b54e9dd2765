# SPDX-License-Identifier: Apache-2.0
"""The engines' methods: vLLM's own proposer, and what is refused before a start; and the command of a result."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.engines import Engines, EngineSettings
from benchmarks.common.in_worker import restore_proposer, use_native_proposer, use_padding, use_runs, use_text_proposer
from benchmarks.common.methods import parse_method, parse_methods
from benchmarks.common.provenance import command_line
from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware import CostAwareRule
from vllm_specdecpp.source_registry import make_sources


def test_the_proposer_is_vllms_own_and_comes_back() -> None:
    draft_model = pytest.importorskip("vllm.v1.spec_decode.draft_model")

    class Ours(draft_model.DraftModelProposer):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.weights = object()

        def propose(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("our propose ran")

        def _sample_draft_tokens(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("our sampling ran")

    class Runner:
        def __init__(self) -> None:
            self.drafter: Any = Ours()

        def _determine_batch_execution_and_padding(self) -> str:
            return "vLLM's"

    class Worker:
        model_runner = Runner()

    worker, ours = Worker(), Worker.model_runner.drafter
    worker.model_runner._determine_batch_execution_and_padding = lambda: "ours"  # type: ignore[method-assign]
    for k in (2, 4):
        use_native_proposer(worker, k)
        assert worker.model_runner._determine_batch_execution_and_padding() == "vLLM's"
        native = worker.model_runner.drafter
        assert native.weights is ours.weights and not isinstance(native, Ours)
        assert type(native)._sample_draft_tokens is draft_model.DraftModelProposer._sample_draft_tokens
        # vLLM's propose notes the K it was given before it fails on our missing arguments.
        with pytest.raises(AttributeError):
            native.propose(20, *[None] * 7)
        assert ours.num_speculative_tokens == k
    restore_proposer(worker)
    assert worker.model_runner.drafter is ours
    assert worker.model_runner._determine_batch_execution_and_padding() == "ours"
    use_padding(worker, False)
    use_padding(worker, False)
    assert worker.model_runner._determine_batch_execution_and_padding() == "vLLM's"
    restore_proposer(worker)
    assert worker.model_runner._determine_batch_execution_and_padding() == "ours"


@pytest.mark.slow  # numba compiles for half a minute
def test_vllms_ngram_drafts_and_ours_comes_back() -> None:
    """In a process of its own: numba, which it imports, keeps vLLM from starting an engine in the same one (it looks
    for kernels in all modules' attributes, and takes llvmlite's ``vars(lib)`` for a dict)."""
    here = "llvmlite" in sys.modules  # another test's
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(_ngram_drafts_and_ours_comes_back).result()
    assert here == ("llvmlite" in sys.modules)


def _ngram_drafts_and_ours_comes_back() -> None:
    """The runner asks by the configuration's method; what our worker asks of a drafter is still ours."""
    from types import SimpleNamespace as Space

    import numpy as np

    config = Space(method="specdecpp", num_speculative_tokens=8)
    vllm_config: Any = Space(
        speculative_config=config,
        model_config=Space(max_model_len=32),
        scheduler_config=Space(max_num_seqs=2),
        parallel_config=Space(tensor_parallel_size=1),
    )
    ours = Space(log="ours")
    runner = Space(drafter=ours, speculative_config=config, vllm_config=vllm_config)
    worker: Any = Space(model_runner=runner)
    use_text_proposer(worker, "ngram", {"K": 3, "min": 2, "max": 3})
    assert runner.speculative_config.method == "ngram" and config.method == "specdecpp"
    assert runner.drafter.log == "ours"
    tokens = np.zeros((2, 32), dtype=np.int32)
    tokens[0, :9] = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    assert runner.drafter.propose(8, [[2], []], np.array([9, 4], dtype=np.int32), tokens) == [[3, 4, 5], []]
    restore_proposer(worker)
    assert runner.drafter is ours and runner.speculative_config is config


def test_free_runs_are_left_out_and_come_back() -> None:
    from types import SimpleNamespace as Space

    import numpy as np

    rule: Any = CostAwareRule(CostModel({1: 1.0}, {1: 1.0}, {1: 1.0}), 4, sources=make_sources(["suffix"]))
    worker: Any = Space(model_runner=Space(drafter=Space(cost_aware=Space(rule=rule))))
    use_runs(worker, 0)
    assert rule.sources == () and list(rule.free_runs.models) == ["suffix"]  # what was learnt stays
    use_runs(worker, 1)
    assert tuple(source.name for source in rule.sources) == ("suffix",) and rule.sources[0].cache is None
    use_runs(worker, 2)
    cache: Any = rule.sources[0].cache
    cache.update({"a": np.array([3, 4, 5])})
    use_runs(worker, 1)
    use_runs(worker, 2)
    kept: Any = rule.sources[0].cache
    assert kept is cache and kept.text.tolist() == [3, 4, 5, -1], "while another method is measured"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("draft_model:8", "raise max_candidates"),
        ("confidence:num_speculative_tokens=8", "raise max_candidates"),
        ("confidense", "rule='confidense' must be one of"),
        ("confidence:threshold=1.5", "strictly between 0 and 1"),
        ("threshold", "needs an acceptance head"),
        ("fixed:threshold=0.5", "no meaning with rule='fixed'"),
        ("cost_aware@small", "there is no draft 'small'; there is other"),
    ],
)
def test_a_method_that_cannot_run_is_refused_before_the_engine_starts(method: str, message: str) -> None:
    settings = EngineSettings("T", "D", num_speculative_tokens=4, other_drafts={"other": "E"})
    with pytest.raises(ValueError, match=message):
        Engines(settings, [parse_method(method)]).start()
    good = ["off", "draft_model:4", "confidence:num_speculative_tokens=4,min_speculative_tokens=2", "fixed", "entropy"]
    Engines(settings, parse_methods([*good, "ngram:4", "cost_aware@other"])).check()


def test_the_command_line_holds_no_machine_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "repo").mkdir()
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.chdir(tmp_path / "repo")
    argv = ["--pair", str(tmp_path / "home/m 1"), "org/draft", "--data", str(tmp_path / "data")]
    expected = "python -m benchmarks.start --pair ~/'m 1' org/draft --data ../data"
    assert command_line(argv, "benchmarks.start") == expected
