# SPDX-License-Identifier: Apache-2.0
"""What the logits of a round take of the GPU's memory: bytes, and how long candidates may be for them to fit.

Two things grow with K × sequences × vocabulary: the draft's logits, which are kept from one step to the next where
drafts are sampled, and the target's of one verification, which no run of vLLM's memory profiling makes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK = 2**30
"""Bytes: vLLM's rejection sampler works on float32 copies of at most so many logits at a time
(``vllm.v1.worker.gpu.spec_decode.rejection_sampler.MAX_CHUNK_BYTES``)."""


@dataclass(frozen=True)
class LogitsMemory:
    """Of one engine, in entries and bytes.

    Args:
        max_num_seqs, max_num_batched_tokens: vLLM's.
        length: K.
        vocab_size: of the target.
        dtype: of its logits.
        keeps_draft_logits: whether drafts are sampled (``draft_sample_method="probabilistic"``).
        booked: most rows of logits in one step, where that is less than K + 1 of each sequence.
        ranks: tensor-parallel size.
    """

    max_num_seqs: int
    length: int
    vocab_size: int
    dtype: torch.dtype
    max_num_batched_tokens: int
    keeps_draft_logits: bool
    booked: int | None = None
    ranks: int = 1

    @property
    def rows(self) -> int:
        """Rows of logits of the largest verification."""
        most = self.max_num_seqs * (self.length + 1) if self.booked is None else self.booked
        return max(min(most, self.max_num_batched_tokens), 1)

    @property
    def draft(self) -> int:
        """Bytes of [max_num_seqs, K, vocab_size]; 0 if they are not kept."""
        entries = self.max_num_seqs * self.length * self.vocab_size
        return entries * self.dtype.itemsize if self.keeps_draft_logits else 0

    @property
    def chunk_rows(self) -> int:
        """Rows of the sampler's float32 copy."""
        return min(self.rows, max(CHUNK // (4 * self.vocab_size), 1))

    @property
    def verification(self) -> int:
        """Bytes of the largest verification's logits, and of the sampler's copy or, before it, of putting together what
        the ranks have of them (``CudaCommunicator.all_gather``: each one's part, all parts, and these in order)."""
        logits = self.rows * self.vocab_size * self.dtype.itemsize
        gathering = logits + logits // self.ranks if self.ranks > 1 else 0
        return logits + max(self.chunk_rows * self.vocab_size * 4, gathering)

    def describe(self) -> str:
        """For the log."""
        return (
            f"logits of drafts take {self.draft / 2**30:.2f} GiB, those of a verification of {self.rows} rows up to "
            f"{self.verification / 2**30:.2f} GiB"
        )

    def too_large(self, room: int) -> str:
        """Message of the error where they do not fit in ``room`` bytes."""
        return (
            f"specdecpp: num_speculative_tokens={self.length} with max_num_seqs={self.max_num_seqs} takes too much "
            f"memory: {self.describe()}, and there are {room / 2**30:.2f} GiB for them; lower num_speculative_tokens "
            "or --max-num-seqs"
        )

    def check(self, room: int) -> None:
        """Refuse what cannot fit.

        Args:
            room: bytes that may be there.

        Raises:
            ValueError: one line that names the options.
        """
        if self.draft + self.verification > room:
            raise ValueError(self.too_large(room))

    def hold(self, device: torch.device) -> None:
        """Take a verification's memory, and give it back: vLLM's profiling, which this is called in, then counts it.

        Raises:
            ValueError: there is not so much.
        """
        try:
            held = torch.empty(self.verification, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise ValueError(self.too_large(torch.accelerator.get_memory_info()[0])) from error
        del held


def longest_that_fits(memory: LogitsMemory, room: int) -> int:
    """The largest K up to ``memory.length`` whose logits fit in ``room`` bytes; 1 if none does."""
    for length in range(memory.length, 1, -1):
        shorter = LogitsMemory(**{**memory.__dict__, "length": length})
        if shorter.draft + shorter.verification <= room:
            return length
    return 1


def lengths_by_batch(max_num_seqs: int, length: int, max_num_batched_tokens: int) -> list[tuple[int, int, int]]:
    """Upper bounds on the candidate length where the scheduler books K + 1 rows a request whatever is drafted.

    At most half of a step's tokens are booked, so that prompts are read beside a full batch. K is halved until it fits.

    Returns:
        (fewest requests, most requests, K), as ``SpeculativeConfig.num_speculative_tokens_per_batch_size`` wants it.
    """
    table, fewest, half = [], 1, max_num_batched_tokens // 2
    while fewest <= max_num_seqs:
        most = max_num_seqs if length == 1 else min(half // (length + 1), max_num_seqs)
        if most >= fewest:
            table.append((fewest, most, length))
            fewest = most + 1
        length = max(length // 2, 1)
    return table
