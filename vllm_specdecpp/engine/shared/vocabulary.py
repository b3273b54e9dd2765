# SPDX-License-Identifier: Apache-2.0
"""Draft and target must share their tokens, not the number of rows of their output layers.

Checkpoints pad their vocabularies differently (Qwen2.5: 152,064 rows at 7B, 151,936 at 0.5B). Where the tokens are the
same, the draft's logits get the target's width: rows that it lacks are never drawn, rows beyond the target's are cut.
A token that the draft has no row for is read as its last one: the candidates after it are then worse, never wrong, as
the target verifies them.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from vllm_specdecpp.engine.shared.cost_file import cache_folder
from vllm_specdecpp.provenance import model_revision

logger = logging.getLogger("vllm.specdecpp")

_COMPARED = "specdecpp_tokens_compared"
_comparing: ContextVar[bool] = ContextVar("specdecpp_comparing", default=False)

ADVICE = "choose a draft model of the target's family, which has the same tokenizer"


def difference(
    target: Mapping[str, int], draft: Mapping[str, int], added: frozenset[str], num_rows: int
) -> tuple[int, str] | None:
    """Where two vocabularies differ.

    Added tokens (special ones, mostly) may differ: fine-tuned targets rename or add some, and candidates rarely are
    any. All others must be the same, and need a row in both models.

    Args:
        target, draft: token to id.
        added: tokens that are added ones in either of them.
        num_rows: ids that both models know, from 0 on.

    Returns:
        How many tokens differ, and the first of them in words; None if none does.
    """
    regular = [token for token in {**target, **draft} if token not in added]
    other = [token for token in regular if target.get(token) != draft.get(token)]
    if other:
        token = min(other, key=lambda token: target.get(token, draft.get(token, 0)))
        return len(other), f"{token!r} is {_id(target, token)} in the target's, {_id(draft, token)} in the draft's"
    rowless = [token for token in regular if target[token] >= num_rows]
    if rowless:
        token = min(rowless, key=target.__getitem__)
        return len(rowless), f"{token!r} is id {target[token]}, and one of the models has {num_rows} rows only"
    return None


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "no token"


def check(target: Any, draft: Any) -> None:
    """Compare the tokens of two models; without their tokenizers, the sizes.

    Args:
        target, draft: ``vllm.config.ModelConfig`` of each.

    Raises:
        ValueError: one line: the tokens differ, or the sizes do and no tokenizers say that the tokens do not.
    """
    sizes = target.get_vocab_size(), draft.get_vocab_size()
    kept = _kept(target, draft, sizes)
    if kept is not None and os.path.exists(kept):
        return
    tokenizers = _tokenizers(target, draft)
    if tokenizers is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the target's vocabulary has {sizes[0]} rows, the draft's {sizes[1]}, and their tokenizers cannot be "
                f"compared (skip_tokenizer_init, or files are missing); put both beside the models, or {ADVICE}"
            )
        return
    (target_tokens, target_added), (draft_tokens, draft_added) = tokenizers
    found = difference(target_tokens, draft_tokens, frozenset(target_added) | frozenset(draft_added), min(sizes))
    if found is not None:
        num, words = found
        raise ValueError(
            f"the draft has other tokens than the target: {num} differ, e.g. {words} "
            f"(rows: {sizes[0]} and {sizes[1]}); {ADVICE}"
        )
    if kept is not None:
        with suppress(OSError):  # a read-only disk: they are compared again
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.touch()


def _kept(target: Any, draft: Any, sizes: tuple[int, int]) -> Path | None:
    """A file that is there if just these tokenizers were found to agree: to load and compare them takes seconds.

    None where nothing says whether they are still the same ones, and where none are loaded.
    """
    if target.skip_tokenizer_init:
        return None
    found: list[Any] = [sizes, target.tokenizer_mode, target.trust_remote_code]
    for name, revision in _sources(target, draft):
        if os.path.isdir(name):
            with os.scandir(name) as entries:  # weights as well: a folder that is made anew is another one
                files = [(e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file()]
            found.append((os.path.abspath(name), sorted(files)))
        elif revision is None and (commit := model_revision(name)):
            found.append((name, commit))
        else:
            return None
    return cache_folder() / f"tokens-{hashlib.sha256(repr(found).encode()).hexdigest()[:16]}"


def _sources(target: Any, draft: Any) -> tuple[tuple[str, str | None], ...]:
    """Name and revision of both tokenizers; vLLM gives the draft's configuration the target's."""
    return (target.tokenizer, target.tokenizer_revision), (draft.model, draft.revision)


def _tokenizers(target: Any, draft: Any) -> list[tuple[dict[str, int], dict[str, int]]] | None:
    """All tokens and the added ones, of target and draft; None if one of the tokenizers is not at hand."""
    from vllm.tokenizers.registry import cached_get_tokenizer

    if target.skip_tokenizer_init:
        return None
    found = []
    for name, revision in _sources(target, draft):
        try:
            tokenizer = cached_get_tokenizer(
                name,
                runner_type=target.runner_type,
                tokenizer_mode=target.tokenizer_mode,
                revision=revision,
                trust_remote_code=target.trust_remote_code,
            )
            found.append((tokenizer.get_vocab(), tokenizer.get_added_vocab()))
        except Exception as error:  # whatever a tokenizer's own code raises: it only saves a useless draft
            logger.info("specdecpp: no tokenizer of %s to compare (%s)", name, str(error).split("\n")[0])
            return None
    return found


@contextmanager
def compared_by_token() -> Iterator[None]:
    """While a configuration is made: of its pair the tokens are compared, now and later, where vLLM compares sizes."""
    reset = _comparing.set(True)
    try:
        yield
    finally:
        _comparing.reset(reset)


def wrap_check(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``SpeculativeConfig.verify_equal_vocab_size_if_draft_model``, which vLLM asks again and again, in workers too."""

    @functools.wraps(original)
    def verify(self: Any) -> None:
        target, draft = self.target_model_config, self.draft_model_config
        if target is None or draft is None:
            return original(self)
        if _comparing.get():
            check(target, draft)
            setattr(draft.hf_config, _COMPARED, True)  # travels to the workers
        elif not getattr(draft.hf_config, _COMPARED, False):
            return original(self)
        return None

    return verify


