# SPDX-License-Identifier: Apache-2.0
"""A draft that proposes some token ids only: ``draft_vocab.safetensors`` in its folder names them.

The file holds one tensor, ``d2t`` [num_ids] int64: ascending token ids of the draft's vocabulary. All else in the
folder is an ordinary model, which reads every token; ``engine.shared.output_layer`` computes the logits of these ids.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger("vllm.specdecpp")

FILE, TENSOR = "draft_vocab.safetensors", "d2t"
INDEX = "model.safetensors.index.json"


def read(draft: Any) -> torch.Tensor | None:
    """The token ids that a draft proposes: [num_ids] int64 on the host; None if it has no such file.

    Args:
        draft: ``vllm.config.ModelConfig`` of the draft; its model is a folder or a hub id.

    Raises:
        ValueError: one line: the file is not what it must be.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load
    from vllm.transformers_utils.repo_utils import get_hf_file_bytes

    content = get_hf_file_bytes(FILE, draft.model, draft.revision)
    if content is None:
        return None
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise _refused(draft, f"cannot be read ({error})") from None
    if set(tensors) != {TENSOR}:
        raise _refused(draft, f"holds {sorted(tensors)}, not {TENSOR!r} alone")
    if get_hf_file_bytes(INDEX, draft.model, draft.revision) is None:
        raise _refused(draft, f"would be loaded as weights by vLLM, as there is no {INDEX}")
    token_ids, num_rows = tensors[TENSOR], draft.get_vocab_size()
    if token_ids.dtype != torch.int64 or token_ids.dim() != 1 or not len(token_ids):
        what = f"{str(token_ids.dtype).removeprefix('torch.')} {list(token_ids.shape)}"
        raise _refused(draft, f"has {TENSOR} of {what}, not int64 [num_ids]")
    if not bool((token_ids.diff() > 0).all()):
        index = int((token_ids.diff() <= 0).int().argmax())
        raise _refused(draft, f"must ascend, but {token_ids[index + 1]} follows {token_ids[index]}")
    if token_ids[0] < 0 or token_ids[-1] >= num_rows:
        bad = int(token_ids[0] if token_ids[0] < 0 else token_ids[-1])
        raise _refused(draft, f"names token id {bad}, but the draft's vocabulary has {num_rows} rows")
    return token_ids


def check(target: Any, draft: Any) -> None:
    """Read the file in the front end, so that a bad one fails here and not inside a worker; say what it does.

    Args:
        target, draft: ``vllm.config.ModelConfig`` of each.

    Raises:
        ValueError: as :func:`read`, or the target's stop tokens are not among the ids.
    """
    token_ids = read(draft)
    if token_ids is None:
        return
    if missing := sorted(stop_tokens(target) - set(token_ids.tolist())):
        raise _refused(draft, f"lacks {missing}, stop tokens of the target {target.model!r}")
    num_ids, num_rows = len(token_ids), draft.get_vocab_size()
    logger.info("specdecpp: draft proposes %s of %s token ids (%s)", f"{num_ids:,}", f"{num_rows:,}", FILE)


def stop_tokens(target: Any) -> set[int]:
    """Token ids that end the target's answers by its own configuration; a request may name more."""
    found: set[int] = set()
    for ids in (target.hf_text_config.eos_token_id, target.try_get_generation_config().get("eos_token_id")):
        found.update([ids] if isinstance(ids, int) else ids or ())
    return found


def _refused(draft: Any, what: str) -> ValueError:
    mend = "shrink the draft for this target anew (vllm-specdecpp shrink), or remove the file to draft from all ids"
    return ValueError(f"specdecpp: model={draft.model!r}: its {FILE} {what}; {mend}")
