# SPDX-License-Identifier: Apache-2.0
"""What the engine records is what happened: rounds, the draft's states and features, soft labels, and nothing else.

The oracle is a Hugging Face forward pass of each model over the same tokens.
"""

from __future__ import annotations

import inspect
import json
import urllib.request
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import engine_harness as harness
from tests.exact_law import _filtered
from tests.tiny_models import HIDDEN_SIZE
from vllm_specdecpp.training.shards import Manifest, create_dataset, open_dataset, read_shard

STATE_TOLERANCE = 2e-4
"""float32, two implementations: hidden states of unit size, logits of size 10."""
LABEL_TOLERANCE = 2e-3
"""A quotient of probabilities, whose logits differ by ``STATE_TOLERANCE``."""
EVERY_SCALAR = ("top1_prob", "entropy", "margin", "drawn_logprob")


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "kind": "rounds", "target": "target", "draft": "draft", "target_revision": None, "draft_revision": None,
        "hidden_size": HIDDEN_SIZE, "source": "on-policy", "sampling": {}, "num_candidates": 6, "prompts_digest": "",
        "num_prompts": 0, "unit_size": 0, "versions": {}, "git": None, "command": "",
        "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def config(tiny, **options: Any) -> dict[str, Any]:
    return {
        "method": "specdecpp", "model": tiny.draft_good, "rule": "confidence", "threshold": 0.8,
        "num_speculative_tokens": 6, "trace_rounds": 100_000, **options,
    }  # fmt: skip


def flush(llm: Any, path: Any = None, prompts: Any = None) -> dict[str, Any]:
    """Also starts recording."""
    arguments = {"path": None if path is None else str(path), "prompts": prompts}
    return llm.collective_rpc("specdecpp_flush_records", kwargs=arguments)[0]


def record(llm: Any, folder: Any, requests: list[list[int]], **sampling: Any) -> tuple[list[Any], Any]:
    """Generate; the outputs, and the shard with the requests' numbers as prompt ids."""
    flush(llm)
    harness.take_rounds(llm)
    outputs = harness.generate(llm, requests, **{"ignore_eos": True, **sampling})
    create_dataset(folder, manifest(), False)
    path = folder / "shards" / "00000.safetensors"
    prompts = {o.request_id: {"id": str(i), "set": "s"} for i, o in enumerate(outputs)}
    summary = flush(llm, path, prompts)
    shard = read_shard(path, manifest())
    assert summary["steps"] == len(shard.token_ids)
    assert summary["observed"] == int((shard.outcome >= 0).sum())
    assert summary["accepted"] == int((shard.outcome == 1).sum()) == int(shard.num_accepted.sum())
    return outputs, shard


def rounds_by_request(shard: Any) -> dict[int, list[tuple[slice, int]]]:
    """Request → its rounds, in order: their steps, and their index."""
    grouped = defaultdict(list)
    bounds = shard.round_starts.tolist()
    for index, prompt in enumerate(shard.prompt_index.tolist()):
        grouped[int(shard.prompts[prompt]["id"])].append((slice(bounds[index], bounds[index + 1]), index))
    return grouped


def assert_rounds_are_the_logged_ones(llm: Any, outputs: list[Any], shard: Any) -> int:
    """Candidates, accepted counts, outcomes and positions; returns the number of rounds."""
    logged = harness.rounds_of(outputs, harness.take_rounds(llm))
    recorded = rounds_by_request(shard)
    for request, rounds in enumerate(logged):
        emitted, mine = 1, iter(recorded[request])
        for candidates, accepted, _ in rounds:
            if candidates:
                steps, index = next(mine)
                assert shard.token_ids[steps].tolist() == candidates
                assert shard.num_accepted[index] == accepted
                assert shard.emitted[index] == emitted
                rejected = [0] if accepted < len(candidates) else []
                unknown = [-1] * (len(candidates) - accepted - len(rejected))
                assert shard.outcome[steps].tolist() == [1] * accepted + rejected + unknown
            emitted += accepted + 1
        assert next(mine, None) is None
    return len(shard.num_accepted)