def fit_draft(model: torch.nn.Module, speculative_config: Any) -> None:
    """:func:`fit` for vLLM's configuration of a pair."""
    target, draft = speculative_config.target_model_config, speculative_config.draft_model_config
    fit(model, target.get_vocab_size(), draft.get_vocab_size())


def fit(model: torch.nn.Module, num_target: int, num_draft: int) -> None:
    """Give a loaded draft model the target's width, both ways; does nothing where the sizes are equal.

    Args:
        model: whose ``compute_logits`` returns [num_tokens, num_draft], and [num_tokens, num_target] from now on.
        num_target, num_draft: rows of the two output layers.
    """
    if num_target == num_draft:
        return
    original: Any = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        logits = original(*args, **kwargs)  # [num_tokens, num_draft]; None on ranks that get no logits
        if logits is None:
            return None
        if num_draft > num_target:
            return logits[:, :num_target].contiguous()
        return pad(logits, (0, num_target - num_draft), value=float("-inf"))  # [num_tokens, num_target]

    model.compute_logits = compute_logits  # type: ignore[assignment]
    if num_draft < num_target:

        def read_what_it_has(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input_ids = args[0] if args else kwargs["input_ids"]
            if input_ids is not None:
                input_ids.clamp_(max=num_draft - 1)  # in place: a captured graph reads the same buffer

        model.register_forward_pre_hook(read_what_it_has, with_kwargs=True)


def fit_buffers(speculator: Any) -> None:
    """Give a V2 speculator's buffer of draft logits the target's width.

    vLLM compares draft and target row by row. With a narrower buffer it would cut the target's logits to its width.
    """
    num_target = speculator.vllm_config.model_config.get_vocab_size()
    if num_target == speculator.vocab_size:
        return
    speculator.vocab_size = num_target
    if speculator.draft_logits is not None:
        speculator.draft_logits = None  # large: freed first
        dtype, fill = speculator.draft_logits_spec(speculator.vllm_config)
        shape = speculator.max_num_reqs, speculator.num_speculative_steps, num_target
        speculator.draft_logits = torch.full(shape, fill, dtype=dtype, device=speculator.device)
