# SPDX-License-Identifier: Apache-2.0
"""What a running engine has verified, row by row: the target's logits are the target's, those of the drafts are the
ones that they were drawn from.

With vLLM's kernels, which are right for whatever logits they are given, output then follows the target's law; a few
rounds show it, where samples would have to be counted by the thousand.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.exact_law import p_value
from tests.reference_loop import GreedyModel

BUCKETS = 4


class Verified:
    """Checks every verification of ``llm`` from now on, of requests at temperature 1.

    Args:
        monkeypatch: pytest's.
        llm: an engine on Model Runner V2.
        target: its target.
        draft: its draft model, if drafts are drawn by their probabilities; None: vLLM must take them for certain.

    Attributes:
        num_rows: rows of logits that were verified.
        num_drafted, num_runs: candidates among them, of the draft model and of free runs.
        buckets: of each candidate that was drawn without a seed, where it stands in the draft's law.
    """

    def __init__(self, monkeypatch: Any, llm: Any, target: GreedyModel, draft: GreedyModel | None) -> None:
        from vllm.v1.worker.gpu.spec_decode import rejection_sampler

        self._runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._target, self._draft, self._chance = target, draft, random.Random(1)
        self.num_rows = self.num_drafted = self.num_runs = 0
        self.buckets: list[tuple[int]] = []
        original = rejection_sampler.rejection_sample

        def checked(logits: Any, draft_logits: Any, candidates: Any, ends: Any, pos: Any, states: Any, *args: Any,
                    **kwargs: Any) -> Any:  # fmt: skip
            assert (draft_logits is None) == (self._draft is None)
            rows = zip(states.tolist(), ends.tolist(), ends[1:].tolist(), strict=False)
            for state, start, end in rows:
                own = None if draft_logits is None else draft_logits[state]
                self._check(state, int(pos[start]) + 1, logits[start:end], own, candidates[start + 1 : end].tolist())
            return original(logits, draft_logits, candidates, ends, pos, states, *args, **kwargs)

        monkeypatch.setattr(rejection_sampler, "rejection_sample", checked)

    def _check(self, state: int, length: int, logits: Any, draft_logits: Any, candidates: list[int]) -> None:
        """Of one request: rows of logits, the first one behind ``length`` tokens; candidates, -1 where none is."""
        speculator = self._runner.speculator
        text = self._runner.req_states.all_token_ids.gpu[state, :length].tolist()
        size = int(speculator.submitted[state])
        given, beyond = candidates[:size], candidates[size:]
        assert min(given, default=0) >= 0 and set(beyond) <= {-1}
        steps = self._target.steps([*text, *given], 1 + len(given))
        for row, step in zip(logits, steps, strict=False):
            torch.testing.assert_close(row.softmax(-1), step.logits.softmax(-1), atol=1e-4, rtol=1e-3)
        num_runs = 0 if speculator.runs is None else int(speculator.runs._ran[state])
        num_drafted = len(given) - num_runs
        self.num_rows, self.num_drafted = self.num_rows + len(logits), self.num_drafted + num_drafted
        self.num_runs += num_runs
        for index, token in enumerate(given if draft_logits is not None else ()):
            law = draft_logits[index].softmax(-1)
            if index < num_drafted:
                wanted = self._drafts_law([*text, *given[:index]], len(law))
                torch.testing.assert_close(law, wanted, atol=1e-4, rtol=1e-3)
                self._note(state, law, token)
            else:
                assert law[token] == 1.0

    def _drafts_law(self, text: list[int], vocab_size: int) -> torch.Tensor:
        """The draft's, whose output layer may be narrower or wider than the target's."""
        assert self._draft is not None
        known = self._draft.model.config.vocab_size
        logits = torch.full((vocab_size,), -torch.inf)
        mine = self._draft.steps([min(token, known - 1) for token in text])[0].logits[:vocab_size]
        logits[: len(mine)] = mine
        return logits.softmax(-1)

    def _note(self, state: int, law: torch.Tensor, token: int) -> None:
        if self._runner.sampler.sampling_states.seeds_set[state]:
            assert token == int(law.argmax())
            return
        before = float(law[law > law[token]].sum())
        place = before + self._chance.random() * float(law[token])
        self.buckets.append((min(int(BUCKETS * place), BUCKETS - 1),))

    def check_drawn(self) -> None:
        """Candidates were drawn, each from its own law."""
        assert self.num_drafted >= len(self.buckets) >= 40, (self.num_drafted, len(self.buckets))
        assert p_value(self.buckets, {(n,): 1 / BUCKETS for n in range(BUCKETS)}) > 1e-4
