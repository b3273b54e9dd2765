# SPDX-License-Identifier: Apache-2.0
"""Tokens of all kinds against ``longest_match``, what is taken of runs against ``FreeRuns.take``, what stands in front
of them, and draft logits of runs; for the kernels and their twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_specdecpp.costs.model import CostModel
from vllm_specdecpp.decision.cost_aware import CostAwareRule
from vllm_specdecpp.decision.cost_aware.admission import Standing
from vllm_specdecpp.decision.cost_aware.device_runs import RowsBefore
from vllm_specdecpp.decision.cost_aware.free_runs import Before
from vllm_specdecpp.decision.cost_aware.logistic import BUCKETS
from vllm_specdecpp.decision.sources import Run
from vllm_specdecpp.decision.sources.suffix import LATEST, MAX_MATCH, NARROW, PLACES, SuffixSource, longest_match, x_of
from vllm_specdecpp.decision.tail_params import CostAwareParams
from vllm_specdecpp.kernels.suffix_cache import MOST as MOST_LOOKED_AT

MOST, WIDTH = 7, 50
CURVES = {"first": {1: 27e-3}, "step": {1: 20e-3}, "verify": {1: 20e-3, 6: 21e-3, 7: 30e-3, 64: 60e-3}}


def _rows(rng: Any) -> list[np.ndarray]:
    """Texts whose last tokens stand before often, seldom, never; longer than a block, than what is compared."""
    texts = [rng.integers(0, rng.integers(1, 6), rng.integers(1, 90)) for _ in range(10)]
    part = rng.integers(0, 40, 70)
    texts += [np.concatenate([part, rng.integers(0, 40, gap), part]) for gap in (0, 1, 954, 955, 2100)]
    texts += [np.zeros(1025, dtype=np.int64), np.arange(1030), rng.integers(0, 2, 1500)]
    # The longest match is about as many places back as are compared: of the last token, and of eight tokens.
    for count in (LATEST - 1, LATEST):
        texts.append(np.concatenate([[1, 2, 3, 0], np.resize([5, 0], 2 * count), [1, 2, 3, 0]]))
    part = np.arange(NARROW + 1, 0, -1)
    for count in (PLACES - 1, PLACES):
        others = np.tile([*[30] * 80, *part[1:]], count)
        texts.append(np.concatenate([part, others, part]))
    # Another order each time: some are not asked for.
    return [texts[i] for i in rng.permutation(len(texts))]


def check_matches(launch: Any, seeds: int = 3) -> None:
    """Equal to the function that Model Runner V1 calls, whatever stands behind the last token."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        texts = _rows(rng)
        width = max(map(len, texts)) + 3
        tokens = torch.full((len(texts) + 2, width), 1, dtype=torch.int32)
        states = torch.from_numpy(rng.permutation(len(tokens))[: len(texts)].astype(rng.choice(["int32", "int64"])))
        for state, text in zip(states.tolist(), texts, strict=True):
            tokens[state, : len(text)] = torch.from_numpy(text)
            tokens[state, len(text) :] = int(text[-1])  # a draft that was rejected, or another request's tokens
        last = torch.tensor([len(text) - 1 for text in texts])
        limits = torch.arange(len(texts), dtype=torch.int32).fmod(7)
        starts, matches = torch.full_like(last, -7), torch.full_like(limits, -7)
        launch(tokens, states, last, limits, starts=starts, matches=matches)
        for row, text in enumerate(texts):
            wanted = longest_match(text) if limits[row] else (0, 0)
            assert (int(starts[row]), int(matches[row])) == wanted, f"seed {seed}, row {row}"


