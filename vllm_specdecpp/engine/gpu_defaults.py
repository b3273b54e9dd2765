# SPDX-License-Identifier: Apache-2.0
"""Options that nobody gave, on an NVIDIA GPU: the bound K, asynchronous scheduling, adaptive verification.

vLLM's own ``draft_model`` is scheduled asynchronously: the host plans the next step while the device runs this one.
It then books K + 1 rows for each request, whatever is drafted; adaptive verification leaves out on the device what is
not worth a row. Where the attention backend cannot replay batches of different lengths there is no adaptive
verification, and synchronous scheduling, which verifies exactly what was drafted, is the better default.

**Unproven**: no GPU has run this. An option that the user gives always wins.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from vllm_specdecpp.config import SpecDecPPConfig
from vllm_specdecpp.engine.shared.logits_memory import LogitsMemory, longest_that_fits

logger = logging.getLogger("vllm.specdecpp")

LENGTH = 10
"""K where nothing is known against it. Longer rounds are rare, and each candidate books a row of every request."""
LOGITS_SHARE = 0.1
"""Of the memory that vLLM may use: what the logits of drafts and verifications may take by default."""
MOST_OF_MEMORY = 0.5
"""The same, above which a start is refused: weights and KV cache have to fit, too."""
TOKENS_SHARE = 0.01
"""Of the GPU's memory: what the requests' tokens may take there, to be searched for free runs."""
_HOPPER = 9
"""Major compute capability on which vLLM's default attention backend, FlashAttention 3, replays any mix of lengths."""


SAMPLED = (
    "draft_sample_method='probabilistic': which candidates are verified would depend on those that were drawn, so "
    "outputs would no longer be the target's"
)
"""Why there is no adaptive verification. How many rows a batch gets is set by the chances of an earlier drafting, and a
position that is drafted again may be drawn with the same noise (docs/upstream/adaptive-verification-noise.md); with a
head that lags, a candidate's own chance is known only once it is drawn. So whether Y_j gets a row may depend on Y_j.
Where each Y_j is the likeliest token it is a function of the past, and so are the chances."""


def samples_drafts(speculative_config: Mapping[str, Any]) -> bool:
    """Whether drafts are drawn, and not each one's likeliest token."""
    return speculative_config.get("draft_sample_method") == "probabilistic"


def on_gpu() -> bool:
    """Whether this is about an NVIDIA GPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def memory_room(args: Any) -> int:
    """Bytes of GPU memory that vLLM may use; ``args``: vLLM's ``EngineArgs``."""
    from vllm.platforms import current_platform

    return int(current_platform.get_device_total_memory() * args.gpu_memory_utilization)


def tokens_room() -> float:
    """Bytes of GPU memory that the requests' tokens may take."""
    from vllm.platforms import current_platform

    return TOKENS_SHARE * current_platform.get_device_total_memory() if on_gpu() else math.inf


def default_length(args: Any, user: Mapping[str, Any]) -> int:
    """K, where the user gave none: at most :data:`LENGTH`, less where logits would take too much memory.

    Args:
        args: vLLM's ``EngineArgs``, its ``max_num_seqs`` and ``max_num_batched_tokens`` perhaps left to vLLM.
        user: the speculative config.
    """
    model = args.create_model_config()
    tokens, sequences = args.get_batch_defaults(args.pipeline_parallel_size * args.tensor_parallel_size)
    memory = LogitsMemory(
        max_num_seqs=args.max_num_seqs or max(sequences.values()),
        length=LENGTH,
        vocab_size=model.get_vocab_size(),
        dtype=model.head_dtype,
        max_num_batched_tokens=args.max_num_batched_tokens or max(tokens.values()),
        keeps_draft_logits=samples_drafts(user),
        ranks=args.tensor_parallel_size,
    )
    length = longest_that_fits(memory, int(LOGITS_SHARE * memory_room(args)))
    least = user.get("min_speculative_tokens")
    return max(length, least) if isinstance(least, int) else length


