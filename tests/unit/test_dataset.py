# SPDX-License-Identifier: Apache-2.0
"""Label rows against a plain loop, in memory and streamed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_specdecpp.data.dataset import LabelRows, load_rows, rows_of, stream_batches
from vllm_specdecpp.data.shards import Manifest, Shard, create_dataset, empty_shard, open_dataset, write_shard

HIDDEN_SIZE = 3
SCALARS = ("top1_prob", "entropy", "margin", "drawn_logprob")
SHAPES: list[tuple[int, int]] = [(3, 1), (4, 4), (1, 0), (1, 1), (6, 2), (2, 2)]
"""Length of a round, and how many of it are accepted."""


def _refused(match: str):
    return pytest.raises(ValueError, match=f"^specdecpp: [^\n]*{match}[^\n]*$")


def _manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "kind": "rounds", "target": "org/Target", "draft": "org/Draft", "hidden_size": HIDDEN_SIZE,
        "source": "on-policy", "sampling": {}, "num_candidates": 6, "prompts_digest": "", "num_prompts": 0,
        "unit_size": 0, "versions": {},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def _shard(
    first_token: int, shapes: list[tuple[int, int]], prompts: list[tuple[str, str]], positions: bool = False
) -> Shard:
    """Rounds of ``shapes``, prompts in turn; every step's numbers tell which step it is."""
    lengths = torch.tensor([length for length, _ in shapes])
    num = int(lengths.sum())
    step = torch.arange(first_token, first_token + num)
    outcome = [1 if k < a else 0 if k == a else -1 for length, a in shapes for k in range(length)]
    return Shard(
        hidden_states=step[:, None].float() + torch.tensor([0.0, 0.25, 0.5]),
        read_hidden_states=-step[:, None].float() + torch.tensor([0.0, 0.25, 0.5]) if positions else None,
        token_ids=step.int(),
        **{name: step.float() + 0.1 * (i + 1) for i, name in enumerate(SCALARS)},
        outcome=torch.tensor(outcome, dtype=torch.int8),
        soft_label=torch.where(step % 2 == 0, torch.nan, 0.5),
        round_starts=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        num_accepted=torch.tensor([a for _, a in shapes], dtype=torch.int32),
        prompt_index=torch.arange(len(shapes), dtype=torch.int32) % len(prompts),
        emitted=torch.zeros(len(shapes), dtype=torch.int32),
        temperature=torch.zeros(len(shapes)),
        prompts=[{"id": prompt_id, "set": name} for prompt_id, name in prompts],
    )


PROMPTS = [("p0", "alpaca"), ("p1", "gsm8k"), ("p2", "alpaca")]


def _plain(shard: Shard, lag: int) -> list[tuple[int, int, float, tuple[str, str]]]:
    """(step that the row is of, position, accepted, prompt) by a loop over rounds."""
    rows = []
    starts = shard.round_starts.tolist()
    for r, accepted in enumerate(shard.num_accepted.tolist()):
        prompt = shard.prompts[int(shard.prompt_index[r])]
        for step in range(starts[r], starts[r + 1]):
            k = step - starts[r]
            observed = k <= accepted
            was_read = lag == 0 or shard.read_hidden_states is not None or step + 1 < starts[r + 1]
            if observed and was_read:
                rows.append((step, k + 1, float(k < accepted), (prompt["id"], prompt["set"])))
    return rows


def _check(rows: LabelRows, shard: Shard, lag: int) -> None:
    want = _plain(shard, lag)
    index = torch.tensor([step for step, *_ in want], dtype=torch.int64)
    hidden = shard.hidden_states[index]
    if lag == 1:
        hidden = shard.hidden_states[index + 1] if shard.read_hidden_states is None else shard.read_hidden_states[index]
    assert torch.equal(rows.hidden, hidden)
    assert set(rows.scalars) == set(SCALARS if lag else SCALARS[:3])
    for name, column in rows.scalars.items():
        assert torch.equal(column, getattr(shard, name)[index]), name
    torch.testing.assert_close(rows.soft, shard.soft_label[index], equal_nan=True)
    found = (rows.position.tolist(), rows.accepted.tolist(), [rows.prompts[i] for i in rows.prompt.tolist()])
    assert list(zip(*found, strict=True)) == [row[1:] for row in want]
    dtypes = (rows.position.dtype, rows.prompt.dtype, rows.accepted.dtype, rows.soft.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.float32, torch.float32)


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_of_rounds(lag):
    shard = _shard(0, SHAPES, PROMPTS)
    _check(rows_of(shard, lag), shard, lag)
    # Observed 2, 4, 1, 1, 3 and 2; of the second, third, fourth and last round, no pass has read the last one.
    assert len(rows_of(shard, lag)) == (13 if lag == 0 else 9)


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_of_positions(lag):
    shard = _shard(0, [(1, 0), (1, 1), (1, 1), (1, 0)], PROMPTS, positions=True)
    rows = rows_of(shard, lag)
    _check(rows, shard, lag)
    assert len(rows) == 4 and rows.position.tolist() == [1] * 4


