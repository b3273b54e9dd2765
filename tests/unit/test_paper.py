# SPDX-License-Identifier: Apache-2.0
"""The paper's labels against a loop that takes one position at a time, and their distribution."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_specdecpp.training.collect import paper_labels
from vllm_specdecpp.training.collect.responses import read_responses, responses_path

VOCAB_SIZE = 512
STATE_TOLERANCE = 2e-4
"""Largest difference of states of order 1 in float32, between one whole pass and a pass for each prefix."""
PROBABILITY_TOLERANCE = 1e-4
FIVE_SIGMA = 5.0


@pytest.fixture(scope="module")
def pair(tiny):
    """Target and draft, as the recipe and as transformers see them."""
    folders = (tiny.target, tiny.draft_good)
    loaded = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    return [paper_labels.CausalModel(model) for model in loaded], [model.eval() for model in loaded]


def _texts(lengths: list[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    rnd = random.Random(3)
    draw = lambda n: [rnd.randrange(3, VOCAB_SIZE) for _ in range(n)]  # noqa: E731
    return [draw(n) for n, _ in lengths], [draw(n) for _, n in lengths]


@torch.inference_mode()
def _after(model, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden state, log-probabilities) after ``tokens``, read alone."""
    out = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
    return out.hidden_states[-1][0, -1], out.logits[0, -1].double().log_softmax(-1)


def _plain_loop(target, draft, prompt, response, randoms, mixing):
    """One response, position by position: a list of rows as dicts."""
    mixed, rows = [], []
    for i, token in enumerate(response):
        state, log_q = _after(draft, prompt + response[:i])
        _, log_p = _after(target, prompt + response[:i])
        below, y = 0.0, 0
        for y, q in enumerate(log_q.exp().tolist()):  # noqa: B007
            below += q
            if below > float(randoms[i, 0]):
                break
        takes_draft = float(randoms[i, 1]) >= mixing
        mixed.append(y if takes_draft else token)
        read_state, _ = _after(draft, prompt + mixed)
        if takes_draft:
            top = log_q.sort(descending=True).values
            rows.append(
                {"hidden_states": state, "read_hidden_states": read_state, "token_ids": y, "emitted": i,
                 "soft_label": min(1.0, float((log_p[y] - log_q[y]).exp())), "drawn_logprob": float(log_q[y]),
                 "top1_prob": float(top[0].exp()), "margin": float(top[0] - top[1]),
                 "entropy": float(-(log_q.exp() * log_q).sum())}
            )  # fmt: skip
    return rows


@pytest.mark.parametrize("logits_per_chunk", [1, 3 * VOCAB_SIZE, 1 << 24], ids=["one", "three", "whole"])
def test_as_a_plain_loop_does_it(pair, monkeypatch, logits_per_chunk):
    (target, draft), (plain_target, plain_draft) = pair
    monkeypatch.setattr(paper_labels, "LOGITS_PER_CHUNK", logits_per_chunk)
    prompts, responses = _texts([(5, 7), (1, 1), (17, 4), (2, 13)])
    randoms = [paper_labels.uniforms(0, 4, i, len(response)) for i, response in enumerate(responses)]
    found = paper_labels.label(target, draft, prompts, responses, randoms, mixing=0.3)
    num_rows = 0
    for positions, prompt, response, random_numbers in zip(found, prompts, responses, randoms, strict=True):
        rows = _plain_loop(plain_target, plain_draft, prompt, response, random_numbers, mixing=0.3)
        num_rows += len(rows)
        assert positions.token_ids.tolist() == [row["token_ids"] for row in rows]
        assert positions.emitted.tolist() == [row["emitted"] for row in rows]
        for name in ("soft_label", "drawn_logprob", "top1_prob", "margin", "entropy"):
            column = getattr(positions, name)
            assert column.dtype == torch.float32
            expected = torch.tensor([row[name] for row in rows])
            torch.testing.assert_close(column, expected, atol=PROBABILITY_TOLERANCE, rtol=1e-3)
        for name in ("hidden_states", "read_hidden_states"):
            expected = torch.stack([row[name] for row in rows]) if rows else torch.empty(0, 64)
            torch.testing.assert_close(getattr(positions, name), expected, atol=STATE_TOLERANCE, rtol=1e-3)
    assert num_rows > 12, "enough of the draft's tokens to compare"


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_no_mixing_and_nothing_but_mixing(pair, mixing):
    (target, draft), _ = pair
    prompts, responses = _texts([(4, 6)])
    (found,) = paper_labels.label(target, draft, prompts, responses, [paper_labels.uniforms(0, 0, 0, 6)], mixing)
    assert found.emitted.tolist() == (list(range(6)) if mixing == 0 else [])
    assert found.read_hidden_states.shape == (6 if mixing == 0 else 0, 64)