def why_not_adaptive(args: Any, config: SpecDecPPConfig) -> str | None:
    """What stands against adaptive verification by default, or None; what vLLM refuses itself is not listed."""
    from vllm.platforms import current_platform

    if config.resolved_rule == "fixed":
        return "rule='fixed' makes no estimates"
    if args.enable_lora:
        return "LoRA adapters"
    if samples_drafts(args.speculative_config):
        return SAMPLED
    attention = args.attention_config
    backend = args.attention_backend or attention.backend or "auto"
    name = str(getattr(backend, "name", backend)).upper()
    if name != "TRITON_ATTN":
        capability = current_platform.get_device_capability()
        if capability is None or capability.major != _HOPPER:
            return f"no attention backend of compute capability {capability} is known to replay mixed lengths"
        if name not in ("AUTO", "FLASH_ATTN") or attention.flash_attn_version not in (None, 3):
            return f"attention backend {name}, version {attention.flash_attn_version}"
    model = args.create_model_config()
    if model.use_mla or model.is_hybrid or model.attention_chunk_size is not None:
        return f"the attention layers of {args.model}"
    return None


class Scheduling:
    """How steps are scheduled where the user left it open; see the module.

    Args:
        args: vLLM's ``EngineArgs``; its ``async_scheduling`` is set here, and ``enable_adaptive_verification`` in its
            ``speculative_config``.
        config: our options.
        may_run_v2: whether Model Runner V2 may be chosen; V1 is always scheduled synchronously.
    """

    def __init__(self, args: Any, config: SpecDecPPConfig, *, may_run_v2: bool) -> None:
        self._args, self.reason = args, ""
        self.is_default = may_run_v2 and on_gpu() and args.async_scheduling is not False
        adaptive = args.speculative_config.get("enable_adaptive_verification")
        self._gave_async, self._gave_adaptive = args.async_scheduling, adaptive
        if self.is_default and adaptive is None:
            refused = why_not_adaptive(args, config)
            adaptive = refused is None
            if refused is not None and config.resolved_rule != "fixed":
                self.reason = f"no adaptive verification: {refused}"
            if adaptive:
                args.speculative_config["enable_adaptive_verification"] = True
        if args.async_scheduling is None:
            # A fixed length is the length that is booked.
            args.async_scheduling = bool(self.is_default and (adaptive or config.resolved_rule == "fixed"))
        self.is_default &= args.async_scheduling != self._gave_async or adaptive != self._gave_adaptive

    def take_back(self, reason: str) -> bool:
        """Leave the defaults, as vLLM refuses them; whether there is anything to leave."""
        if not self.is_default:
            return False
        self.is_default, self.reason = False, reason
        self._args.async_scheduling = bool(self._gave_async)
        if self._gave_adaptive is None:
            self._args.speculative_config.pop("enable_adaptive_verification", None)
        return True

    def announce(self) -> None:
        """Say what was chosen, on a GPU."""
        if on_gpu():
            books = self._args.async_scheduling
            adaptive = self._args.speculative_config.get("enable_adaptive_verification")
            logger.info(
                "specdecpp: scheduling is %s, verification %s%s",
                "asynchronous" if books else "synchronous",
                "adaptive" if adaptive else "of what was booked" if books else "of what was drafted",
                f" ({self.reason})" if self.reason else "",
            )


def check_memory(args: Any, vllm_config: Any) -> None:
    """Say what logits take, and refuse what cannot fit.

    Raises:
        ValueError: one line that names the options.
    """
    if on_gpu() and vllm_config.use_v2_model_runner:
        memory = memory_of(vllm_config)
        memory.check(int(MOST_OF_MEMORY * memory_room(args)))
        logger.info("specdecpp: %s", memory.describe())


def memory_of(vllm_config: Any) -> LogitsMemory:
    """Of an engine that is configured."""
    speculative, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
    table = speculative.num_speculative_tokens_per_batch_size
    return LogitsMemory(
        max_num_seqs=scheduler.max_num_seqs,
        length=speculative.num_speculative_tokens,
        vocab_size=vllm_config.model_config.get_vocab_size(),
        dtype=vllm_config.model_config.head_dtype,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        keeps_draft_logits=speculative.draft_sample_method == "probabilistic",
        booked=max(most * (length + 1) for _, most, length in table) if table else None,
        ranks=vllm_config.parallel_config.tensor_parallel_size,
    )
