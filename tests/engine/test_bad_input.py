# SPDX-License-Identifier: Apache-2.0
"""A user's mistake ends in one line that names the option, its value and the mend, before any worker starts."""

from __future__ import annotations

import json
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
        pytest.param({"draft_tensor_parallel_size": 2}, ["=2", "of the target, 1"], marks=pytest.mark.asks(9)),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_options(tiny, options, words):
    """One of ours, one that vLLM would take: the others are in the unit tests of ``config``, ``head``, ``pairs``."""
    message = _message(tiny.target, _config(tiny, **options))
    for word in words:
        assert word in message


def test_head_of_another_hidden_size(tiny):
    message = _message(tiny.target, _config(tiny, head=tiny.head_wrong_size))
    assert "128" in message and "64" in message and tiny.head_wrong_size in message


def test_draft_with_another_vocabulary(tiny):
    message = _message(tiny.target, {"method": "specdecpp", "model": tiny.draft_other_vocab})
    assert "512" in message and "500" in message and "vocab" in message


def test_missing_draft(tiny, tmp_path):
    message = _message(tiny.target, {"method": "specdecpp", "model": str(tmp_path / "no-draft")})
    assert "no-draft" in message


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
