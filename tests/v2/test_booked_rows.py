# SPDX-License-Identifier: Apache-2.0
"""Adaptive verification books as many rows as the drafts of this step may need, not those of the step before last."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import numpy as np
import pytest
import torch

K = 8


def _manager(monkeypatch: pytest.MonkeyPatch, verify_ms: list[float]) -> Any:
    """vLLM's own, its copies to the host made at once, with a table of costs by tokens."""
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification as vllms

    class Event:
        def __init__(self, **_: Any) -> None: ...
        def synchronize(self) -> None: ...
        def record(self) -> None: ...

    class Stream:
        def __init__(self, *_: Any) -> None: ...
        def wait_stream(self, _: Any) -> None: ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    monkeypatch.setattr(vllms, "stream", lambda *_: contextlib.nullcontext())
    states = types.SimpleNamespace(
        num_speculative_steps=K, max_num_reqs=4, max_num_batched_tokens=64, device=torch.device("cpu"),
        req_id_to_index={"a": 2, "b": 0}, num_computed_tokens_np=np.full(4, 9),
        prefill_len=types.SimpleNamespace(np=np.full(4, 5)),
    )  # fmt: skip
    manager = vllms.AdaptiveVerificationManager(states, torch.zeros(5, dtype=torch.int32), 1, 1000)
    manager.cost_tables = np.zeros(5), np.array(verify_ms)
    return manager


FLAT = [10.0] * 65
"""A GPU that reads weights: rows cost nothing."""
DEAR = [10.0 + 5 * n for n in range(65)]


class Steps:
    """Steps of an engine: what the device drafts, and what the host books for it."""

    booked_rows: Any = None
    limit = K

    def __init__(self, manager: Any) -> None:
        self.manager, self.slots = manager, {"a": 2, "b": 0}

    def __call__(self, drafts: dict[str, list[float]], rows: tuple[int, ...] | None = None) -> int:
        """Confidences of what each request submits; returns how many candidates are booked of the next verification."""
        names = list(drafts)
        confidences = torch.zeros(len(names), K)
        for row, mine in enumerate(drafts.values()):
            confidences[row, : len(mine)] = torch.tensor(mine)
        batch = types.SimpleNamespace(
            req_ids=names, num_reqs=len(names), idx_mapping=torch.tensor([self.slots[name] for name in names]),
            idx_mapping_np=np.array([self.slots[name] for name in names]),
        )  # fmt: skip
        if self.booked_rows is not None:
            drafting = tuple(row for row, mine in enumerate(drafts.values()) if mine) if rows is None else rows
            self.booked_rows.drafts = dict.fromkeys(drafting, self.limit)
        self.manager.record_confidences(confidences, batch)
        placeholders = {name: [0] * K for name in names}
        total = self.manager.get_num_tokens(dict.fromkeys(names, 1 + K), placeholders)
        return int(total - len(names))


def _steps(monkeypatch: pytest.MonkeyPatch, costs: list[float], has_runs: bool = False) -> Steps:
    from vllm_specdecpp.engine.v2.booked_rows import BookedRows

    steps = Steps(_manager(monkeypatch, costs))
    steps.booked_rows = BookedRows(steps.manager, has_runs)
    return steps


def test_a_long_draft_behind_a_short_one_is_booked_whole(monkeypatch):
    steps = _steps(monkeypatch, FLAT)
    lengths = [2, 8, 2, 8]
    assert [steps({"a": [0.9] * n}) for n in lengths][1:] == [K] * 3


def test_vllms_own_would_cut_it(monkeypatch):
    """The test's power: without us the draft before decides."""
    steps = Steps(_manager(monkeypatch, FLAT))
    booked = [steps({"a": [0.9] * n}) for n in (2, 8, 2, 8)]
    assert booked[1] < 8 and booked[3] < 8


def test_the_first_draft_after_a_time_without_is_verified(monkeypatch):
    steps = _steps(monkeypatch, FLAT)
    for _ in range(3):
        booked = steps({"a": [], "b": []})
    assert booked == 0, "nobody drafts, and nothing is booked"
    assert steps({"a": [0.8] * 3, "b": []}) == K


