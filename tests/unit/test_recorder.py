# SPDX-License-Identifier: Apache-2.0
"""The recorder without an engine: which steps of which rounds are kept, and the shards that it writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_specdecpp.data.manifest import Manifest
from vllm_specdecpp.data.shard_file import read_shard
from vllm_specdecpp.data.shards import create_dataset, open_dataset
from vllm_specdecpp.decision.features import StepFeatures
from vllm_specdecpp.engine.recording import recorder
from vllm_specdecpp.engine.recording.recorder import DraftTrace, RoundRecorder
from vllm_specdecpp.engine.v1.inputs import RowState

HIDDEN_SIZE = 4
NUM_PROMPT_TOKENS = 5


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "kind": "rounds", "target": "org/target", "draft": "org/draft", "target_revision": None,
        "draft_revision": None, "hidden_size": HIDDEN_SIZE, "sampling": {}, "num_candidates": 6,
        "prompts_digest": "", "num_prompts": 0, "unit_size": 0, "versions": {}, "git": None, "command": "",
        "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


class Engine:
    """Plays the proposer: drafts random numbers for a batch, and says what became of them."""

    def __init__(self) -> None:
        self.accept_probs: list[torch.Tensor] | None = None
        self.requests: dict[str, Any] = {}
        self.recorder = RoundRecorder(self.requests, lambda: self.accept_probs)
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # of the last draft

    def draft(self, lengths: dict[str, int], temperature: float = 0.0, next_position: int = 7) -> None:
        """Draft ``lengths[request id]`` candidates 100, 101, ... for each request."""
        rows = [RowState(request_id, next_position - 1, next_position) for request_id in lengths]
        params = SimpleNamespace(temperature=temperature)
        for request_id in lengths:
            request = SimpleNamespace(num_prompt_tokens=NUM_PROMPT_TOKENS, sampling_params=params)
            self.requests[request_id] = request
        wanted = torch.tensor(list(lengths.values()))
        trace = DraftTrace()
        self.steps = []
        for step in range(int(wanted.max())):
            running = (wanted > step).nonzero().squeeze(1)
            states, scalars = torch.randn(len(running), HIDDEN_SIZE), torch.rand(3, len(running))
            self.steps.append((running, states, scalars))
            trace.step(running, StepFeatures(states, *scalars))
        self.recorder.drafted(rows, [list(range(100, 100 + n)) for n in lengths.values()], trace)

    def verify(self, outcomes: dict[str, tuple[int, int] | None]) -> None:
        """Each request's candidates read and accepted; None: the request had no round."""
        rows = [RowState(request_id, 0, 0) for request_id in outcomes]
        found = {i: outcome for i, outcome in enumerate(outcomes.values()) if outcome is not None}
        self.recorder.verified(rows, found)

    def drafted_step(self, row: int, step: int) -> tuple[torch.Tensor, list[float]]:
        """The state and scalars that the last draft gave for a row's candidate."""
        rows, states, scalars = self.steps[step]
        index = rows.tolist().index(row)
        return states[index], scalars[:, index].tolist()

    def round(self, request_id: str = "a", length: int = 3, accepted: int = 2) -> None:
        """Draft and verify one request."""
        self.draft({request_id: length})
        self.verify({request_id: (length, accepted)})

    def flush(self, path: str | None = None, prompts: Any = None) -> dict[str, Any]:
        """Of all requests, unless ``prompts`` says of which."""
        return self.recorder.flush(path, prompts or {name: {"id": name, "set": "s"} for name in self.requests})


def rounds_of(engine: Engine, tmp_path: Any, prompts: Any = None) -> Any:
    """What a flush writes, read back."""
    folder = tmp_path / "data"
    create_dataset(folder, manifest(), False)
    path = folder / "shards" / "00000.safetensors"
    engine.flush(str(path), prompts)
    return read_shard(path, manifest())


def test_a_batch_of_different_lengths(tmp_path):
    engine = Engine()
    engine.draft({"a": 2, "b": 0, "c": 4, "d": 1})
    want = {r: [engine.drafted_step(row, step) for step in range(n)] for r, row, n in (("a", 0, 2), ("c", 2, 3))}
    # d was preempted; of c's candidates the scheduler took three; the batch was reordered.
    engine.verify({"c": (3, 1), "new": None, "a": (2, 2), "b": (0, 0)})
    shard = rounds_of(engine, tmp_path)
    assert [p["id"] for p in shard.prompts] == ["c", "a"]
    assert shard.round_starts.tolist() == [0, 3, 5]
    assert shard.num_accepted.tolist() == [1, 2]
    assert shard.outcome.tolist() == [1, 0, -1, 1, 1]
    assert shard.token_ids.tolist() == [100, 101, 102, 100, 101]
    assert shard.emitted.tolist() == [7 + 1 - NUM_PROMPT_TOKENS] * 2
    steps = [*want["c"], *want["a"]]
    assert torch.equal(shard.hidden_states, torch.stack([state for state, _ in steps]))
    columns = torch.stack([shard.top1_prob, shard.entropy, shard.margin], dim=1)
    assert columns.tolist() == [scalars for _, scalars in steps]


