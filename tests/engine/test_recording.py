# SPDX-License-Identifier: Apache-2.0
"""What the engine records is what happened: rounds, the draft's states and features, soft labels, and nothing else.

The oracle is a Hugging Face forward pass of each model over the same tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from tests.exact_law import _filtered
from tests.recordings import (
    LABEL_TOLERANCE,
    REQUESTS,
    assert_rounds_are_the_logged_ones,
    assert_states_are_the_drafts,
    config,
    flush,
    manifest,
    record,
    rounds_by_request,
)
from tests.tiny_models import HIDDEN_SIZE
from vllm_specdecpp.data.shard_file import read_shard
from vllm_specdecpp.data.shards import create_dataset

PROMPT = {"id": "any", "set": "s"}


@pytest.fixture(scope="module", params=["greedy", "probabilistic"])
def llm(request, tiny):
    with harness.engine(tiny.target, config(tiny, draft_sample_method=request.param)) as llm:
        llm.draft_sample_method = request.param
        yield llm


@pytest.fixture(scope="module")
def vllms_own() -> list[Any]:
    """The rejection sampler that the engine started with."""
    return []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recording_changes_no_token_and_no_random_number(llm, vllms_own, temperature):
    """Stands first: the other tests of this engine record from the start."""

    def run() -> tuple[Any, Any, Any, Any]:
        torch.manual_seed(5)
        outputs = harness.generate(llm, REQUESTS, temperature=temperature, seed=7 if temperature else None)
        rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
        return harness.token_ids(outputs), rounds, torch.get_rng_state(), {o.request_id: PROMPT for o in outputs}

    runner = harness.runner(llm)
    if temperature > 0:  # the case before has switched it on
        runner.drafter.recorder, runner.rejection_sampler = None, vllms_own[0]
    else:
        vllms_own[:] = [runner.rejection_sampler]
    assert runner.drafter.recorder is None and type(runner.rejection_sampler).__name__ == "OwnNoise"
    harness.configure(llm, rule="confidence", threshold=0.8)
    harness.take_rounds(llm)
    tokens, rounds, state, _ = run()
    flush(llm)
    recorded_tokens, recorded_rounds, recorded_state, prompts = run()
    assert flush(llm, prompts=prompts)["steps"] == sum(len(c) for r in rounds for c, _, _ in r) > 0
    assert recorded_tokens == tokens
    assert recorded_rounds == rounds
    assert torch.equal(recorded_state, state)


@pytest.mark.parametrize("rule", [{"rule": "confidence", "threshold": 0.8}, {"rule": "fixed", "threshold": None}])
def test_greedy_rounds_and_states(llm, tmp_path, reference, rule):
    harness.configure(llm, **rule)
    outputs, shard = record(llm, tmp_path / "data", REQUESTS, max_tokens=32)
    num_rounds = assert_rounds_are_the_logged_ones(llm, outputs, shard)
    assert num_rounds > 50 and 0.2 < float((shard.outcome == 1).float().mean()) < 0.9
    assert_states_are_the_drafts(shard, REQUESTS, outputs, reference("draft_good"))
    assert shard.soft_label.isnan().all()
    assert set(shard.temperature.tolist()) == {0.0}


@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 6}, {"temperature": 0.7, "top_p": 0.9}],
    ids=["T=1", "top-k", "top-p"],
)  # fmt: skip
def test_soft_labels_are_the_acceptance_probabilities(llm, tmp_path, reference, sampling):
    """min(1, p/q) of the distributions that the sampler compares, at the request's temperature."""
    harness.configure(llm, rule="fixed", threshold=None)
    torch.manual_seed(11)
    outputs, shard = record(llm, tmp_path / "data", REQUESTS, max_tokens=24, **sampling)
    assert_rounds_are_the_logged_ones(llm, outputs, shard)
    assert_states_are_the_drafts(shard, REQUESTS, outputs, reference("draft_good"))
    temperature = sampling["temperature"]
    compared = 0
    for request, rounds in rounds_by_request(shard).items():
        tokens = list(outputs[request].outputs[0].token_ids)
        for steps, index in rounds:
            candidates = shard.token_ids[steps].tolist()
            prefix = [*REQUESTS[request], *tokens[: int(shard.emitted[index])]]
            chosen = torch.tensor(candidates)[:, None]
            p, q = (
                torch.stack([s.logits for s in reference(name).steps([*prefix, *candidates[:-1]], len(candidates))])
                for name in ("target", "draft_good")
            )
            p = _filtered(p, temperature, sampling.get("top_k"), sampling.get("top_p")).gather(1, chosen)[:, 0]
            q = (q.double() / temperature).softmax(-1).gather(1, chosen)[:, 0]
            want = p if llm.draft_sample_method == "greedy" else (p / q).clamp(max=1)
            assert shard.soft_label[steps].tolist() == pytest.approx(want.tolist(), abs=LABEL_TOLERANCE)
            compared += len(candidates)
    assert compared > 100
    assert 0.05 < float(shard.soft_label.mean()) < 0.99
    # The outcome is drawn from the label, which a label of another candidate or request would not fit.
    observed = shard.outcome >= 0
    gap = (shard.outcome[observed].float() - shard.soft_label[observed]).mean()
    assert abs(float(gap)) < 4 * 0.5 / int(observed.sum()) ** 0.5