def test_draws_depend_on_seed_unit_and_prompt_alone():
    base = paper_labels.uniforms(0, 1, 2, 9)
    assert torch.equal(base[:4], paper_labels.uniforms(0, 1, 2, 4)), "a longer response begins alike"
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 12, 2), (0, 2, 1)):
        assert not torch.equal(base, paper_labels.uniforms(*other, 9))


def test_candidates_follow_the_draft_and_labels_the_ratio(tiny):
    """Vocabulary of 8, one position drawn many times: Y ~ q, E[accept] = sum min(p, q), and the share of mixing."""
    names = ("small_target", "small_draft")
    target, draft = (paper_labels.CausalModel.load(getattr(tiny, name), "float32") for name in names)
    prompt, response, num, mixing = [3, 1, 4], [6], 6000, 0.15
    randoms = [paper_labels.uniforms(7, unit, 0, 1) for unit in range(num)]
    found = paper_labels.label(target, draft, [prompt] * num, [response] * num, randoms, mixing)
    tokens = torch.cat([f.token_ids for f in found])
    accepted = torch.cat([f.accepted for f in found]).double()
    share = len(tokens) / num
    assert abs(share - (1 - mixing)) < FIVE_SIGMA * (mixing * (1 - mixing) / num) ** 0.5
    _, log_p = _after(target.model, prompt)
    _, log_q = _after(draft.model, prompt)
    q = log_q.exp()
    counts = torch.bincount(tokens, minlength=8) / len(tokens)
    assert bool(((counts - q).abs() <= FIVE_SIGMA * (q * (1 - q) / len(tokens)).sqrt()).all()), (counts, q)
    overlap = float(torch.minimum(log_p.exp(), q).sum())
    assert 0.05 < overlap < 0.95, "a pair that agrees in part"
    assert abs(float(accepted.mean()) - overlap) < FIVE_SIGMA * (overlap * (1 - overlap) / len(tokens)) ** 0.5


def test_bfloat16_is_close(tiny, pair):
    (target, draft), _ = pair
    prompts, responses = _texts([(6, 20), (3, 20)])
    randoms = [paper_labels.uniforms(0, 0, i, 20) for i in range(2)]
    exact = paper_labels.label(target, draft, prompts, responses, randoms, 0.0)
    target, draft = (paper_labels.CausalModel.load(folder, "bfloat16") for folder in (tiny.target, tiny.draft_good))
    coarse = paper_labels.label(target, draft, prompts, responses, randoms, 0.0)
    assert coarse[0].hidden_states.dtype == torch.bfloat16 and coarse[0].soft_label.dtype == torch.float32
    same = torch.cat([a.token_ids == b.token_ids for a, b in zip(exact, coarse, strict=True)])
    assert float(same.float().mean()) > 0.8, "the same numbers draw nearly the same tokens"


