# SPDX-License-Identifier: Apache-2.0
"""Our metrics in vLLM's registry: they agree with each other, with the rounds, and with vLLM's own counters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests import engine_harness as harness
from vllm_specdecpp.costs import timing

BOUND = 5
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False, "disable_log_stats": False, "per_request_spec_decode_metrics": "detailed"
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(tiny, tmp_path_factory):
    config = {"method": "specdecpp", "model": tiny.draft_good, "num_speculative_tokens": BOUND, "trace_rounds": 100_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(timing, "measure", lambda *args: harness.CHEAP)
        with harness.engine(tiny.target, config, **OPTIONS) as llm:
            runner = harness.runner(llm)
            drafter = getattr(runner, "drafter", None) or runner.speculator
            harness.fix_costs(drafter.cost_aware, harness.CHEAP)
            yield llm


def shown(llm: Any) -> Counter[tuple[str, str]]:
    """(name, own label) -> value, of ours and of vLLM's counters of drafts."""
    found: Counter[tuple[str, str]] = Counter()
    for metric in llm.get_metrics():
        if metric.name.startswith(("vllm:specdecpp_", "vllm:spec_decode_num_")) and hasattr(metric, "value"):
            assert metric.labels["engine"] == "0" and metric.labels["model_name"]
            own = "/".join(v for k, v in sorted(metric.labels.items()) if k not in ("model_name", "engine"))
            found[metric.name.removeprefix("vllm:").removeprefix("specdecpp_"), own] += metric.value
    return found


def serve(llm: Any) -> int:
    """Requests of several kinds; returns how many."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    kinds: list[dict[str, Any]] = [
        {}, {}, {"min_p": 0.1}, {"logit_bias": {5: 1.0}}, {"extra_args": {"specdecpp": "off"}}, {"max_tokens": 1},
        {"structured_outputs": StructuredOutputsParams(regex="[0-9]{12}")}, {"ignore_eos": False, "max_tokens": 60},
    ]  # fmt: skip
    common: dict[str, Any] = {"temperature": 0.5, "max_tokens": 16, "ignore_eos": True, "seed": 1}
    params = [SamplingParams(**{**common, **kind}) for kind in kinds]
    prompts = [{"prompt_token_ids": p} for p in harness.prompts(len(kinds), seed=9)]
    llm.generate(prompts, params, use_tqdm=False)
    return len(kinds)


def total(metrics: Counter[tuple[str, str]], name: str) -> float:
    return sum(value for (found, _), value in metrics.items() if found == name)


def test_metrics_agree(llm):
    harness.take_rounds(llm)
    before = shown(llm)
    num_requests = serve(llm)
    after = shown(llm)
    new = Counter({key: value - before[key] for key, value in after.items()})
    rounds = harness.take_rounds(llm)
    lengths = Counter(str(len(r["candidates"])) for r in rounds)
    assert {label: n for (name, label), n in new.items() if name == "rounds" and n} == lengths and lengths["0"] > 30
    assert total(new, "stops") == len(rounds) and new["stops", "off"] > 30 and new["stops", "limit"] > 0
    assert total(new, "candidates") + total(new, "booked_rows") == new["spec_decode_num_draft_tokens", ""] > 0
    assert total(new, "accepted") == new["spec_decode_num_accepted_tokens", ""] > 0
    assert new["draft_passes", ""] > 0 and new["draft_passes_saved", ""] > 0
    assert total(new, "requests") == num_requests - 1  # that the last one has ended a worker hears with the next step
    why = {label: n for (name, label), n in new.items() if name == "requests" and n}
    assert {name: why[name] for name in ("min_p", "logit_bias", "switched_off", "no_round")} == {
        "min_p": 1, "logit_bias": 1, "switched_off": 1, "no_round": 1
    }  # fmt: skip
    assert why["drafted"] >= 2
    assert 0 < new["observed_accepted", ""] <= new["observed_candidates", ""] <= total(new, "candidates")
    assert 0 < new["estimated_accepted", ""] <= new["observed_candidates", ""]
    assert after["rho", ""] > 0 and after["cost_seconds", "64/verify"] == harness.CHEAP["verify"][64]
    assert after["exploring_seconds", ""] >= 0
    assert shown(llm) == after  # nothing is counted twice
    llm.collective_rpc("specdecpp_stats", kwargs={"reset": True})
    assert shown(llm) == after


def test_vllms_metrics_of_one_request_are_those_of_its_rounds(llm):
    harness.take_rounds(llm)
    outputs = harness.generate(llm, harness.prompts(3, seed=9), ignore_eos=True)
    for output, rounds in zip(outputs, harness.rounds_of(outputs, harness.take_rounds(llm)), strict=True):
        told = output.outputs[0].spec_decode_metrics
        steps = list(zip(told.per_step_drafted, told.per_step_accepted, strict=True))
        assert steps == [(len(candidates), accepted) for candidates, accepted, _ in rounds if candidates] != []


def test_one_line_is_logged_beside_vllms(llm, caplog):
    shown(llm)
    llm.llm_engine._specdecpp_metrics.log()
    caplog.clear()
    serve(llm)
    llm.llm_engine.do_log_stats()
    llm.llm_engine.do_log_stats()  # nothing new
    (line,) = [r.message for r in caplog.records if r.message.startswith("specdecpp: ") and "K = 0" in r.message]
    for word in ("mean candidate length", "draft passes", "acceptance estimated", "rho"):
        assert word in line