def check_others(launch: Any) -> None:
    """What others have emitted wins where more of it matches; of prompts, of what no longer counts and of what a
    request has said itself nothing does."""
    for seed in (1, 2, 3, 0):  # the last one is long
        rng = np.random.default_rng(seed)
        num_states, width = 7, 2300 if seed else MOST_LOOKED_AT + 1200
        tokens = torch.from_numpy(rng.integers(0, 4, (num_states, width)).astype(np.int32))
        part = torch.from_numpy(rng.integers(0, 4, 90).astype(np.int32))
        prompts = torch.from_numpy(rng.integers(0, 40, num_states).astype(np.int32))
        totals = prompts + torch.from_numpy(rng.integers(0, width - 40, num_states).astype(np.int32))
        if not seed:  # so far back in one text alone that nobody looks there
            totals = prompts.clone()
        totals[0], totals[1], prompts[1] = 0, width, 0  # never used; full
        states = torch.from_numpy(rng.permutation(num_states)[:4])
        last = torch.tensor([2, 30, 200, width - 1])
        for state, end in zip(states.tolist(), last.tolist(), strict=True):
            size = min(len(part), end + 1)
            tokens[state, end + 1 - size : end + 1] = part[len(part) - size :]
        for state in range(num_states):  # the same part, in what counts or across one of its ends
            first, end = int(prompts[state]), int(totals[state])
            place = int(rng.choice([0, first - 30, end - 95, end - 90, width // 2]))
            place = min(max(place, 0), width - 95) if seed else 0
            tokens[state, place : place + len(part)] = part
        limits = torch.tensor([3, 5, 0 if seed % 2 else 4, 6], dtype=torch.int32)
        starts, matches = torch.full_like(last, -7), torch.tensor([0, 2, 40, 63], dtype=torch.int32)
        before = starts.clone(), matches.clone()
        found = launch(tokens, states, last, limits, prompts, totals, starts=starts, matches=matches)
        for row, (state, end) in enumerate(zip(states.tolist(), last.tolist(), strict=True)):
            asked, own = tokens[state, : end + 1].numpy(), int(before[1][row])
            best = 0
            for other in range(num_states):
                first, total = int(prompts[other]), int(totals[other])
                if other != state and limits[row] and total > first + 1:
                    best = max(best, _longest(asked, tokens[other, first:total].numpy()))
            assert int(matches[row]) == max(best, own), f"seed {seed}, row {row}"
            if best <= own:
                kept = state, end, int(limits[row]), int(before[0][row])
                assert (*(int(x[row]) for x in found), int(starts[row])) == kept
                continue
            other, finish, limit, start = *(int(x[row]) for x in found), int(starts[row])
            assert other != state and finish == totals[other] - 1 and start <= finish
            assert limit == min(int(limits[row]), finish + 1 - start)
            assert start - best >= prompts[other]
            assert tokens[other, start - best : start].tolist() == asked[len(asked) - best :].tolist()


def _longest(asked: np.ndarray, text: np.ndarray) -> int:
    """Tokens that match anywhere in a text, where something follows."""
    best, last = 0, len(text) - 1
    for place in np.flatnonzero(text[:last] == asked[-1])[::-1]:
        if place < last - MOST_LOOKED_AT:
            break
        match = 0
        while match < min(MAX_MATCH, len(asked), place + 1) and text[place - match] == asked[-1 - match]:
            match += 1
        best = max(best, match)
    return best


def check_rows(launch: Any, seeds: int = 3) -> None:
    """Where there is a candidate the row is certain of it; all else stays."""
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        vocab_size = (5, 4096, 9001)[seed % 3]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
        logits = torch.randn(5, 4, vocab_size, generator=generator).to(dtype)
        states = torch.tensor([3, 0, 4], dtype=torch.int32)
        buffer = torch.randint(0, vocab_size, (3, 6), generator=generator)
        candidates = buffer[:, 1:5]
        candidates[0, 2:] = candidates[1] = -1
        wanted: Tensor = logits.clone()
        for row, state in enumerate(states.tolist()):
            for step, token in enumerate(candidates[row].tolist()):
                if token >= 0:
                    wanted[state, step] = -torch.inf
                    wanted[state, step, token] = 0.0
        launch(logits, states, candidates)
        assert torch.equal(logits, wanted), f"seed {seed}"


def _batch(
    rng: Any, num_reqs: int, **curves: Any
) -> tuple[CostAwareRule, CostAwareParams, list[str], dict[str, Tensor]]:
    """A round whose parameters are loaded, and what stands where."""
    rule = CostAwareRule(CostModel(**CURVES | curves, max_reqs=num_reqs, max_tokens=64), MOST, sources=[SuffixSource()])
    rule.free_runs.models["suffix"].theta += rng.normal(0, 0.5, len(rule.free_runs.models["suffix"].theta))
    rule.acceptance.this.theta += rng.normal(0, 0.3, len(rule.acceptance.this.theta))
    rule.acceptance.means = rng.uniform(0.2, 0.9, len(rule.acceptance.means))
    names = [str(i) for i in range(num_reqs)]
    rule.free_runs._own.update({name: tuple(rng.uniform(0, 20, 2)) for name in names[::2]})
    params = CostAwareParams.allocate(num_reqs, MOST, 64, BUCKETS, "cpu")
    rule.begin([Standing(name, 5, 9, 0, 1) for name in names]).load(params)
    last = torch.from_numpy(rng.integers(0, WIDTH - MOST - 2, num_reqs))
    stops = torch.from_numpy(rng.integers(0, 30, (num_reqs, 7)))
    stops[torch.from_numpy(rng.random(stops.shape) < 0.8)] = -1
    drafts = torch.from_numpy(rng.random(num_reqs) < 0.5).int()
    return rule, params, names, {
        "tokens": torch.from_numpy(rng.integers(0, 30, (num_reqs + 2, WIDTH)).astype(np.int32)),
        "states": torch.from_numpy(rng.permutation(num_reqs + 2)[:num_reqs].astype(rng.choice(["int32", "int64"]))),
        "last": last, "stop_token_ids": stops[:, 2:], "drafts": drafts,
        "lengths": torch.from_numpy(rng.integers(0, 4, num_reqs)).int() * drafts,
    }  # fmt: skip


def check_takes(take: Any, seeds: int = 8) -> None:
    """What the rule takes on the host, for batches of all sizes, also beyond the cost table, and with any chances."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        num_reqs = (1, 2, 5, 30, 33, 1, 60, 800)[seed % 8]
        # Of the last one more rows pay than are looked at together.
        rule, params, names, a = _batch(rng, num_reqs, **({"verify": {1: 20e-3}} if num_reqs == 800 else {}))
        last, stops = a["last"].tolist(), a["stop_token_ids"].tolist()
        starts = [int(rng.integers(0, end + 2)) for end in last]
        matches = np.where(rng.random(num_reqs) < 0.7, rng.integers(1, 65, num_reqs), 0)
        limits = rng.integers(0, MOST + 1, num_reqs)
        runs: list[list[Run]] = []
        for state, end, start, match, ends in zip(a["states"], last, starts, matches.tolist(), stops, strict=True):
            ids = [int(a["tokens"][state, start + k % max(end + 1 - start, 1)]) for k in range(MOST)]
            ids = ids[: next((k + 1 for k, token in enumerate(ids) if token in ends), MOST)]
            runs.append([Run("suffix", ids, x_of(match, len(ids)))] if match else [])
        survival = rng.random(num_reqs).astype(np.float32)
        behind = Before(num_reqs + 9, num_reqs + rng.uniform(0, 9), 0.05, survival.astype(np.float64))
        on_device = RowsBefore(
            torch.tensor([behind.rows], dtype=torch.int32), torch.tensor([behind.tokens]).double(),
            torch.tensor([behind.seconds]), torch.from_numpy(survival),
        )  # fmt: skip
        candidates, accept = torch.full((num_reqs, MOST), -7), torch.full((num_reqs, MOST), -7.0)
        for before in (None, behind):
            wanted = rule.free_runs.take(names, runs, limits, rule.costs, before)
            tokens, chances = candidates.clone(), accept.clone()
            if before is None:
                tokens.fill_(-1)
            for row, length in enumerate(wanted.lengths.tolist()):
                if length and bool(a["drafts"][row]) == (before is not None):
                    place = int(a["lengths"][row])
                    size = min(length, MOST - place)
                    run = wanted.runs[row]
                    assert run is not None
                    tokens[row, place : place + size] = torch.tensor(run.token_ids[:size])
                    known = torch.from_numpy(rule.free_runs.chances(run, names[row])[:size])
                    chances[row, place : place + size] = known.float()
            found = take(
                a["tokens"], a["states"], a["last"], torch.tensor(starts), torch.from_numpy(matches).int(),
                torch.from_numpy(limits).int(), a["stop_token_ids"], a["drafts"], a["lengths"], params,
                None if before is None else on_device, candidates=candidates, accept=accept,
            )  # fmt: skip
            where = f"seed {seed}, {'find' if before is None else 'follow'}"
            assert found.lengths.tolist() == wanted.lengths.tolist(), where
            expected = torch.from_numpy(wanted.accepted).float()
            torch.testing.assert_close(found.accepted, expected, rtol=1e-4, atol=1e-6, msg=where)
            assert torch.equal(candidates, tokens), where
            torch.testing.assert_close(accept, chances, rtol=1e-5, atol=0, msg=where)


def check_behind(behind: Any, seeds: int = 6) -> None:
    """The drafts are put down, and counted with their chances and their time."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        num_reqs, lag = (1, 40, 5)[seed % 3], seed // 3
        rule, params, _, a = _batch(rng, num_reqs)
        drafts, lengths = a["drafts"] > 0, a["lengths"].tolist()
        widths = [sum(n >= k for n in lengths) for k in range(1, MOST + 1)]
        log = torch.from_numpy(rng.normal(0, 2, (MOST, num_reqs + 3)).astype(np.float32))[:, :num_reqs]
        log[torch.from_numpy(rng.random((MOST, num_reqs)) < 0.2)] = torch.nan
        ids = torch.full((num_reqs, MOST + 2), -1)[:, :MOST]
        tokens, survival, limits = a["tokens"].clone(), np.ones(num_reqs), [0] * num_reqs
        for row, length in enumerate(lengths):
            ids[row, :length] = torch.from_numpy(rng.integers(0, 30, length))
            if length and row % 3 == 1 and int(a["stop_token_ids"][row].max()) >= 0:
                ids[row, length - 1] = a["stop_token_ids"][row].max()
            end = int(a["last"][row]) + 1
            tokens[a["states"][row], end : end + length] = ids[row, :length].int()
            for k in range(length):
                x = float(log[k + lag, row]) if widths[k + lag] else float("nan")
                survival[row] *= float(rule.acceptance.accept(np.array([x]), k + 1)[0])
            if drafts[row] and not (length and int(ids[row, length - 1]) in a["stop_token_ids"][row].tolist()):
                limits[row] = 6 - length
        expected, accepted = torch.from_numpy(rng.random((2, num_reqs)).astype(np.float32))
        ends, most, before = behind(
            a["tokens"], a["states"], a["last"], torch.full((num_reqs,), 6, dtype=torch.int32), a["lengths"], ids,
            a["stop_token_ids"], accepted, drafts=a["drafts"], expected=expected, scores_log=log,
            widths=torch.tensor(widths, dtype=torch.int32), params=params, lag=lag,
        )  # fmt: skip
        assert torch.equal(a["tokens"], tokens) and most.tolist() == limits, f"seed {seed}"
        assert ends.tolist() == [n + length for n, length in zip(a["last"].tolist(), lengths, strict=True)]
        tokens_before = num_reqs + float(expected.sum()) + float(accepted[~drafts].sum())
        seconds = rule.costs.draft_seconds([width for width in widths if width])
        wanted = num_reqs + sum(lengths), tokens_before, seconds
        np.testing.assert_allclose([float(x) for x in before[:3]], wanted, rtol=1e-5, err_msg=f"seed {seed}")
        np.testing.assert_allclose(before.survival.numpy(), survival, rtol=1e-4, err_msg=f"seed {seed}")