def test_rows_are_no_views_of_the_file(tmp_path):
    dataset = _write(tmp_path / "d", [_shard(0, SHAPES, PROMPTS)])
    rows = load_rows([dataset], 0)
    rows.hidden.zero_()
    assert float(load_rows([dataset], 0).hidden.abs().sum()) > 0


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_of_nothing(lag):
    rows = rows_of(empty_shard(_manifest()), lag)
    assert len(rows) == 0 and rows.hidden.shape == (0, HIDDEN_SIZE)


@pytest.mark.parametrize("lag", [-1, 2])
def test_another_lag_is_refused(lag):
    with _refused(f"lag={lag} must be"):
        rows_of(_shard(0, SHAPES, PROMPTS), lag)


def _write(folder: Path, shards: list[Shard], **changes: Any) -> Path:
    dataset = create_dataset(folder, _manifest(**changes), False)
    for unit, shard in enumerate(shards):
        write_shard(dataset.shard_path(unit), shard, dataset.manifest)
    return folder


def _steps(rows: LabelRows) -> list[int]:
    return [round(float(x) - 0.1) for x in rows.scalars["top1_prob"]]


def test_several_datasets_number_prompts_alike(tmp_path):
    shards = [_shard(0, SHAPES, PROMPTS[:2]), _shard(100, SHAPES, PROMPTS[1:]), _shard(200, SHAPES, [("p0", "other")])]
    folders = [_write(tmp_path / "a", shards[:2]), _write(tmp_path / "b", shards[2:], draft="copy/draft")]
    rows = load_rows(folders, 0)
    assert rows.prompts == [("p0", "alpaca"), ("p1", "gsm8k"), ("p2", "alpaca"), ("p0", "other")]
    assert rows.sets == ["alpaca", "gsm8k", "other"] and rows.ids == ["p0", "p1", "p2", "p0"]
    want = [
        (base + step, prompt)
        for base, shard in zip((0, 100, 200), shards, strict=True)
        for step, _, _, prompt in _plain(shard, 0)
    ]
    assert _steps(rows) == [step for step, _ in want]
    assert [rows.prompts[i] for i in rows.prompt.tolist()] == [prompt for _, prompt in want]
    assert [rows.sets[i] for i in rows.set.tolist()] == [name for _, (_, name) in want]
    for name in (*rows.sets, "none"):
        assert rows.in_set(name).tolist() == [name == theirs for _, (_, theirs) in want]


def test_kinds_mix(tmp_path):
    paper = _shard(100, [(1, 0), (1, 1)], PROMPTS, positions=True)
    folders = [
        _write(tmp_path / "a", [_shard(0, SHAPES, PROMPTS)]),
        _write(tmp_path / "b", [paper], kind="positions", source="paper"),
    ]
    assert len(load_rows(folders, 1)) == 9 + 2


def test_prompts_where(tmp_path):
    folder = _write(tmp_path / "a", [_shard(0, SHAPES, PROMPTS), _shard(100, SHAPES, PROMPTS)])
    kept = load_rows([folder], 0, prompts_where=lambda prompt_id: prompt_id != "p0")
    dropped = load_rows([folder], 0, prompts_where=lambda prompt_id: prompt_id == "p0")
    assert {kept.prompts[i][0] for i in kept.prompt.tolist()} == {"p1", "p2"}
    assert sorted(_steps(kept) + _steps(dropped)) == sorted(_steps(load_rows([folder], 0)))
    with _refused("no label of the chosen prompts"):
        load_rows([folder], 0, prompts_where=lambda _: False)


