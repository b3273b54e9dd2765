# SPDX-License-Identifier: Apache-2.0
"""Recording without a command: what a server writes by itself, which rank writes, and the sampler that records."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from tests.recordings import (
    REQUESTS,
    config,
    manifest,
)
from vllm_specdecpp.data.shards import create_dataset, open_dataset


class TestServerMode:
    def shards(self, folder: Any) -> list[Any]:
        return sorted((folder / "shards").glob("*.safetensors"))

    def test_the_engine_writes_by_itself_up_to_the_bound(self, tiny, tmp_path, monkeypatch):
        from vllm_specdecpp.engine.recording import recorder

        monkeypatch.setattr(recorder, "STEPS_PER_SHARD", 64)
        bound = 200 << 10
        options = config(tiny, record_dir=str(tmp_path / "data"), record_max_gib=bound / 2**30)
        with harness.engine(tiny.target, options) as llm:
            for _ in range(6):
                harness.generate(llm, REQUESTS, max_tokens=32, ignore_eos=True)
            assert not harness.proposer(llm).recorder.wants("a")
        files = self.shards(tmp_path / "data")
        assert [f.stem for f in files] == [f"{i:05d}" for i in range(len(files))]
        assert len(files) > 2
        assert bound / 2 < sum(f.stat().st_size for f in files) <= bound
        dataset = open_dataset(tmp_path / "data")
        assert dataset.manifest.source == "server"
        assert all(len(s.token_ids) >= 64 for s in dataset.shards())

    def test_the_rest_is_written_when_the_engine_ends_of_a_fraction_of_the_requests(self, tiny, tmp_path):
        options = config(tiny, record_dir=str(tmp_path / "data"), record_fraction=0.4)
        with harness.engine(tiny.target, options) as llm:
            harness.generate(llm, harness.prompts(24, seed=3), max_tokens=8, ignore_eos=True)
            rounds = harness.take_rounds(llm)
            wants = harness.proposer(llm).recorder.wants
            chosen = {r["request_id"] for r in rounds if r["candidates"] and wants(r["request_id"])}
            others = {r["request_id"] for r in rounds if not wants(r["request_id"])}
            assert self.shards(tmp_path / "data") == []
        assert chosen and others
        (shard,) = open_dataset(tmp_path / "data").shards()
        assert {p["set"] for p in shard.prompts} == {"server"}
        assert {p["id"] for p in shard.prompts} == chosen and len(shard.prompts) == len(chosen)
        assert len(shard.token_ids) == sum(len(r["candidates"]) for r in rounds if r["request_id"] in chosen)

    def test_the_dataset_of_another_pair_is_refused_at_start_up(self, tiny, tmp_path):
        create_dataset(tmp_path / "data", manifest(source="server"), False)
        options = config(tiny, record_dir=str(tmp_path / "data"))
        with pytest.raises(ValueError, match=r"specdecpp: ") as caught, harness.engine(tiny.target, options):
            pass
        assert "\n" not in str(caught.value)

    def test_outcomes_of_whole_blocks_are_not_recorded(self, tiny, tmp_path):
        options = config(tiny, record_dir=str(tmp_path / "data"), rejection_sample_method="block")
        with (
            pytest.raises(ValueError, match=r"^specdecpp: rejection_sample_method='block' cannot be recorded"),
            harness.engine(tiny.target, options),
        ):
            pass
        assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_records(monkeypatch, rank):
    from vllm_specdecpp.config import SpecDecPPConfig
    from vllm_specdecpp.engine.install import SpecDecPPWorkerMixin

    monkeypatch.setattr("vllm.distributed.get_tp_group", lambda: SimpleNamespace(rank_in_group=rank))
    worker = SpecDecPPWorkerMixin()
    sampler = SimpleNamespace(logprobs_mode="raw_logprobs")
    drafter = SimpleNamespace(recorder=None, config=SpecDecPPConfig(model="d"))
    worker.model_runner = SimpleNamespace(drafter=drafter, sampler=sampler, rejection_sampler="vLLM's", requests={})
    worker.vllm_config = SimpleNamespace(speculative_config=None, use_v2_model_runner=False)
    worker.device = torch.device("cpu")
    summary = worker.specdecpp_flush_records()
    if rank == 0:
        assert summary["rounds"] == 0
        assert drafter.recorder is not None and worker.model_runner.rejection_sampler != "vLLM's"
    else:
        assert summary == {}
        assert drafter.recorder is None and worker.model_runner.rejection_sampler == "vLLM's"


def test_acceptance_is_the_quotient_cut_at_1():
    from vllm_specdecpp.engine.recording.sampler import acceptance

    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.0, 0.5, 0.5], [0.2, 0.3, 0.5]])
    q = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.0, 0.4, 0.6]])
    tokens = torch.tensor([0, 2, 0, 0])
    assert acceptance(p.log(), q, tokens).tolist() == pytest.approx([0.5, 1.0, 0.0, 0.0])
    assert acceptance(p.log(), None, tokens).tolist() == pytest.approx([0.5, 0.8, 0.0, 0.2])
