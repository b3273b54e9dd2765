# SPDX-License-Identifier: Apache-2.0
"""Step costs: which steps count, the order of the lengths, and a run of the real engine with tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_specdecpp.training.replay.costs import Costs
from vllm_specdecpp.training.replay.measure import (
    MeasureOptions,
    Samples,
    check_options,
    default_max_model_len,
    report,
    run,
    summarize,
    time_rounds,
)


def options(tmp_path: Path, **changes: Any) -> MeasureOptions:
    values: dict[str, Any] = {
        "target": "t", "draft": "d", "prompts": "p.jsonl", "out": tmp_path / "costs.json", "lengths": [1, 2, 4],
        "rounds_each": 5, "max_tokens": 40, "num_prompts": 2, "max_model_len": 192,
    }  # fmt: skip
    return MeasureOptions(**(values | changes))


def step(passes: int, rows: int, *, num_reqs: int = 1, num_new: int = 0, since: float | None = 0.2) -> dict[str, Any]:
    return {
        "num_reqs": num_reqs, "rows": rows, "num_new": num_new, "passes": passes, "draft_seconds": 0.1 * passes,
        "since_last_seconds": since,
    }  # fmt: skip


class TestWhichStepsCount:
    def test_prefill_and_cut_rounds_do_not(self) -> None:
        """A prompt as long as a round must not be taken for one, nor rounds that the request's limit cut."""
        steps = [
            step(3, 4, num_new=1, since=9.0),  # the prompt, of 4 tokens
            step(3, 4),
            step(3, 4),
            step(2, 4),  # the last draft, cut by the limit
            step(0, 3, since=0.19),  # its verification, and no draft after it
        ]
        samples = Samples()
        samples.take(steps, length=3, batch=1)
        assert samples.draft == pytest.approx([0.3, 0.3])
        assert samples.verify == [0.2, 0.2, 0.2]
        assert samples.num_rounds == 2

    def test_only_whole_batches_count(self) -> None:
        samples = Samples()
        samples.take([step(2, 6, num_reqs=2), step(2, 5, num_reqs=2), step(2, 3)], length=2, batch=2)
        assert (len(samples.draft), len(samples.verify)) == (2, 1)  # 5 rows: one request verified one token less

    def test_first_step_of_an_engine(self) -> None:
        samples = Samples()
        samples.take([step(2, 3, since=None)], length=2, batch=1)
        assert (len(samples.draft), len(samples.verify)) == (1, 0)


class FakeEngine:
    """Answers with the step times of whole rounds, and notes what was asked of it."""

    def __init__(self, rounds_a_prompt: dict[int, int]) -> None:
        self.rounds_a_prompt = rounds_a_prompt
        self.length = 0
        self.order: list[tuple[int, int]] = []  # (length, first token id of the prompt)
        self.steps: list[dict[str, Any]] = []

    def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> list[Any]:
        if name == "specdecpp_configure":
            assert kwargs["rule"] == "fixed"
            self.length = kwargs["num_speculative_tokens"]
            return [{}]
        assert (name, kwargs) == ("specdecpp_step_times", {"clear": True})
        steps, self.steps = self.steps, []
        return [steps]

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool) -> None:
        self.order.append((self.length, prompts[0]["prompt_token_ids"][0]))
        rounds = self.rounds_a_prompt[self.length]
        self.steps += [step(self.length, 9, num_new=1)] + [step(self.length, self.length + 1)] * rounds


class TestOrder:
    def test_lengths_take_turns_on_every_prompt(self, tmp_path: Path) -> None:
        engine = FakeEngine({1: 2, 2: 2, 4: 2})
        samples = time_rounds(engine, [[[7]], [[8]]], options(tmp_path))
        warm_up, measured = engine.order[:3], engine.order[3:]
        assert warm_up == [(1, 7), (2, 7), (4, 7)]
        assert measured == [(1, 7), (2, 7), (4, 7), (2, 8), (4, 8), (1, 8), (4, 7), (1, 7), (2, 7)]
        assert {k: s.num_rounds for k, s in samples.items()} == {1: 6, 2: 6, 4: 6}  # the warm-up's do not count

    def test_a_length_that_has_enough_pauses(self, tmp_path: Path) -> None:
        engine = FakeEngine({1: 9, 2: 9, 4: 1})
        samples = time_rounds(engine, [[[7]]], options(tmp_path))
        assert [length for length, _ in engine.order[3:]] == [1, 2, 4, 4, 4, 4, 4]
        assert samples[4].num_rounds == 5

    def test_a_length_without_whole_rounds_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="^specdecpp: no whole round of 4 candidates in 40 tokens") as error:
            time_rounds(FakeEngine({1: 9, 2: 9, 4: 0}), [[[7]], [[8]]], options(tmp_path))
        assert "\n" not in str(error.value)