def test_max_rows_takes_some_of_all_shards_and_always_the_same(tmp_path):
    folder = _write(tmp_path / "a", [_shard(100 * i, SHAPES, PROMPTS) for i in range(20)])
    everything = _steps(load_rows([folder], 0))
    some = load_rows([folder], 0, max_rows=40)
    assert len(some) == 40 and set(_steps(some)) < set(everything)
    assert _steps(some) == _steps(load_rows([folder], 0, max_rows=40))
    assert min(_steps(some)) // 100 + 3 < max(_steps(some)) // 100, "not the first four shards"
    assert _steps(load_rows([folder], 0, max_rows=10**6)) != [] and len(load_rows([folder], 0, max_rows=10**6)) == 260
    with _refused("max_rows=0"):
        load_rows([folder], 0, max_rows=0)


def test_select_to_and_concat():
    rows = rows_of(_shard(0, SHAPES, PROMPTS), 1)
    odd = torch.arange(len(rows)) % 2 == 1
    assert _steps(rows.select(odd)) == _steps(rows)[1::2]
    order = torch.tensor([4, 0, 0])
    assert _steps(rows.select(order)) == [_steps(rows)[i] for i in (4, 0, 0)]
    assert rows.select(order).prompt.tolist() == rows.prompt[order].tolist()
    both = LabelRows.concat([rows.select(odd), rows.select(~odd)]).to("cpu")
    assert sorted(_steps(both)) == _steps(rows) and both.prompts is rows.prompts
    with _refused("different lags"):
        LabelRows.concat([rows, rows_of(_shard(0, SHAPES, PROMPTS), 0)])
    with _refused("no label rows"):
        LabelRows.concat([])


@pytest.mark.parametrize(
    "changes",
    [{"draft": "org/other"}, {"target": "org/other"}],
    ids=["draft", "target"],
)
@pytest.mark.parametrize("read", ["memory", "stream"])
def test_mixed_pairs_are_refused_and_named(tmp_path, changes, read):
    folders = [_write(tmp_path / name, [_shard(0, SHAPES, PROMPTS)], **c) for name, c in (("a", {}), ("b", changes))]
    with _refused("b is of the pair .*other.*, but .*a of org/Target / org/Draft"):
        load_rows(folders, 0) if read == "memory" else stream_batches(folders, 0, 4, 0, 0)


def test_another_hidden_size_is_another_pair(tmp_path):
    folder = create_dataset(tmp_path / "b", _manifest(hidden_size=8), False).folder
    with _refused("hidden size 8"):
        load_rows([_write(tmp_path / "a", [_shard(0, SHAPES, PROMPTS)]), folder], 0)


def test_other_versions_of_the_draft_are_reported(tmp_path, caplog):
    shards = [_shard(0, SHAPES, PROMPTS)]
    folders = [_write(tmp_path / name, shards, draft_revision=name) for name in ("a", "b")]
    load_rows(folders, 0)
    assert "revisions a and b" in caplog.text


def test_the_same_dataset_twice_is_refused(tmp_path):
    folder = _write(tmp_path / "a", [_shard(0, SHAPES, PROMPTS)])
    with _refused("given twice"):
        load_rows([folder, folder / "shards" / ".."], 0)
    with _refused("no dataset is named"):
        load_rows([], 0)


@pytest.mark.parametrize("read", ["memory", "stream"])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 0), (1, 0)], "no accepted candidate among 2 labels"),
        ([(3, 3), (1, 1)], "no rejected candidate among 4 labels"),
        ([], "no label"),
    ],
    ids=["no accepted", "no rejected", "none"],
)
def test_nothing_to_learn_from(tmp_path, read, shapes, message):
    shard = _shard(0, shapes, PROMPTS) if shapes else empty_shard(_manifest())
    folder = _write(tmp_path / "a", [shard])
    with _refused(message) as failure:
        load_rows([folder], 0) if read == "memory" else stream_batches([folder], 0, 4, 0, 0)
    assert str(folder) in str(failure.value)


