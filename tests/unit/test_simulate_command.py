# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.simulate``: the streams that it plays, its errors, and what it writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.simulate import play as simulate
from benchmarks.simulate.streams import make, recorded
from tests.dataset_files import make_manifest
from vllm_specdecpp.data.shard_file import RoundRecord, shard_from_rounds, write_shard
from vllm_specdecpp.data.shards import create_dataset
from vllm_specdecpp.training.collect.responses import write_responses


def rounds_of(prompt: int, accepted: list[int], num_candidates: int, top1: float) -> list[RoundRecord]:
    columns = {name: torch.full((num_candidates,), top1) for name in ("top1_prob", "entropy", "margin")}
    return [
        RoundRecord(
            request_id=str(prompt), hidden_states=torch.zeros(num_candidates, 4), token_ids=[7] * num_candidates,
            soft_label=torch.full((num_candidates,), torch.nan),
            num_accepted=run, num_verified=num_candidates, emitted=1 + 3 * at, temperature=0.0, **columns,
        )
        for at, run in enumerate(accepted)
    ]  # fmt: skip


@pytest.fixture
def record(tmp_path):
    manifest = make_manifest(hidden_size=4, num_candidates=5)
    dataset = create_dataset(tmp_path / "data", manifest, False)
    rounds = rounds_of(0, [2, 5], 5, 0.25) + rounds_of(1, [0], 5, 0.75)
    prompts = {"0": {"id": "a", "set": "code"}, "1": {"id": "b", "set": "chat"}}
    write_shard(dataset.shard_path(0), shard_from_rounds(rounds, prompts), manifest)
    answers = [("a", "code", 7, 10), ("b", "chat", 30, 3)]
    rows = [
        {"id": name, "set": kind, "prompt_token_ids": [1] * prompt, "token_ids": [1] * output}
        for name, kind, prompt, output in answers
    ]
    write_responses(tmp_path / "data", 0, rows)
    return tmp_path / "data"


def test_a_record_starts_at_every_offset_of_an_accepted_run(record):
    """2 of 5 accepted, then 5 of 5: what would have come after those is put in."""
    code = recorded(record, 8, 0, "code")
    end = code.run[8]
    assert end in (0, 1)  # the candidate that nobody saw; then the text ends
    assert code.run[:3].tolist() == [2, 1, 0]
    assert code.run[3:8].tolist() == [min(k, 5) if end == 0 else k for k in (5, 4, 3, 2, 1)]
    assert code.scores[:3, 0].tolist() == [0.25] * 3
    assert len(code) == 9 and code.starts.tolist() == [0, 9] and code.prompt_tokens.tolist() == [7]
    assert code.max_tokens == 10  # the first token is not of a round


def test_recorded_prompts_are_requests_of_their_own(record):
    stream = recorded(record, 25, 0)  # 9 positions of one prompt and 1 of the other, three times
    assert sorted(np.diff(stream.starts).tolist()) == [1] * 3 + [9] * 3
    of = dict(zip(np.diff(stream.starts).tolist(), stream.prompt_tokens.tolist(), strict=True))
    assert of == {9: 7, 1: 30}
    assert set(stream.scores[:, 0].tolist()) == {0.25, 0.75}
    assert len({tuple(np.diff(recorded(record, 25, seed).starts)) for seed in range(9)}) > 1  # in random order


def test_made_up_requests_differ_in_length_and_kind():
    stream = make("mixed", 6000, 0)
    sizes = np.diff(stream.starts)
    assert sizes.sum() == len(stream) == 6000 and 80 < np.median(sizes) < 200 and sizes.std() > 30
    assert 100 < np.median(stream.prompt_tokens) < 220
    shares = [stream.run[start:end].mean() for start, end in zip(stream.starts, stream.starts[1:], strict=False)]
    assert min(shares) < 0.5 and max(shares) > 8  # poor ones and rich ones


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "nonsense"], "--streams nonsense is unknown"),
        (["--streams", "recorded:code"], "needs --train"),
        (["--streams", "recorded:poetry", "--train", "DATA"], "no round of set 'poetry'"),
    ],
)
def test_user_errors_are_one_line(record, capsys, arguments, message):
    with_record = [*arguments, "--record", str(record)] if ":" in arguments[1] else arguments
    assert simulate.main([str(record) if word == "DATA" else word for word in with_record]) == 2
    assert message in capsys.readouterr().err


def test_a_recorded_stream_needs_its_record(capsys):
    assert simulate.main(["--streams", "recorded"]) == 2
    assert "needs --" in capsys.readouterr().err


def test_writes_rows_a_page_and_a_plot(record, tmp_path, capsys):
    out = tmp_path / "results" / "x.jsonl"
    command = ["--costs", "paper", "b64", "--streams", "recorded:code", "flat", "--tokens", "300"]
    command += ["--record", str(record), "--train", str(record), "--out", str(out)]
    command += ["--starts", "cold", "restored", "--warm-tokens", "200"]
    assert simulate.main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["costs"], row["stream"], row["start"]) for row in rows] == [
        (costs, stream, start) for costs in ("paper", "b64") for stream in ("recorded:code", "flat")
        for start in ("cold", "restored")
    ]  # fmt: skip
    assert all(row["cost_aware"] > 0 and row["informed"] > 0 and row["git"] for row in rows)
    assert all(row["oracle"] >= row["fixed"] for row in rows)
    page = out.with_suffix(".md").read_text()
    assert page.count("\n| ") == 9 and "in the **worst** 500" in page
    assert "geometric mean" in page and "python -m benchmarks.simulate" in page
    assert out.with_suffix(".png").stat().st_size > 5000
    capsys.readouterr()
    assert simulate.main(command) == 2  # nothing is overwritten
    assert "--force" in capsys.readouterr().err
    assert simulate.main([*command, "--force"]) == 0


def test_a_served_mix_is_compared_with_off(record, tmp_path):
    out = tmp_path / "x.jsonl"
    command = ["--costs", "cpu_b4", "--streams", "rich", "--load", "0.2", "0.8", "--tokens", "1500", "--out", str(out)]
    assert simulate.main(command) == 0
    low, high = (json.loads(line) for line in out.read_text().splitlines())
    assert low["off_ttft"] < high["off_ttft"]  # they wait for each other
    assert low["tpot"] < low["off_tpot"] and low["candidates_per_token"] > 0
    assert out.with_suffix(".md").read_text().count("\n| ") == 3
