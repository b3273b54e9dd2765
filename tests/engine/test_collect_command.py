# SPDX-License-Identifier: Apache-2.0
"""The command ``collect`` with the real engine and tiny models."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tiny_models import HIDDEN_SIZE
from vllm_specdecpp.data.shards import open_dataset


class TestCollect:
    """The command on tiny models, in this process."""

    def options(self, tiny, tmp_path, **changes: Any) -> Any:
        from vllm_specdecpp.training.collect.options import CollectOptions

        texts = ["one word", "a somewhat longer prompt", "x" * 400, "the end", "five"]
        lines = [json.dumps({"id": f"p{i}", "set": f"s{i % 2}", "prompt": text}) for i, text in enumerate(texts)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        fields = {
            "target": tiny.target, "draft": tiny.draft_good, "prompts": str(tmp_path / "prompts.jsonl"),
            "out": tmp_path / "data", "max_tokens": 16, "candidates": 4, "batch": 2, "unit": 2, "eager": True,
            "dtype": "float32", "max_model_len": 192, **changes,
        }  # fmt: skip
        return CollectOptions(**fields)

    def test_on_policy(self, tiny, tmp_path, reference, capsys, monkeypatch):
        """Where vLLM would choose Model Runner V2, as on a GPU: V1 alone records."""
        from vllm_specdecpp.training.collect.command import run

        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
        monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
        options = self.options(tiny, tmp_path)
        assert run(options) == 0
        assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ  # the next engine is not to record
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

    @pytest.mark.slow  # two engines
    def test_a_lost_shard_is_collected_again(self, tiny, tmp_path):
        """Sampled answers too: every prompt keeps its seed."""
        from vllm_specdecpp.training.collect.command import run

        options = self.options(tiny, tmp_path, temperature=1.0, limit=4)
        run(options)
        lost, kept = (options.out / "shards" / f"0000{i}.safetensors" for i in (1, 0))
        responses = (options.out / "responses" / "00001.jsonl").read_text()
        before = kept.stat().st_mtime_ns
        lost.unlink()
        run(options)
        assert lost.is_file() and kept.stat().st_mtime_ns == before
        assert (options.out / "responses" / "00001.jsonl").read_text() == responses

    @pytest.mark.parametrize(("temperature", "seeds"), [(1.0, [5_000_015 + 4, 5_000_015 + 5]), (0.0, [None, None])])
    def test_every_prompt_has_its_own_seed(self, tiny, tmp_path, temperature, seeds):
        """Whichever unit is collected again."""
        from vllm_specdecpp.training.collect.on_policy import OnPolicyCollector

        collector = OnPolicyCollector.__new__(OnPolicyCollector)
        collector._options = self.options(tiny, tmp_path, temperature=temperature, seed=5)
        collector._llm = SimpleNamespace(generate=lambda prompts, params, **_: params)
        assert [params.seed for params in collector._generate(2, [[1], [2]])] == seeds