def test_a_draft_that_was_not_verified_at_once_is_dropped(tmp_path):
    engine = Engine()
    engine.draft({"a": 3, "b": 3})
    engine.verify({"b": (3, 3)})
    engine.verify({"a": (3, 3), "b": (3, 1)})  # a came back; b's draft of two steps ago is no longer this one
    shard = rounds_of(engine, tmp_path)
    assert [p["id"] for p in shard.prompts] == ["b"]
    assert shard.num_accepted.tolist() == [3]


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.7])
def test_soft_labels_belong_to_sampled_requests(tmp_path, temperature):
    engine = Engine()
    engine.draft({"x": 1, "a": 3}, temperature)
    engine.accept_probs = [torch.tensor([0.125]), torch.tensor([0.5, 1.0])]
    engine.verify({"x": (1, 0), "a": (2, 1)})
    shard = rounds_of(engine, tmp_path)
    if temperature < 0.1:
        assert shard.soft_label.isnan().all()
    else:
        assert shard.soft_label.tolist() == [0.125, 0.5, 1.0]
    assert shard.temperature.tolist() == pytest.approx([temperature] * 2)


def test_no_soft_labels_without_the_samplers(tmp_path):
    engine = Engine()
    engine.draft({"a": 2, "b": 2}, 1.0)
    engine.accept_probs = [torch.tensor([0.5]), torch.tensor([0.25, 0.75])]  # of other lengths than what was verified
    engine.verify({"a": (2, 1), "b": (2, 1)})
    soft_label = rounds_of(engine, tmp_path).soft_label
    assert soft_label[:2].isnan().all() and soft_label[2:].tolist() == [0.25, 0.75]


def test_rounds_without_candidates_are_no_rounds(tmp_path):
    engine = Engine()
    engine.draft({"a": 0})
    engine.verify({"a": (0, 0)})
    engine.draft({"a": 3})
    engine.verify({"a": (0, 0)})  # the scheduler took none
    shard = rounds_of(engine, tmp_path, {"a": {"id": "p", "set": "s"}})  # empty, so that the unit is done
    assert (shard.num_rounds, shard.prompts) == (0, [{"id": "p", "set": "s"}])
    assert open_dataset(tmp_path / "data").done_units() == {0}


class TestFlush:
    def test_rounds_of_other_requests_are_dropped(self, tmp_path):
        engine = Engine()
        for request_id in ("0-9f", "1-9f", "1", "a-b-9f", "0-9f-77"):
            engine.round(request_id)
        prompts = {"0": {"id": "p0", "set": "s"}, "a-b": {"id": "p1", "set": "t"}}
        shard = rounds_of(engine, tmp_path, prompts)
        assert [(p["id"], p["set"]) for p in shard.prompts] == [("p0", "s"), ("p1", "t")]
        assert engine.flush()["rounds"] == 0  # those of the others do not come later

    def test_the_summary_counts(self, tmp_path):
        engine = Engine()
        engine.round("a", 4, 1)
        engine.round("a", 3, 3)
        summary = engine.flush()
        assert summary == {
            "rounds": 2, "steps": 7, "observed": 5, "accepted": 4, "dropped_rounds": 0
        }  # fmt: skip
        assert engine.flush()["steps"] == 0

    def test_a_failed_write_keeps_the_rounds(self, tmp_path, monkeypatch):
        engine = Engine()
        engine.round("a")

        def full(*_: Any) -> None:
            raise ValueError("specdecpp: the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(recorder, "write_shard", full)
            with pytest.raises(ValueError, match="full"):
                rounds_of(engine, tmp_path)
        assert rounds_of(engine, tmp_path).num_accepted.tolist() == [2]

    def test_memory_is_bounded(self, monkeypatch):
        monkeypatch.setattr(recorder, "MAX_BYTES", 2000)
        engine = Engine()
        for _ in range(10):
            engine.round("a")
        summary = engine.flush()
        assert 0 < summary["rounds"] < 10
        assert summary["rounds"] + summary["dropped_rounds"] == 10
        engine.round("a")
        assert engine.flush()["dropped_rounds"] == 0
