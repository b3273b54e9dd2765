# SPDX-License-Identifier: Apache-2.0
"""The same seed gives the same text, whatever the candidate lengths were: such requests' verification on V1.

Without speculation a request with a seed draws its j-th token from the target's law with the j-th draw of a generator
of its own. Here row i of its round draws a token just so, with the draw that is i further on than where the generator
stands; a candidate is accepted if and only if it is that token; and the generator goes on from where as many draws as
tokens emitted leave it.

Lossless, by induction over the rounds: what is emitted is, token by token, what the target would have drawn without
speculation, whatever was drafted and why. A candidate c is accepted with probability p(c), as a one-hot candidate is
by rejection sampling (min(1, p(c) / 1)), so it costs no acceptance. Floating point sets the bound: a verification has
more rows than a step without speculation, and a kernel that adds up otherwise for them may turn a near tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler

Generators = dict[int, torch.Generator]


class OwnNoise(RejectionSampler):
    """``vllm.v1.sample.rejection_sampler.RejectionSampler``, which goes on rejecting for requests without a seed.

    A row of the target's logits becomes one-hot at the token that it has drawn: this very candidate is then accepted,
    any other one replaced by it.
    """

    _seeded: _SeededRows | None = None  # during forward

    def forward(
        self,
        metadata: Any,
        draft_probs: torch.Tensor | None,  # [num_tokens, vocab_size]
        logits: torch.Tensor,  # [num_tokens + num_reqs, vocab_size]
        sampling_metadata: Any,
    ) -> Any:
        """As the base class, which draws the bonus tokens and then calls :meth:`apply_logits_processors`."""
        counts = metadata.num_draft_tokens
        generators = {index: g for index, g in sampling_metadata.generators.items() if counts[index]}
        if not generators or self.synthetic_mode:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        self._seeded = seeded = _SeededRows(generators, counts, logits.device)
        # The bonus token is drawn first, with the noise that comes last.
        seeded.draw(self.sampler, logits.new_zeros(len(seeded.rows), _noise_width(self.sampler, logits)))
        try:
            output = super().forward(metadata, draft_probs, logits, sampling_metadata)
        finally:
            self._seeded = None
        emitted = (output.sampled_token_ids != PLACEHOLDER_TOKEN_ID).sum(dim=1).tolist()
        for index, generator in generators.items():
            generator.set_state(seeded.states[index][emitted[index]])
        return output

    def apply_logits_processors(self, logits: torch.Tensor, sampling_metadata: Any, metadata: Any) -> torch.Tensor:
        """As the base class: [num_tokens, vocab_size]; rows of requests with a seed have drawn their tokens."""
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        if (seeded := self._seeded) is not None:
            beyond_bonus = {index: generator.get_state() for index, generator in seeded.generators.items()}
            seeded.rewind()
            rows, requests = seeded.rows, seeded.requests
            limits = sampling_metadata.top_k, sampling_metadata.top_p
            top_k, top_p = (None if limit is None else limit[requests] for limit in limits)
            scaled = logits[rows] / sampling_metadata.temperature[requests][:, None]  # [num_rows, vocab_size]
            drawn, seeded.processed = seeded.draw(self.sampler, scaled, top_k, top_p)
            for index, generator in seeded.generators.items():
                seeded.states[index] += generator.get_state(), beyond_bonus[index]
            logits[rows] = float("-inf")
            logits[rows, drawn.long()] = 0.0
        return logits

    def _get_logprobs_tensors(
        self, max_num_logprobs: int, metadata: Any, logits: torch.Tensor, target_logits: torch.Tensor, *more: Any
    ) -> Any:
        if self._seeded is not None and self._seeded.processed is not None:
            target_logits[self._seeded.rows] = self._seeded.processed
        return super()._get_logprobs_tensors(max_num_logprobs, metadata, logits, target_logits, *more)


def _noise_width(sampler: Any, logits: torch.Tensor) -> int:
    """Entries of a row that move a generator as far as a row of the vocabulary does."""
    draws = sampler.topk_topp_sampler
    # vLLM's CPU sampler takes one number for all of a row's noise.
    return 1 if draws.forward == draws.forward_cpu and not draws.use_fp64_gumbel else logits.shape[1]


class _SeededRows:
    """Rows of the candidates of requests that have a seed.

    Args:
        generators: by request; of those with candidates.
        counts: candidates of each request of the batch.
        device: of the logits.

    Attributes:
        rows: [num_rows] int64 index into the candidates' logits.
        requests: [num_rows] int64 index into the batch.
        states: a request's generator before each of the round's draws in turn.
        processed: [num_rows, vocab_size] what logprobs after processing are made of, if they are asked for.
    """

    def __init__(self, generators: Generators, counts: list[int], device: torch.device) -> None:
        ends = list(accumulate(counts))
        requests = [index for index in generators for _ in range(counts[index])]
        rows = [row for index in generators for row in range(ends[index] - counts[index], ends[index])]
        self.generators = generators
        self.rows, self.requests = torch.tensor(rows, device=device), torch.tensor(requests, device=device)
        self.states: dict[int, list[torch.Tensor]] = {}
        self.processed: torch.Tensor | None = None
        self._by_row = _Noting(enumerate(generators[index] for index in requests))
        self._requests = requests

    def draw(
        self, sampler: Any, logits: torch.Tensor, top_k: torch.Tensor | None = None, top_p: torch.Tensor | None = None
    ) -> Any:
        """A token for each row, by vLLM's own sampler: [num_rows], and logits or logprobs if they are asked for."""
        self._by_row.states = []
        drawn = sampler.topk_topp_sampler(logits, self._by_row, top_k, top_p)
        self.states = {index: [] for index in self.generators}
        for index, state in zip(self._requests, self._by_row.states, strict=True):
            self.states[index].append(state)
        return drawn

    def rewind(self) -> None:
        """Back to before the first draw."""
        for index, generator in self.generators.items():
            generator.set_state(self.states[index][0])


class _Noting(Generators):
    """Generators by row, as vLLM's samplers read them: row after row. Notes each one's state before it is used."""

    states: list[torch.Tensor]

    def items(self) -> Iterator[tuple[int, torch.Generator]]:  # type: ignore[override]
        for row, generator in super().items():
            self.states.append(generator.get_state())
            yield row, generator