def assert_states_are_the_drafts(shard: Any, requests: list[list[int]], outputs: list[Any], draft: Any) -> None:
    """Hidden states and every scalar feature equal those of the Hugging Face draft on the same prefix."""
    for request, rounds in rounds_by_request(shard).items():
        tokens = list(outputs[request].outputs[0].token_ids)
        for steps, index in rounds:
            candidates = shard.token_ids[steps].tolist()
            prefix = [*requests[request], *tokens[: int(shard.emitted[index])]]
            want = draft.steps([*prefix, *candidates[:-1]], len(candidates))
            states = torch.stack([s.hidden for s in want])  # [num_steps, hidden_size]
            torch.testing.assert_close(shard.hidden_states[steps], states, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)
            logits = torch.stack([s.logits for s in want])  # [num_steps, vocab_size]
            logprobs = logits.log_softmax(-1)
            largest = logits.topk(2).values
            columns = {
                "top1_prob": logprobs.exp().amax(-1),
                "entropy": -(logprobs.exp() * logprobs).sum(-1),
                "margin": largest[:, 0] - largest[:, 1],
                "drawn_logprob": logprobs.gather(1, torch.tensor(candidates)[:, None]).squeeze(1),
            }
            for name, column in columns.items():
                torch.testing.assert_close(getattr(shard, name)[steps], column, atol=1e-3, rtol=1e-3, msg=name)


REQUESTS = harness.prompts(8, seed=21)


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

    def run() -> tuple[Any, Any, Any]:
        torch.manual_seed(5)
        outputs = harness.generate(llm, REQUESTS, temperature=temperature, seed=7 if temperature else None)
        rounds = harness.rounds_of(outputs, harness.take_rounds(llm))
        return harness.token_ids(outputs), rounds, torch.get_rng_state()

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    if temperature > 0:  # the case before has switched it on
        runner.drafter.recorder, runner.rejection_sampler = None, vllms_own[0]
    else:
        vllms_own[:] = [runner.rejection_sampler]
    assert runner.drafter.recorder is None and type(runner.rejection_sampler).__name__ == "RejectionSampler"
    harness.configure(llm, rule="confidence", threshold=0.8)
    harness.take_rounds(llm)
    tokens, rounds, state = run()
    flush(llm)
    recorded_tokens, recorded_rounds, recorded_state = run()
    assert flush(llm)["steps"] == sum(len(c) for r in rounds for c, _, _ in r) > 0
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


def test_step_times_agree_with_the_counters(llm):
    harness.configure(llm, rule="fixed", threshold=None)
    llm.collective_rpc("specdecpp_step_times", kwargs={"clear": True})
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    (output,) = harness.generate(llm, REQUESTS[:1], max_tokens=20, ignore_eos=True)
    steps = llm.collective_rpc("specdecpp_step_times", kwargs={"clear": True})[0]
    stats = llm.collective_rpc("specdecpp_stats")[0]
    assert sum(s["passes"] for s in steps) == stats["draft_passes"]
    first, *rounds = steps
    assert (first["num_new"], first["rows"]) == (1, len(REQUESTS[0]))
    assert len(rounds) == stats["rounds"]
    assert sum(s["rows"] - 1 for s in rounds) == stats["candidates"]
    assert all(s["num_new"] == 0 and s["num_reqs"] == 1 for s in rounds)
    assert all(s["draft_seconds"] > 0 and s["since_last_seconds"] > 0 for s in rounds)
    assert llm.collective_rpc("specdecpp_step_times")[0] == []


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
    from vllm_specdecpp.decision.features import encode_scalars
    from vllm_specdecpp.head import AcceptanceHead

    torch.manual_seed(3)
    head = AcceptanceHead(HIDDEN_SIZE, num_layers=1, features=EVERY_SCALAR)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.05)
        list(head.parameters())[-1].copy_(torch.tensor([0.0, 1.5]))
    head.save_pretrained(tmp_path / "head")
    threshold, bound, max_tokens = 0.5, 6, 40
    options = config(tiny, rule="threshold", threshold=threshold, head=str(tmp_path / "head"))
    with harness.engine(tiny.target, options) as llm:
        _, shard = record(llm, tmp_path / "data", REQUESTS, max_tokens=max_tokens)
    scalars = encode_scalars({name: getattr(shard, name) for name in EVERY_SCALAR}, EVERY_SCALAR)
    lengths = set()
    for rounds in rounds_by_request(shard).values():
        for steps, index in rounds:
            length = steps.stop - steps.start
            # The state that read candidate k is that of step k + 1, its scalars are those of step k.
            read = slice(steps.start + 1, steps.stop)
            produced = slice(steps.start, steps.stop - 1)
            accept = head.probability(shard.hidden_states[read], scalars[produced]) if length > 1 else torch.ones(0)
            rejected = 1 - accept.cumprod(0)
            assert (rejected[:-1] <= threshold + 1e-4).all()
            room = max_tokens - int(shard.emitted[index]) - 1
            assert length in (bound, room) or float(rejected[-1]) > threshold - 1e-4
            lengths.add(length)
    assert len(lengths) >= 4


