# SPDX-License-Identifier: Apache-2.0
"""The recorder without an engine: which steps of which rounds are kept, and the shards that it writes."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_specdecpp.data.shards import Manifest, create_dataset, open_dataset, read_shard
from vllm_specdecpp.decision.features import StepFeatures
from vllm_specdecpp.engine.recording import folder as record_folder
from vllm_specdecpp.engine.recording import recorder
from vllm_specdecpp.engine.recording.folder import RecordFolder
from vllm_specdecpp.engine.recording.recorder import RoundRecorder
from vllm_specdecpp.engine.v1.inputs import RowState

HIDDEN_SIZE = 4
NUM_PROMPT_TOKENS = 5


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "kind": "rounds", "target": "org/target", "draft": "org/draft", "target_revision": None,
        "draft_revision": None, "hidden_size": HIDDEN_SIZE, "source": "server", "sampling": {}, "num_candidates": 6,
        "prompts_digest": "", "num_prompts": 0, "unit_size": 0, "versions": {}, "git": None, "command": "",
        "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


class Engine:
    """Plays the proposer: drafts random numbers for a batch, and says what became of them."""

    def __init__(self, fraction: float = 1.0, max_bytes: float = 2**30, folder: RecordFolder | None = None) -> None:
        self.accept_probs: list[torch.Tensor] | None = None
        self.requests: dict[str, Any] = {}
        self.recorder = RoundRecorder(fraction, max_bytes, self.requests, lambda: self.accept_probs, folder)
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # of the last draft

    def draft(self, lengths: dict[str, int], temperature: float = 0.0, next_position: int = 7) -> None:
        """Draft ``lengths[request id]`` candidates 100, 101, ... for each request."""
        rows = [RowState(request_id, next_position - 1, next_position) for request_id in lengths]
        params = SimpleNamespace(temperature=temperature)
        for request_id in lengths:
            request = SimpleNamespace(num_prompt_tokens=NUM_PROMPT_TOKENS, sampling_params=params)
            self.requests[request_id] = request
        wanted = torch.tensor(list(lengths.values()))
        trace = self.recorder.new_trace(rows)
        self.steps = []
        for step in range(int(wanted.max())):
            running = (wanted > step).nonzero().squeeze(1)
            states, scalars = torch.randn(len(running), HIDDEN_SIZE), torch.rand(4, len(running))
            self.steps.append((running, states, scalars))
            if trace is not None:
                trace.step(running, StepFeatures(states, *scalars[:3]), scalars[3])
        if trace is not None:
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
        self.recorder.wait()


def rounds_of(engine: Engine, tmp_path: Any, prompts: Any = None) -> Any:
    """What a flush writes, read back."""
    folder = tmp_path / "data"
    create_dataset(folder, manifest(), False)
    path = folder / "shards" / "00000.safetensors"
    engine.recorder.flush(str(path), prompts)
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
    columns = torch.stack([shard.top1_prob, shard.entropy, shard.margin, shard.drawn_logprob], dim=1)
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


def test_the_fraction_is_one_of_requests():
    ids = [f"cmpl-{i}-0" for i in range(4000)]
    chosen = {f: {i for i in ids if Engine(f).recorder.wants(i)} for f in (0.001, 0.1, 0.5, 1.0)}
    assert len(chosen[1.0]) == len(ids)
    assert len(chosen[0.1]) == pytest.approx(400, abs=80)  # more than four standard deviations
    assert len(chosen[0.5]) == pytest.approx(2000, abs=140)
    assert chosen[0.001] < chosen[0.1] < chosen[0.5]


def test_requests_outside_the_fraction_are_not_recorded(tmp_path):
    engine = Engine(0.5)
    ids = [str(i) for i in range(20)]
    wanted = [i for i in ids if engine.recorder.wants(i)]
    assert 0 < len(wanted) < 20
    engine.draft(dict.fromkeys(ids, 2))
    engine.verify(dict.fromkeys(ids, (2, 1)))
    assert [p["id"] for p in rounds_of(engine, tmp_path).prompts] == wanted
    alone = [RowState(next(i for i in ids if i not in wanted), 0, 1)]
    assert engine.recorder.new_trace(alone) is None  # nothing is computed for a batch without recorded requests


class TestFlush:
    def test_rounds_of_other_requests_are_dropped(self, tmp_path):
        engine = Engine()
        for request_id in ("0-9f", "1-9f", "1", "a-b-9f", "0-9f-77"):
            engine.round(request_id)
        prompts = {"0": {"id": "p0", "set": "s"}, "a-b": {"id": "p1", "set": "t"}}
        shard = rounds_of(engine, tmp_path, prompts)
        assert [(p["id"], p["set"]) for p in shard.prompts] == [("p0", "s"), ("p1", "t")]
        assert engine.recorder.flush(None, None)["rounds"] == 0  # those of the others do not come later

    def test_the_summary_counts(self, tmp_path):
        engine = Engine()
        engine.round("a", 4, 1)
        engine.round("a", 3, 3)
        summary = engine.recorder.flush(None, None)
        assert summary == {
            "rounds": 2, "steps": 7, "observed": 5, "accepted": 4, "dropped_rounds": 0
        }  # fmt: skip
        assert engine.recorder.flush(None, None)["steps"] == 0

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

    def test_memory_is_bounded(self):
        engine = Engine(max_bytes=2000)
        for _ in range(10):
            engine.round("a")
        summary = engine.recorder.flush(None, None)
        assert 0 < summary["rounds"] < 10
        assert summary["rounds"] + summary["dropped_rounds"] == 10
        engine.round("a")
        assert engine.recorder.flush(None, None)["dropped_rounds"] == 0


class TestServer:
    @pytest.fixture(autouse=True)
    def small_shards(self, monkeypatch):
        monkeypatch.setattr(recorder, "STEPS_PER_SHARD", 10)

    def open(self, tmp_path, **changes):
        return RecordFolder(tmp_path / "data", manifest(**changes))

    def units(self, tmp_path):
        return open_dataset(tmp_path / "data").units()

    def test_shards_are_written_as_they_fill(self, tmp_path):
        engine = Engine(folder=self.open(tmp_path))
        for i in range(8):  # 24 steps: the fourth and the eighth round fill a shard
            engine.round(f"r{i}")
        assert self.units(tmp_path) == [0, 1]
        engine.round("last")
        engine.recorder.close()
        shards = list(open_dataset(tmp_path / "data").shards())
        assert [len(s.num_accepted) for s in shards] == [4, 4, 1]
        assert {(p["id"], p["set"]) for p in shards[2].prompts} == {("last", "server")}

    def test_a_second_run_goes_on_counting(self, tmp_path):
        for _ in range(2):
            engine = Engine(folder=self.open(tmp_path))
            engine.round("a")
            engine.recorder.close()
        assert self.units(tmp_path) == [0, 1]

    def test_the_bound_holds_and_is_told_once(self, tmp_path, caplog):
        first = Engine(folder=self.open(tmp_path))
        for _ in range(4):
            first.round("a")
        size = sum(p.stat().st_size for p in (tmp_path / "data/shards").iterdir())
        first.recorder.close()
        bound = 4 * size
        engine = Engine(max_bytes=bound, folder=self.open(tmp_path))
        with caplog.at_level(logging.INFO, "vllm.specdecpp"):
            for _ in range(60):
                engine.round("a")
        engine.recorder.close()
        assert [m for m in caplog.messages if "record_max_gib" in m] == caplog.messages != []
        assert len(caplog.messages) == 1
        assert 1 < len(self.units(tmp_path)) <= 4
        assert sum(p.stat().st_size for p in (tmp_path / "data/shards").iterdir()) <= bound
        assert not engine.recorder.wants("a")  # so that nothing is computed any more

    def test_after_a_flush_nothing_is_written_without_one(self, tmp_path):
        engine = Engine(folder=self.open(tmp_path))
        engine.recorder.flush(None, None)
        for _ in range(8):
            engine.round("a")
        engine.recorder.close()
        assert self.units(tmp_path) == []
        assert engine.recorder.flush(None, None)["rounds"] == 8

    @pytest.mark.parametrize(
        "error", [OSError(28, "No space left on device"), ValueError("specdecpp: the disk is full")]
    )
    def test_a_full_disk_stops_the_recording_only(self, tmp_path, monkeypatch, caplog, error):
        engine = Engine(folder=self.open(tmp_path))

        def full(*_: Any) -> None:
            raise error

        monkeypatch.setattr(record_folder, "write_shard", full)
        with caplog.at_level(logging.INFO, "vllm.specdecpp"):
            for _ in range(20):
                engine.round("a")
        assert len(caplog.messages) == 1 and "recording stopped" in caplog.messages[0]

    def test_a_disk_that_cannot_follow_costs_rounds_not_memory(self, tmp_path, monkeypatch):
        may_write = threading.Event()
        write = record_folder.write_shard
        monkeypatch.setattr(record_folder, "write_shard", lambda *arguments: may_write.wait(60) and write(*arguments))
        engine = Engine(folder=self.open(tmp_path))
        for _ in range(5 * recorder.MAX_WAITING):
            engine.draft({"a": 10})
            engine.verify({"a": (10, 2)})
        may_write.set()
        engine.recorder.close()
        assert self.units(tmp_path) == list(range(recorder.MAX_WAITING))

    def test_one_engine_at_a_time(self, tmp_path):
        folder = self.open(tmp_path)
        with pytest.raises(ValueError, match=r"^specdecpp: record_dir=.*another engine; name another folder$"):
            self.open(tmp_path)
        folder.close()
        self.open(tmp_path).close()

    def test_the_folder_of_another_pair_is_refused(self, tmp_path):
        self.open(tmp_path).close()
        with pytest.raises(ValueError, match="draft") as caught:
            self.open(tmp_path, draft="org/other")
        assert "\n" not in str(caught.value)

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "data").write_text("a file")
        with pytest.raises(ValueError, match="^specdecpp: ") as caught:
            self.open(tmp_path)
        assert "\n" not in str(caught.value)
