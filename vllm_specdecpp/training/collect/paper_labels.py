# SPDX-License-Identifier: Apache-2.0
"""Labels as the paper makes them (SpecDec++, arXiv:2405.19715), with Hugging Face models.

For a prompt and the target's own response x_1..x_N, teacher-forced, all at temperature 1:

* Y_i ~ q( . | x_<i): one candidate a position, drawn from the draft given the *target's* prefix;
* soft label min(1, p(Y_i | x_<i) / q(Y_i | x_<i)), the probability that rejection sampling keeps Y_i;
* z_i = x_i with probability ``mixing`` (0.15), else Y_i; the draft reads z_1..z_N in a second pass, whose state at i is
  what the head reads about Y_i. Only positions with z_i = Y_i become rows.

Every random number is fixed by (seed, unit, prompt, position): batching and chunking change nothing but rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_specdecpp.decision.features import features_from_logits

LOGITS_PER_CHUNK = 1 << 24
"""Logits held at once: 64 MB in float32, and twice that for the float64 sums that candidates are drawn from."""
LOGITS_TOLERANCE = 2.0**-6
"""Of the logits' spread: twice bfloat16's spacing, which the two ways to compute them may differ by."""


class CausalModel:
    """A Hugging Face causal LM as its two halves: hidden states of whole sequences, logits of some of them."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = model.get_input_embeddings().weight.device
        self.output = model.get_output_embeddings()
        self.vocab_size: int = self.output.weight.shape[0]
        self._check_halves()

    @classmethod
    def load(cls, name: str, dtype: str) -> CausalModel:
        """Load a checkpoint: onto the accelerators if there are any, else into main memory.

        Args:
            name: a folder or a hub id.
            dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.

        Raises:
            ValueError: transformers is not installed, or the checkpoint cannot be read.
        """
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise ValueError(
                "specdecpp: source='paper' needs transformers; in the clone: pip install '.[train]'"
            ) from None
        placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
        try:
            return cls(AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **placed))
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"specdecpp: model {name!r} cannot be loaded ({reason}); check the name") from None

    @property
    def max_length(self) -> int | None:
        """Tokens that the model can read, if its config says."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def hidden_states(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Last hidden states, after the final norm: [len(sequence), hidden_size] each."""
        longest = max(map(len, sequences))
        # Padded on the right, where a causal model's real positions never look.
        ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
        mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
        states = self.model.base_model(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False
        ).last_hidden_state  # [num_sequences, longest, hidden_size]
        return [row[: len(sequence)] for row, sequence in zip(states, sequences, strict=True)]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[n, hidden_size] → [n, vocab_size] float32."""
        return self.output(hidden_states).float()

    @torch.inference_mode()
    def _check_halves(self) -> None:
        """Refuse a model that does more between its hidden states and its logits than one matrix (e.g. soft-caps)."""
        ids = torch.arange(4, device=self.device).remainder(self.vocab_size)
        whole = self.model(input_ids=ids[None], use_cache=False).logits[0].float()  # [4, vocab_size]
        halves = self.logits(self.hidden_states([ids.tolist()])[0]).to(whole.device)
        if float((whole - halves).abs().max()) > LOGITS_TOLERANCE * float(whole.abs().max()):
            name = type(self.model).__name__
            raise ValueError(
                f"specdecpp: source='paper' does not know how {name} makes its logits from its hidden states; "
                "use source='on-policy', which asks vLLM"
            )


@dataclass
class Positions:
    """The rows of one response: the positions whose z_i is the draft's Y_i, in order."""

    hidden_states: Tensor
    """[n, hidden_size] of the pass over the target's tokens that yields Y_i."""

    read_hidden_states: Tensor
    """[n, hidden_size] of the pass over the mixed tokens that has read Y_i."""

    token_ids: Tensor
    """[n] int64, Y_i."""

    top1_prob: Tensor
    entropy: Tensor
    margin: Tensor
    drawn_logprob: Tensor
    """[n] float32 each, of q( . | x_<i)."""

    soft_label: Tensor
    """[n] float32, min(1, p/q)."""

    accepted: Tensor
    """[n] bool, one draw from ``soft_label``: what a verification would have said."""

    emitted: Tensor
    """[n] int64, response tokens before the position."""