class TestServerMode:
    def shards(self, folder: Any) -> list[Any]:
        return sorted((folder / "shards").glob("*.safetensors"))

    def test_the_engine_writes_by_itself_up_to_the_bound(self, tiny, tmp_path, monkeypatch):
        from vllm_specdecpp.engine import recorder

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

    def test_the_rest_is_written_when_the_engine_ends(self, tiny, tmp_path):
        options = config(tiny, record_dir=str(tmp_path / "data"))
        with harness.engine(tiny.target, options) as llm:
            outputs = harness.generate(llm, REQUESTS[:3], max_tokens=16, ignore_eos=True)
            rounds = harness.take_rounds(llm)
            assert self.shards(tmp_path / "data") == []
        (shard,) = open_dataset(tmp_path / "data").shards()
        assert {p["set"] for p in shard.prompts} == {"server"}
        assert {p["id"] for p in shard.prompts} == {r["request_id"] for r in rounds}
        assert len(outputs) == len(shard.prompts)
        assert len(shard.token_ids) == sum(len(r["candidates"]) for r in rounds)

    def test_a_fraction_of_the_requests(self, tiny, tmp_path):
        options = config(tiny, record_dir=str(tmp_path / "data"), record_fraction=0.4)
        with harness.engine(tiny.target, options) as llm:
            harness.generate(llm, harness.prompts(24, seed=3), max_tokens=8, ignore_eos=True)
            rounds = harness.take_rounds(llm)
            wants = harness.proposer(llm).recorder.wants
            chosen = {r["request_id"] for r in rounds if r["candidates"] and wants(r["request_id"])}
            others = {r["request_id"] for r in rounds if not wants(r["request_id"])}
        assert chosen and others
        (shard,) = open_dataset(tmp_path / "data").shards()
        assert {p["id"] for p in shard.prompts} == chosen

    def test_a_server_writes_what_it_served(self, tiny, tmp_path):
        """Processes of its own, ended in order: what was recorded until then is on disk."""
        from tests.engine.test_server import _server

        options = json.dumps(config(tiny, record_dir=str(tmp_path / "data")))
        arguments = ["--speculative-config", options, "--shutdown-timeout", "30"]
        with _server(tiny.target, arguments, tmp_path / "server.log") as url:
            for prompt in REQUESTS[:4]:
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
                request = urllib.request.Request(
                    f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=60) as response:
                    assert json.load(response)["usage"]["completion_tokens"] == 16
        (shard,) = open_dataset(tmp_path / "data").shards()
        assert len(shard.prompts) == 4 and {p["set"] for p in shard.prompts} == {"server"}
        accepted = torch.zeros(4).index_add_(0, shard.prompt_index.long(), shard.num_accepted.float())
        rounds = shard.prompt_index.bincount(minlength=4)
        assert (accepted + rounds <= 15).all() and (accepted + rounds >= 10).all()

    def test_the_dataset_of_another_pair_is_refused_at_start_up(self, tiny, tmp_path):
        create_dataset(tmp_path / "data", manifest(source="server"), False)
        options = config(tiny, record_dir=str(tmp_path / "data"))
        with pytest.raises(ValueError, match=r"specdecpp: ") as caught, harness.engine(tiny.target, options):
            pass
        assert "\n" not in str(caught.value)

    def test_outcomes_that_are_made_up_are_not_recorded(self, tiny, tmp_path):
        options = config(
            tiny,
            record_dir=str(tmp_path / "data"),
            rejection_sample_method="synthetic",
            synthetic_acceptance_length=2.0,
        )
        with (
            pytest.raises(ValueError, match=r"^specdecpp: rejection_sample_method='synthetic' cannot be recorded"),
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
    worker.vllm_config, worker.device = SimpleNamespace(speculative_config=None), torch.device("cpu")
    summary = worker.specdecpp_flush_records()
    if rank == 0:
        assert summary["rounds"] == 0
        assert drafter.recorder is not None and worker.model_runner.rejection_sampler != "vLLM's"
    else:
        assert summary == {}
        assert drafter.recorder is None and worker.model_runner.rejection_sampler == "vLLM's"


def test_acceptance_is_the_quotient_cut_at_1():
    from vllm_specdecpp.engine.recording_sampler import acceptance

    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.0, 0.5, 0.5], [0.2, 0.3, 0.5]])
    q = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.0, 0.4, 0.6]])
    tokens = torch.tensor([0, 2, 0, 0])
    assert acceptance(p.log(), q, tokens).tolist() == pytest.approx([0.5, 1.0, 0.0, 0.0])
    assert acceptance(p.log(), None, tokens).tolist() == pytest.approx([0.5, 0.8, 0.0, 0.2])


