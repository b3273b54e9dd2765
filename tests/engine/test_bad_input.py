# SPDX-License-Identifier: Apache-2.0
"""A user's mistake ends in one line that names the option, its value and the mend, before any worker starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import engine_harness as harness


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    """A worker that starts all the same fails the test."""
    from vllm_specdecpp.engine.cpu_worker import CPUWorker

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started with bad input")

    monkeypatch.setattr(CPUWorker, "__init__", started)


def _message(target: str, config: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught, harness.engine(target, config, **options):
        pass
    message = str(caught.value)
    assert "\n" not in message, message
    assert message.startswith("specdecpp: "), message
    assert len(message) < 1500
    return message


def _config(tiny: Any, **options: Any) -> dict[str, Any]:
    return {"method": "specdecpp", "model": tiny.draft_good, **options}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"treshold": 0.5}, ["treshold", "0.5", "'threshold'"]),
        ({"num_speculative_tokens": 129}, ["num_speculative_tokens=129", "128"]),
        ({"rule": "threshold"}, ["rule='threshold'", "head"]),
        ({"model": ""}, ["model", "draft"]),
        ({"parallel_drafting": True}, ["parallel_drafting"]),
        ({"use_heterogeneous_vocab": True}, ["use_heterogeneous_vocab"]),
        pytest.param({"draft_tensor_parallel_size": 2}, ["=2", "of the target, 1"], marks=pytest.mark.asks(9)),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_options(tiny, options, words):
    """Each kind of mistake; ``test_config`` has every one of ours."""
    message = _message(tiny.target, _config(tiny, **options))
    for word in words:
        assert word in message


def test_head_with_a_training_free_rule(tiny):
    message = _message(tiny.target, _config(tiny, rule="confidence", head=tiny.head))
    assert "rule='confidence'" in message and "head=" in message


def test_head_of_another_hidden_size(tiny):
    message = _message(tiny.target, _config(tiny, head=tiny.head_wrong_size))
    assert "128" in message and "64" in message and tiny.head_wrong_size in message


def test_missing_head(tiny, tmp_path):
    message = _message(tiny.target, _config(tiny, head=str(tmp_path / "nowhere")))
    assert "nowhere" in message


def test_head_of_other_tensors(tiny, tmp_path):
    """A file that is fine in itself, but no acceptance head: the draft model's own weights. ``test_head`` has more."""
    head = Path(shutil.copytree(tiny.head, tmp_path / "head"))
    shutil.copy(Path(tiny.draft_good) / "model.safetensors", head / "model.safetensors")
    assert str(head) in _message(tiny.target, _config(tiny, head=str(head)))


def test_draft_with_another_vocabulary(tiny):
    message = _message(tiny.target, {"method": "specdecpp", "model": tiny.draft_other_vocab})
    assert "512" in message and "500" in message and "vocab" in message


def test_missing_draft(tiny, tmp_path):
    message = _message(tiny.target, {"method": "specdecpp", "model": str(tmp_path / "no-draft")})
    assert "no-draft" in message


def test_no_pair_for_the_target(tiny, monkeypatch, tmp_path):
    """The bare word: the nearest known targets are named, and both ways to name a draft are shown."""
    monkeypatch.setenv("SPECDECPP_PAIRS", str(_pairs_file(tmp_path, {})))
    message = _message(tiny.target, {"method": "specdecpp"})
    assert tiny.target in message and "are, the nearest " in message
    assert '"method": "specdecpp"' in message and '"draft"' in message and "pairs.json" in message


def _pairs_file(folder: Path, content: Any) -> Path:
    path = folder / "pairs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_malformed_pairs_file(tiny, monkeypatch, tmp_path):
    path = _pairs_file(tmp_path, "{ not json")
    monkeypatch.setenv("SPECDECPP_PAIRS", str(path))
    assert str(path) in _message(tiny.target, {"method": "specdecpp"})


@pytest.mark.parametrize(
    ("engine_options", "word"),
    [
        ({"async_scheduling": True}, "--async-scheduling"),
        ({"logits_processors": ["a.module:Processor"]}, "a.module:Processor"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
    ],
    ids=["async", "processors", "worker", "pipeline"],
)
def test_engine_options_that_do_not_go_together(tiny, engine_options, word):
    assert word in _message(tiny.target, _config(tiny), **engine_options)


def test_vllm_without_specdecpp_is_untouched(tiny):
    """vLLM's own methods keep their own errors."""
    with pytest.raises(ValueError) as caught, harness.engine(tiny.target, {"method": "nonsense", "model": "x"}):
        pass
    assert not str(caught.value).startswith("specdecpp")