def test_logits_that_are_no_plain_product_are_refused(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.draft_good, dtype=torch.float32)
    plain = model.forward

    def soft_capped(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = 2.0 * torch.tanh(out.logits / 2.0)
        return out

    model.forward = soft_capped
    with pytest.raises(ValueError, match="^specdecpp: source='paper' does not know how LlamaForCausalLM"):
        paper_labels.CausalModel(model)


def test_a_model_that_is_not_there():
    with pytest.raises(ValueError, match="^specdecpp: model './nowhere' cannot be loaded"):
        paper_labels.CausalModel.load("./nowhere", "float32")


SENTENCES = ["Wrap the text.", "A line of words, longer than the first one.", "def fill(text):", "x", "Indent it."]


def _options(tiny, out, **changes):
    from vllm_specdecpp.training.collect.options import CollectOptions

    settings = {
        "target": tiny.target, "draft": tiny.draft_good, "prompts": str(out.parent / "prompts.txt"), "out": out,
        "source": "paper", "dtype": "float32", "unit": 2, "batch": 2, "temperature": 1.0, **changes,
    }  # fmt: skip
    return CollectOptions(**settings)


@pytest.fixture
def prompts(tmp_path):
    from vllm_specdecpp.data.prompts import load_prompts

    (tmp_path / "prompts.txt").write_text("\n".join(SENTENCES) + "\n")
    return load_prompts(tmp_path / "prompts.txt")


@pytest.fixture
def answers(tiny, tmp_path, prompts):
    """A dataset of the same target and prompts, of which only the responses are of use: the third has none."""
    from transformers import AutoTokenizer

    from vllm_specdecpp.data.shards import create_dataset
    from vllm_specdecpp.training.collect.command import make_manifest
    from vllm_specdecpp.training.collect.units import encode, write_responses

    tokenizer = AutoTokenizer.from_pretrained(tiny.target)
    rnd = random.Random(1)
    rows = [
        {"id": p.id, "set": p.set, "prompt_token_ids": encode(tokenizer, p.text),
         "token_ids": [rnd.randrange(3, VOCAB_SIZE) for _ in range(0 if i == 2 else 9)]}
        for i, p in enumerate(prompts)
    ]  # fmt: skip
    options = _options(tiny, tmp_path / "answers", source="on-policy")
    create_dataset(options.out, make_manifest(options, prompts), False)
    write_responses(options.out, 0, rows)
    return options.out


def _collected(options, prompts):
    """(dataset, summaries) of a run over all prompts."""
    from vllm_specdecpp.data.shards import create_dataset
    from vllm_specdecpp.training.collect.command import make_manifest
    from vllm_specdecpp.training.collect.paper import PaperCollector

    dataset = create_dataset(options.out, make_manifest(options, prompts), False)
    collector = PaperCollector(options, dataset.manifest)
    units = [prompts[i : i + options.unit] for i in range(0, len(prompts), options.unit)]
    return dataset, [collector.collect(i, unit) for i, unit in enumerate(units)]


def test_a_collected_dataset_holds_the_labels(tiny, tmp_path, prompts, answers, pair):
    options = _options(tiny, tmp_path / "out", responses=answers, seed=5)
    dataset, summaries = _collected(options, prompts)
    assert dataset.done_units() == {0, 1, 2}
    assert [(s.prompts, s.skipped) for s in summaries] == [(2, 0), (1, 1), (1, 0)], "an empty response gives no labels"
    rows = {row["id"]: row for i in range(3) for row in read_responses(responses_path(dataset.folder, i))}
    assert set(rows) == {prompt.id for prompt in prompts}
    (target, draft), _ = pair
    for unit, shard in enumerate(dataset.shards()):
        for i, owner in enumerate(shard.prompts):
            row = rows[owner["id"]]
            place = [p.id for p in prompts].index(owner["id"]) - 2 * unit
            randoms = paper_labels.uniforms(5, unit, place, 9)
            texts = ([row["prompt_token_ids"]], [row["token_ids"]])
            (expected,) = paper_labels.label(target, draft, *texts, [randoms], 0.15)
            mine = shard.prompt_index == i
            assert shard.token_ids[mine].tolist() == expected.token_ids.tolist()
            assert shard.emitted[mine].tolist() == expected.emitted.tolist()
            assert shard.outcome[mine].tolist() == expected.accepted.int().tolist()
            for name in ("soft_label", "margin", "read_hidden_states", "hidden_states"):
                theirs = getattr(expected, name)
                torch.testing.assert_close(getattr(shard, name)[mine], theirs, atol=STATE_TOLERANCE, rtol=1e-3)
    assert sum(s.observed for s in summaries) == dataset.summary().observed > 20


def test_the_command_takes_up_where_it_stopped_and_repeats_itself(tiny, tmp_path, prompts, answers, capsys):
    from vllm_specdecpp.training.collect.command import run

    options = _options(tiny, tmp_path / "out", responses=answers)
    assert run(options) == 0
    shards = sorted((tmp_path / "out" / "shards").iterdir())
    first = [load_file(path) for path in shards]
    shards[1].unlink()
    stamps = [path.stat().st_mtime_ns for path in (shards[0], shards[2])]
    assert run(options) == 0
    for path, tensors in zip(shards, first, strict=True):
        again = load_file(path)
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items()), "the same labels"
    assert [path.stat().st_mtime_ns for path in (shards[0], shards[2])] == stamps, "finished shards are left alone"


def test_wrong_responses(tiny, tmp_path, prompts, answers):
    from dataclasses import replace

    with pytest.raises(ValueError, match="^specdecpp: responses=.* are of target .*/target', not of .*/draft_rand'"):
        _collected(_options(tiny, tmp_path / "a", responses=answers, target=tiny.draft_rand), prompts)
    with pytest.raises(ValueError, match="^specdecpp: responses=.* answers another prompt under the id"):
        _collected(_options(tiny, tmp_path / "b", responses=answers), [replace(p, text=p.text + "!") for p in prompts])
    with pytest.raises(ValueError, match="^specdecpp: responses=.* answers none of the prompts from 'q0'"):
        renamed = [replace(p, id=f"q{i}") for i, p in enumerate(prompts)]
        _collected(_options(tiny, tmp_path / "c", responses=answers), renamed)
    next((answers / "responses").iterdir()).unlink()
    with pytest.raises(ValueError, match="^specdecpp: responses=.* holds no responses"):
        _collected(_options(tiny, tmp_path / "d", responses=answers), prompts)


def test_wrong_models_and_files(tiny, tmp_path, prompts, answers):
    with pytest.raises(ValueError, match="^specdecpp: draft=.* has 500 tokens, the target 512"):
        _collected(_options(tiny, tmp_path / "a", responses=answers, draft=tiny.draft_other_vocab), prompts)
    options = _options(tiny, tmp_path / "b", responses=answers)
    _collected(options, prompts)
    (tmp_path / "b" / "responses" / "00001.jsonl").write_text('{"id": "cut')
    with pytest.raises(ValueError, match="^specdecpp: .*00001.jsonl, line 1, is damaged"):
        _collected(options, prompts)
