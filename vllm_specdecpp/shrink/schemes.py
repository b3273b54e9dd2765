# SPDX-License-Identifier: Apache-2.0
"""Quantised weights in the compressed-tensors format, data-free: scales are the extremes of a channel or a group.

What the draft loses is candidates, never the target's law. vLLM reads the format through
``vllm.model_executor.layers.quantization.compressed_tensors``; the arithmetic is compressed-tensors' own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_specdecpp.provenance import cpu_flags

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

SCHEMES = {"int8": "W8A8", "fp8": "FP8_DYNAMIC", "int4": "W4A16"}
"""Name → compressed-tensors' preset. int8 and fp8: a scale a channel, activations quantised per token as they come;
int4: weights alone, a scale a group."""

SMALLEST_GROUP = 32
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Either makes a CPU multiply int8 without overflow, and fast."""
_FORMATS = {"int8": "int-quantized", "fp8": "float-quantized", "int4": "pack-quantized"}
# Linear layers by their names: GPT-2's "c_proj" is a transposed convolution, routers choose experts and stay exact.
_LINEAR = re.compile(r"\.(?:(?!c_proj)\w*_proj|query_key_value|dense(?:_h_to_4h|_4h_to_h)?|fc[12])\.weight$")
_IN_A_LAYER = re.compile(r"\.\d+\.")
OUTPUT = "lm_head"
"""Module of vLLM's that a quantised output layer is loaded as."""
LAYERS, OUTPUT_LAYER = "Linear", f"re:.*{OUTPUT}$"
"""What a scheme is for, as compressed-tensors says it: vLLM's class of an output layer is no ``Linear``."""
KNOWN_OUTPUTS = frozenset(
    f"{name}ForCausalLM" for name in (
        "Exaone4", "Gemma", "Gemma3", "Glm4", "Granite", "Llama", "Mistral", "Phi3", "Qwen2", "Qwen3",
    )
)  # fmt: skip
"""Architectures whose ``lm_head`` vLLM gives the quantisation, and ties only if ``tie_word_embeddings`` says so."""


def is_linear(name: str, shape: Iterable[int]) -> bool:
    """Whether a tensor of a checkpoint is the weight of a layer that is quantised: a linear one, in one of the repeated
    layers. Embeddings, norms, routers and convolutions
    stay as they are; of the output layer see :func:`has_output`."""
    return len(list(shape)) == 2 and bool(_LINEAR.search(name) and _IN_A_LAYER.search(name))


def has_output(config: Mapping[str, Any]) -> bool:
    """Whether the output layer is quantised too; a tied one becomes a layer of its own, and the embedding stays.

    Args:
        config: of the model's ``config.json``.
    """
    return KNOWN_OUTPUTS.issuperset(config.get("architectures") or [""])


def output_scheme(name: str) -> str:
    """The scheme of the output layer: in four bits its choices would suffer most."""
    return default_scheme() if name == "int4" else name


def scheme_for(
    name: str, shapes: Mapping[str, tuple[int, ...]], targets: Sequence[str] = (LAYERS,)
) -> QuantizationScheme:
    """compressed-tensors' scheme for some of a model's layers.

    Args:
        name: of :data:`SCHEMES`.
        shapes: weight → [num_out, num_in], of those layers.
        targets: :data:`LAYERS`, :data:`OUTPUT_LAYER` or both.

    Raises:
        ValueError: one line: the model has no linear layer that is known, or, for int4, one that no group divides.
    """
    from compressed_tensors.quantization import preset_name_to_scheme

    if not shapes:
        raise ValueError("specdecpp: the draft has no linear layer that shrink knows; serve it as it is")
    scheme = preset_name_to_scheme(SCHEMES[name], list(targets))
    if name == "int4":
        group = scheme.weights.group_size
        while any(num_in % group for _, num_in in shapes.values()):
            group //= 2
        if group < SMALLEST_GROUP:
            odd = next(weight for weight, (_, num_in) in shapes.items() if num_in % SMALLEST_GROUP)
            raise ValueError(
                f"specdecpp: scheme int4 needs inputs in groups of {SMALLEST_GROUP}, and {odd} has {shapes[odd][1]}; "
                "use scheme int8"
            )
        scheme.weights.group_size = group
    return scheme


def quantised(name: str, weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """One layer's tensors as vLLM reads them.

    Args:
        name: of :data:`SCHEMES`.
        weight: [num_out, num_in], any float dtype.
        scheme: of :func:`scheme_for`.

    Returns:
        Last part of the tensor's name → tensor: ``weight`` or ``weight_packed``, ``weight_scale``, ...
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    group = scheme.weights.group_size or weight.shape[1]
    low, high = weight.float().unflatten(1, (-1, group)).aminmax(dim=-1)  # [num_out, num_groups]
    scale, zero_point = calculate_qparams(low, high, scheme.weights)
    if name == "int4":  # vLLM's kernels take these scales in the model's dtype: round before the weights do
        scale = scale.to(weight.dtype)
    parts = {"weight": weight.to(scale.dtype), "weight_scale": scale, "weight_zero_point": zero_point}
    found = BaseCompressor.get_value_from_registry(_FORMATS[name]).compress(parts, scheme)
    return {key: value.contiguous() for key, value in found.items()}


def config_entry(made: Mapping[str, QuantizationScheme], unquantised: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` of the model's ``config.json``.

    Args:
        made: name of :data:`SCHEMES` → scheme.
        unquantised: modules with a matrix that stays as it is.
    """
    groups = {}
    for number, (name, scheme) in enumerate(made.items()):
        groups[f"group_{number}"] = scheme.model_dump(mode="json", exclude_none=True) | {"format": _FORMATS[name]}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(made) > 1 else _FORMATS[next(iter(made))],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(unquantised),
    }


def default_scheme() -> str:
    """The scheme that this machine has a fast kernel for."""
    return "fp8" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9) else "int8"


def missing_kernel(name: str) -> str | None:
    """Why this machine cannot run a scheme fast, in words; None if it can, or nothing is known against it."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_capability()
        lacks = found < (7, 5) or (name == "int8" and found >= (10, 0))
        return f"vLLM has no kernel for it on GPUs of compute capability {found[0]}.{found[1]}" if lacks else None
    if name == "fp8":
        return "few CPUs have fp8 instructions; more have int8's"
    flags = cpu_flags()
    if flags and not flags & VNNI:
        if name == "int4" and "avx512f" not in flags:
            return "vLLM has no kernel for it on CPUs without AVX-512, and cannot run it"
        return "without VNNI instructions vLLM's int8 layers are no faster than bfloat16, and their sums overflow"
    return None