def test_a_damaged_shard_is_not_skipped(tmp_path):
    folder = _write(tmp_path / "a", [_shard(100 * i, SHAPES, PROMPTS) for i in range(3)])
    path = folder / "shards" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with _refused("00001.safetensors is truncated"):
        load_rows([folder], 0)
    with _refused("00001.safetensors is truncated"):
        list(stream_batches([folder], 0, 4, 0, 0))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two datasets with 41 shards of different sizes, one without a round."""
    rnd = random.Random(5)
    shards = []
    for unit in range(40):
        shapes = [(n := rnd.randrange(1, 7), rnd.randrange(n + 1)) for _ in range(rnd.randrange(1, 12))]
        prompts = [(f"u{unit}-{i}", "alpaca" if i % 2 else "gsm8k") for i in range(3)]
        shards.append(_shard(1000 * unit, shapes, prompts))
    folder = tmp_path_factory.mktemp("data")
    return [_write(folder / "a", [*shards[:25], empty_shard(_manifest())]), _write(folder / "b", shards[25:])]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("batch_size", "buffer_rows"), [(1, 1), (7, 5), (16, 100), (64, 64), (5, 10**6), (10**6, 50)])
def test_a_stream_gives_every_row_once(many, lag, batch_size, buffer_rows):
    batches = list(stream_batches(many, lag, batch_size, 0, 0, buffer_rows=buffer_rows))
    rows = load_rows(many, lag)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 0 < len(batches[-1]) <= batch_size
    by_step = {step: i for i, step in enumerate(_steps(rows))}
    index = torch.tensor([by_step.pop(step) for batch in batches for step in _steps(batch)])
    assert not by_step
    want = rows.select(index)
    assert torch.equal(torch.cat([batch.hidden for batch in batches]), want.hidden)
    assert torch.equal(torch.cat([batch.accepted for batch in batches]), want.accepted)
    assert torch.equal(torch.cat([batch.position for batch in batches]), want.position)
    found = [batch.prompts[i] for batch in batches for i in batch.prompt.tolist()]
    assert found == [want.prompts[i] for i in want.prompt.tolist()]


def test_a_stream_is_shuffled_and_repeats(many):
    def stream(seed: int, epoch: int, buffer_rows: int = 60) -> list[int]:
        return [
            step for batch in stream_batches(many, 0, 8, seed, epoch, buffer_rows=buffer_rows) for step in _steps(batch)
        ]

    base = stream(3, 1)
    assert base == stream(3, 1)
    for other in (stream(3, 2), stream(4, 1), stream(1, 3)):
        assert other != base and sorted(other) == sorted(base)
    units = [step // 1000 for step in base]
    assert units != sorted(units), "shards in another order"

    def neighbours(steps: list[int]) -> float:
        """Share of rows whose successor is of the same shard."""
        return sum(a // 1000 == b // 1000 for a, b in zip(steps, steps[1:], strict=False)) / len(steps)

    found = [neighbours(stream(3, 1, size)) for size in (1, 60, 10**6)]
    assert found[0] > 2 * found[1] > 4 * found[2], "the larger the buffer, the wider a shard's rows are spread"


def test_a_stream_holds_no_more_than_its_buffer(many, monkeypatch):
    largest = 0
    concat = LabelRows.concat

    def watched(parts):
        nonlocal largest
        rows = concat(parts)
        largest = max(largest, len(rows))
        return rows

    monkeypatch.setattr(LabelRows, "concat", watched)
    for _ in stream_batches(many, 0, 8, 0, 0, buffer_rows=80):
        pass
    monkeypatch.undo()
    biggest_shard = max(len(rows_of(shard, 0)) for folder in many for shard in open_dataset(folder).shards())
    assert 80 <= largest < 80 + biggest_shard < len(load_rows(many, 0))


def test_a_stream_of_some_prompts(many):
    def chosen(prompt_id: str) -> bool:
        return prompt_id.endswith("-1")

    streamed = [step for batch in stream_batches(many, 1, 8, 0, 0, chosen, 30) for step in _steps(batch)]
    assert sorted(streamed) == sorted(_steps(load_rows(many, 1, prompts_where=chosen)))


@pytest.mark.parametrize(("batch_size", "buffer_rows"), [(0, 5), (5, 0)])
def test_sizes_that_are_none(many, batch_size, buffer_rows):
    with _refused("=0 must be 1 or more"):
        stream_batches(many, 0, batch_size, 0, 0, buffer_rows=buffer_rows)