class TestSummary:
    def test_medians_and_quartiles(self, tmp_path: Path) -> None:
        samples = {
            1: Samples([0.1, 0.2, 0.9], [1.0, 2.0, 3.0]),
            2: Samples([0.3, 0.4, 0.5, 0.6], [5.0]),
        }
        costs = summarize(samples, [0.7, 0.5, 0.6], options(tmp_path))
        assert (costs.draft_seconds, costs.verify_seconds) == ({1: 0.2, 2: 0.45}, {2: 2.0, 3: 5.0})
        assert costs.off_seconds == 0.6
        assert costs.quartiles["verify_seconds"] == {"2": [1.5, 2.5], "3": [5.0, 5.0]}
        assert costs.num_samples["draft_seconds"] == {"1": 3, "2": 4}
        assert "| 1 | 200.0 (150.0-550.0) | 2000.0 (1500.0-2500.0) | 3 |" in report(costs)


class TestLongestSequence:
    @pytest.mark.parametrize(("target", "draft", "longest"), [(512, 4096, 512), (4096, 700, 700), (4096, 2048, 1024)])
    def test_default_is_the_models_own_at_most(self, tmp_path: Path, target: int, draft: int, longest: int) -> None:
        for name, bound in (("target", target), ("draft", draft)):
            (tmp_path / name).mkdir()
            config = {"model_type": "llama", "max_position_embeddings": bound}
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        chosen = options(
            tmp_path, target=str(tmp_path / "target"), draft=str(tmp_path / "draft"), max_model_len=None
        )  # fmt: skip
        assert default_max_model_len(chosen) == longest

    def test_a_model_without_a_config_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="^specdecpp: target=.*cannot be loaded") as error:
            default_max_model_len(options(tmp_path, target=str(tmp_path / "nothing"), max_model_len=None))
        assert "\n" not in str(error.value)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"lengths": [3]}, "lengths=[3]"),
            ({"lengths": [0, 2]}, "lengths=[0, 2]"),
            ({"lengths": [2, 2, 3]}, "lengths=[2, 2, 3]"),
            ({"lengths": [1, 129], "max_tokens": 900}, "lengths=[1, 129]"),
            ({"max_tokens": 14}, "give at least 15"),
            ({"max_tokens": 192}, "max_model_len=192"),
        ],
    )
    def test_options(self, tmp_path: Path, changes: dict[str, Any], named: str) -> None:
        with pytest.raises(ValueError, match="^specdecpp: ") as error:
            check_options(options(tmp_path, **changes))
        assert named in str(error.value) and "\n" not in str(error.value)

    def test_costs_are_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "costs.json").write_text("mine")
        with pytest.raises(ValueError, match="^specdecpp: .*exists.*--force"):
            run(options(tmp_path))
        check_options(options(tmp_path, force=True))


class TestRealEngine:
    @pytest.mark.parametrize(("batch", "max_model_len"), [(1, None), (2, 192)])
    def test_costs_of_tiny_models(self, tiny: Any, tmp_path: Path, batch: int, max_model_len: int | None) -> None:
        """By default the models' bound, 512 tokens, is kept to."""
        prompts = tmp_path / "prompts.jsonl"
        lines = [{"prompt": "Write a sentence about words."}, {"prompt": "Indent this text, please."}]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        chosen = options(
            tmp_path, target=tiny.target, draft=tiny.draft_good, prompts=str(prompts), dtype="float32", eager=True,
            batch=batch, kv_cache_mib=64, max_model_len=max_model_len,
        )  # fmt: skip
        assert run(chosen) == 0
        costs = Costs.load(tmp_path / "costs.json")
        assert (sorted(costs.draft_seconds), sorted(costs.verify_seconds)) == ([1, 2, 4], [2, 3, 5])
        assert costs.batch == batch and costs.machine and "torch" in costs.versions
        for name in ("draft_seconds", "verify_seconds"):
            assert all(num >= 5 for num in costs.num_samples[name].values())
            for k, seconds in getattr(costs, name).items():
                low, high = costs.quartiles[name][str(k)]
                assert low <= seconds <= high
        # Four passes take longer than one; a step's time is not a request's or a run's.
        assert costs.draft(1) < costs.draft(4) < 20 * costs.draft(1)
        assert 0 < costs.off_seconds < 1 and 0 < costs.verify(2) < 1