def test_a_request_that_has_just_come_and_does_not_draft_books_nothing(monkeypatch):
    for has_runs in (False, True):
        steps = _steps(monkeypatch, FLAT, has_runs)
        assert steps({"a": []}) == 0


def test_no_more_than_the_request_may_draft_is_booked(monkeypatch):
    steps = _steps(monkeypatch, FLAT)
    steps.limit = 3
    assert [steps({"a": [0.9]}) for _ in range(3)] == [3] * 3


def test_where_rows_are_dear_as_many_are_booked_as_the_chances_are_worth(monkeypatch):
    steps = _steps(monkeypatch, DEAR)
    booked = [steps({"a": [0.9, 0.9], "b": [0.3]}) for _ in range(3)][-1]
    assert 0 < booked < K


def test_runs_of_requests_that_do_not_draft_are_booked_as_last_seen(monkeypatch):
    for has_runs, expected in ((True, 4), (False, 0)):
        steps = _steps(monkeypatch, FLAT, has_runs)
        booked = [steps({"a": [0.95] * 4}, rows=()) for _ in range(3)][-1]
        assert booked == expected


def test_what_assigns_the_rows_is_compiled_before_service(monkeypatch):
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification as vllms

    calls = []

    def assign(probs: Any, rows: Any, capacities: Any, budget: int, num_steps: int) -> None:
        assert rows.dtype == torch.int64, "as InputBatch.idx_mapping"
        calls.append((len(rows), budget, capacities.tolist()))

    monkeypatch.setattr(vllms, "_assign_draft_token_budget_compiled", assign)
    steps = _steps(monkeypatch, FLAT)
    steps.booked_rows.warm()
    assert calls == [(n, budget, [K] * n) for n in (1, 2) for budget in (1, 2)]


class _Told:
    """A head that lags and is right: it says of each candidate with which probability it will be accepted."""

    name, lag, needs = "told", 1, frozenset({"hidden_states"})

    def __call__(self, features: Any, position: int) -> torch.Tensor:
        return features.hidden_states[:, 0]


def test_rows_by_the_chances_of_sampled_drafts_bend_the_law():
    """Why they are refused (``gpu_defaults.SAMPLED``): two tokens, drawn evenly, where the target has nine in ten of
    the first. Rows for half of the candidates go to those that look better once they were read."""
    from vllm.v1.worker.gpu.spec_decode.adaptive_verification import _assign_draft_token_budget

    from vllm_specdecpp.decision.rules import ThresholdRule
    from vllm_specdecpp.engine.v2.round import DeviceRound

    torch.manual_seed(0)
    num, emitted = 512, []
    target, draft = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    for _ in range(12):
        round_ = DeviceRound(torch.full((num, 2), -1), torch.empty(num, 2))
        round_.set_rule(ThresholdRule(_Told(), 0.95), 1)
        round_.limits[:, 0], round_.limits[:, 1], round_.limits[:, 2:] = 2, 1000, -1
        ones = torch.ones(num, dtype=torch.int32)
        round_.start(num, 20 * ones, 0 * ones, ones)
        logits, hidden = draft.log().expand(num, 2).contiguous(), torch.full((num, 1), torch.nan)
        first = torch.multinomial(draft.expand(num, 2), 1).squeeze(1)
        chance = torch.minimum(target / draft, torch.ones(2))[first]
        for step, (tokens, states) in enumerate(((first, hidden), (first, chance[:, None])), 1):
            round_.observe_pass(step, logits, states)
            round_.append_drawn(tokens)
        rows = round_.lengths.clone()
        _assign_draft_token_budget(round_.confidences, torch.arange(num), rows, num // 2, 2)
        accepted = torch.where(torch.rand(num) < chance, first, 0)  # what is left of the target is all on 0
        drawn = torch.multinomial(target.expand(num, 2), 1).squeeze(1)
        emitted.append(torch.where(rows >= 1, accepted, drawn) == 0)
    share = float(torch.cat(emitted).float().mean())
    assert share > 0.9 + 5 * (0.09 / (12 * num)) ** 0.5