def uniforms(seed: int, unit: int, prompt: int, num_positions: int) -> Tensor:
    """[num_positions, 3] float64 in [0, 1): for the candidate, the mixing and the outcome of each position."""
    digest = hashlib.sha256(f"{seed}:{unit}:{prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(num_positions, 3, generator=generator, dtype=torch.float64)


@torch.inference_mode()
def label(
    target: CausalModel, draft: CausalModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
    randoms: Sequence[Tensor], mixing: float,
) -> list[Positions]:  # fmt: skip
    """The recipe for a batch of prompts and responses, none of them empty.

    Args:
        target: models of one vocabulary.
        draft: the draft model.
        prompts: token ids.
        responses: token ids of the target's continuations.
        randoms: [len(response), 3] each, of :func:`uniforms`.
        mixing: probability that the draft reads the target's token in the second pass.

    Returns:
        The rows of each response.
    """
    texts = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    # The state that yields position i stands one token before it.
    spans = [slice(len(p) - 1, len(p) - 1 + len(r)) for p, r in zip(prompts, responses, strict=True)]
    draft_states = [states[span] for states, span in zip(draft.hidden_states(texts), spans, strict=True)]
    target_states = [states[span] for states, span in zip(target.hidden_states(texts), spans, strict=True)]
    drawn = [
        _draw(target, draft, p_states, q_states, random[:, 0])
        for p_states, q_states, random in zip(target_states, draft_states, randoms, strict=True)
    ]
    from_draft = [random[:, 1] >= mixing for random in randoms]
    mixed = []
    for response, row, is_draft in zip(responses, drawn, from_draft, strict=True):
        mixed.append(torch.where(is_draft, row["token_ids"], torch.tensor(response)).tolist())
    read = draft.hidden_states([[*prompt, *tokens] for prompt, tokens in zip(prompts, mixed, strict=True)])
    found = []
    for i, prompt in enumerate(prompts):
        keep = from_draft[i]
        columns = {name: column[keep] for name, column in drawn[i].items()}
        found.append(
            Positions(
                hidden_states=draft_states[i].cpu()[keep],
                read_hidden_states=read[i][len(prompt) :].cpu()[keep],
                accepted=randoms[i][keep, 2] < columns["soft_label"],
                emitted=torch.arange(len(keep))[keep],
                **columns,
            )
        )
    return found


def _draw(
    target: CausalModel, draft: CausalModel, target_states: Tensor, draft_states: Tensor, random: Tensor
) -> dict[str, Tensor]:
    """Draw Y_i and compare p with q there, a few positions at a time: whole logits would not fit into memory.

    Args:
        target_states: [n, target_hidden_size].
        draft_states: [n, hidden_size].
        random: [n] float64.
    """
    rows = max(1, LOGITS_PER_CHUNK // draft.vocab_size)
    chunks = []
    for start in range(0, len(random), rows):
        part = slice(start, start + rows)
        logits = draft.logits(draft_states[part])  # [rows, vocab_size]
        log_q = logits.log_softmax(-1)
        # Inverse of the cumulative distribution: one number a draw, whatever the chunk. float32 is too coarse for it.
        total = log_q.double().exp().cumsum(-1)
        aim = random[part, None].to(total.device) * total[:, -1:]
        tokens = torch.searchsorted(total, aim, right=True).clamp_(max=draft.vocab_size - 1)  # [rows, 1]
        log_p = target.logits(target_states[part]).to(logits.device).log_softmax(-1)
        drawn_logprob = log_q.gather(1, tokens)[:, 0]
        features = features_from_logits(logits, top1=True, entropy=True, margin=True)
        columns = {
            "token_ids": tokens[:, 0],
            "top1_prob": features.top1_prob,
            "entropy": features.entropy,
            "margin": features.margin,
            "drawn_logprob": drawn_logprob,
            "soft_label": (log_p.gather(1, tokens)[:, 0] - drawn_logprob).exp().clamp(max=1.0),
        }
        chunks.append({name: column.cpu() for name, column in columns.items() if column is not None})
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