def test_greedy_and_sampled_requests_of_one_batch(llm, tmp_path):
    from vllm import SamplingParams

    harness.configure(llm, rule="fixed", threshold=None)
    flush(llm)
    params = [SamplingParams(temperature=(0.0, 1.0)[i % 2], max_tokens=20, detokenize=False) for i in range(8)]
    outputs = llm.generate([{"prompt_token_ids": p} for p in REQUESTS], params, use_tqdm=False)
    create_dataset(tmp_path / "data", manifest(), False)
    path = tmp_path / "data/shards/00000.safetensors"
    flush(llm, path, {o.request_id: {"id": str(i), "set": "s"} for i, o in enumerate(outputs)})
    shard = read_shard(path, manifest())
    for request, rounds in rounds_by_request(shard).items():
        for steps, index in rounds:
            assert shard.temperature[index] == request % 2
            assert bool(shard.soft_label[steps].isnan().any()) == bool(shard.soft_label[steps].isnan().all())
            assert bool(shard.soft_label[steps].isnan().all()) == (request % 2 == 0)


def test_a_flush_keeps_the_given_prompts_only(llm, tmp_path):
    flush(llm)
    outputs = harness.generate(llm, REQUESTS, max_tokens=16, ignore_eos=True)
    create_dataset(tmp_path / "data", manifest(), False)
    path = tmp_path / "data/shards/00003.safetensors"
    wanted = {outputs[2].request_id: {"id": "two", "set": "s"}, outputs[5].request_id: {"id": "five", "set": "t"}}
    assert flush(llm, path, wanted)["rounds"] == len(read_shard(path, manifest()).num_accepted)
    assert {(p["id"], p["set"]) for p in read_shard(path, manifest()).prompts} == {("two", "s"), ("five", "t")}
    assert flush(llm, path.with_name("00004.safetensors"))["rounds"] == 0
    assert len(read_shard(path.with_name("00004.safetensors"), manifest()).prompts) == 0


def test_preempted_requests(tiny, tmp_path, reference):
    """A draft whose request was thrown out is dropped; what is recorded around it stays right."""
    requests = harness.prompts(8, seed=9, shortest=40, longest=60)
    with harness.engine(
        tiny.target, config(tiny), num_gpu_blocks_override=14, block_size=32, disable_log_stats=False
    ) as llm:
        outputs, shard = record(llm, tmp_path / "data", requests, max_tokens=90)
        logged = harness.rounds_of(outputs, harness.take_rounds(llm))
        (preemptions,) = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert preemptions > 0
    recorded = rounds_by_request(shard)
    for request, rounds in enumerate(logged):
        mine = [(shard.token_ids[s].tolist(), int(shard.num_accepted[i])) for s, i in recorded[request]]
        assert mine == [(candidates, accepted) for candidates, accepted, _ in rounds if candidates]
    assert_states_are_the_drafts(shard, requests, outputs, reference("draft_good"))


def test_a_head_that_reads_scalars_stops_where_its_score_says(tiny, tmp_path):
    """The rule's inputs, recomputed from the record: states and scalars of the right pass, for the right request."""
    from vllm_specdecpp.decision.features import SCALAR_FEATURES, encode_scalars
    from vllm_specdecpp.head.model import AcceptanceHead

    torch.manual_seed(3)
    head = AcceptanceHead(HIDDEN_SIZE, num_layers=1, features=SCALAR_FEATURES, lag=0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.05)
        list(head.parameters())[-1].copy_(torch.tensor([0.0, 1.5]))
    head.save_pretrained(tmp_path / "head")
    threshold, bound, max_tokens = 0.5, 6, 40
    options = config(tiny, rule="threshold", threshold=threshold, head=str(tmp_path / "head"))
    with harness.engine(tiny.target, options) as llm:
        _, shard = record(llm, tmp_path / "data", REQUESTS, max_tokens=max_tokens)
    scalars = encode_scalars({name: getattr(shard, name) for name in SCALAR_FEATURES}, SCALAR_FEATURES)
    lengths = set()
    for rounds in rounds_by_request(shard).values():
        for steps, index in rounds:
            length = steps.stop - steps.start
            rejected = 1 - head.probability(shard.hidden_states[steps], scalars[steps]).cumprod(0)
            assert (rejected[:-1] <= threshold + 1e-4).all()
            room = max_tokens - int(shard.emitted[index]) - 1
            assert length in (bound, room) or float(rejected[-1]) > threshold - 1e-4
            lengths.add(length)
    assert len(lengths) >= 4


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_records(monkeypatch, rank):
    from vllm_specdecpp.engine.install import SpecDecPPWorkerMixin

    monkeypatch.setattr("vllm.distributed.get_tp_group", lambda: SimpleNamespace(rank_in_group=rank))
    worker = SpecDecPPWorkerMixin()
    sampler, drafter = SimpleNamespace(logprobs_mode="raw_logprobs"), SimpleNamespace(recorder=None)
    worker.model_runner = SimpleNamespace(drafter=drafter, sampler=sampler, rejection_sampler="vLLM's", requests={})
    worker.vllm_config = SimpleNamespace(speculative_config=None, use_v2_model_runner=False)
    worker.device = torch.device("cpu")
    summary = worker.specdecpp_flush_records(None, {})
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