def test_top_k_of_no_rows_is_mended():
    """Without the mend, top-k ends the engine at its first prefill; when the first line fails, the mend can go."""
    from vllm.v1.sample.ops import topk_topp_sampler

    from vllm_specdecpp.engine import empty_top_k

    mended = topk_topp_sampler.apply_top_k_only
    try:
        topk_topp_sampler.apply_top_k_only = inspect.unwrap(mended)
        assert empty_top_k.is_broken()
        assert empty_top_k.apply()
        assert not empty_top_k.is_broken()
        assert not empty_top_k.apply()
        logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
        kept = topk_topp_sampler.apply_top_k_only(logits, torch.tensor([1, 2]))
        assert kept.isfinite().tolist() == [[False, True, False], [False, True, True]]
    finally:
        topk_topp_sampler.apply_top_k_only = mended


class TestCollect:
    """The command on tiny models, in this process."""

    def options(self, tiny, tmp_path, **changes: Any) -> Any:
        from vllm_specdecpp.training.collect import CollectOptions

        texts = ["one word", "a somewhat longer prompt", "x" * 400, "the end", "five"]
        lines = [json.dumps({"id": f"p{i}", "set": f"s{i % 2}", "prompt": text}) for i, text in enumerate(texts)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        fields = {
            "target": tiny.target, "draft": tiny.draft_good, "prompts": str(tmp_path / "prompts.jsonl"),
            "out": tmp_path / "data", "max_tokens": 16, "candidates": 4, "batch": 2, "unit": 2, "eager": True,
            "dtype": "float32", "max_model_len": 192, **changes,
        }  # fmt: skip
        return CollectOptions(**fields)

    def test_on_policy(self, tiny, tmp_path, reference, capsys):
        from vllm_specdecpp.training.collect import run

        options = self.options(tiny, tmp_path)
        assert run(options) == 0
        told = capsys.readouterr()
        assert "1 prompts were left out: too long" in told.err and "labels" in told.out
        dataset = open_dataset(options.out)
        assert dataset.done_units() == {0, 1, 2}
        assert dataset.manifest.hidden_size == HIDDEN_SIZE
        responses = [
            json.loads(line) for p in sorted((options.out / "responses").iterdir()) for line in p.open(encoding="utf-8")
        ]
        assert [(r["id"], r["set"]) for r in responses] == [("p0", "s0"), ("p1", "s1"), ("p3", "s1"), ("p4", "s0")]
        for row in responses:
            output: list[int] = []
            for token in row["token_ids"]:
                output.append(reference("target").steps([*row["prompt_token_ids"], *output])[0].token)
                assert output[-1] == token
        by_id = {r["id"]: r for r in responses}
        for shard in dataset.shards():
            for index, prompt in enumerate(shard.prompt_index.tolist()):
                row = by_id[shard.prompts[prompt]["id"]]
                start, stop = shard.round_starts[index : index + 2].tolist()
                emitted, accepted = int(shard.emitted[index]), int(shard.num_accepted[index])
                kept = row["token_ids"][emitted : emitted + accepted]
                assert shard.token_ids[start:stop].tolist()[: len(kept)] == kept
                assert 1 <= stop - start <= 4
        # Once more: nothing is left to do, and no engine starts.
        before = {p: p.stat().st_mtime_ns for p in options.out.rglob("*.safetensors")}
        assert run(options) == 0
        assert {p: p.stat().st_mtime_ns for p in options.out.rglob("*.safetensors")} == before

    def test_a_lost_shard_is_collected_again(self, tiny, tmp_path):
        """Sampled answers too: every prompt keeps its seed."""
        from vllm_specdecpp.training.collect import run

        options = self.options(tiny, tmp_path, temperature=1.0, limit=4)
        run(options)
        lost, kept = (options.out / "shards" / f"0000{i}.safetensors" for i in (1, 0))
        responses = (options.out / "responses" / "00001.jsonl").read_text()
        before = kept.stat().st_mtime_ns
        lost.unlink()
        run(options)
        assert lost.is_file() and kept.stat().st_mtime_ns == before
        assert (options.out / "responses" / "00001.jsonl").read_text() == responses

    def test_a_target_that_is_no_model(self, tiny, tmp_path):
        from vllm_specdecpp.training.collect import run

        with pytest.raises(ValueError, match=r"^specdecpp: target='.*nothing' cannot be loaded") as caught:
            run(self.options(tiny, tmp_path, target=str(tmp_path / "nothing")))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "data").exists()
