# SPDX-License-Identifier: Apache-2.0
"""Make a draft model cheaper: quantise its weights.

Example: vllm-specdecpp shrink Qwen/Qwen2.5-0.5B-Instruct --out draft-int8
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from vllm_specdecpp.provenance import SHRUNK_FILE
from vllm_specdecpp.shrink.options import ShrinkOptions


def run(options: ShrinkOptions) -> int:
    """Carry out the command.

    Returns:
        1 if --check finds that it would not pay.

    Raises:
        ValueError: one line: a bad option, an unfit model, a folder that exists, a full disk.
    """
    if options.check and (options.target is None or options.prompts is None):
        raise ValueError("specdecpp: check= needs the target and some prompts; give --target and --prompts")
    if not (options.check and _is_made(options)):
        shrink(options)
    if not options.check:
        return 0
    from vllm_specdecpp.shrink.check import check

    return check(options)


def shrink(options: ShrinkOptions) -> dict[str, Any]:
    """Write ``options.out``; returns what its provenance file says."""
    import torch
    from tqdm import tqdm

    from vllm_specdecpp.provenance import command_line, model_label, model_revision, now, versions
    from vllm_specdecpp.shrink import schemes
    from vllm_specdecpp.shrink.checkpoint import copy_the_rest, new_folder, open_checkpoint, write_tensors

    out = options.out.expanduser()
    if out.exists():
        raise ValueError(f"specdecpp: out={str(out)!r} exists; name another folder, nothing is overwritten")
    source = open_checkpoint(options.draft)
    name = options.scheme or schemes.default_scheme()
    if reason := schemes.missing_kernel(name):
        _say(f"warning: scheme {name}: {reason}; the folder may serve elsewhere")
    output = source.output_layer if schemes.has_output(source.config) else ""
    tied = output if output and source.is_tied else ""
    layers = {n: shape for n, shape in source.shapes.items() if schemes.is_linear(n, shape) and n != output}
    linear = dict.fromkeys(layers, name) | ({output: schemes.output_scheme(name)} if output else {})  # tensor → scheme
    alike = linear.get(output) == name
    made = {name: schemes.scheme_for(name, layers, [schemes.LAYERS, *[schemes.OUTPUT_LAYER] * alike])}
    if output and not alike:
        made[linear[output]] = schemes.scheme_for(
            linear[output], {output: source.shapes[output]}, [schemes.OUTPUT_LAYER]
        )
    sizes: dict[str, int] = {}  # that a pass reads, by the name that the tensor had

    def converted() -> Iterator[tuple[str, torch.Tensor]]:
        with tqdm(total=sum(source.sizes.values()), unit="B", unit_scale=True, file=sys.stderr, desc=name) as bar:
            for tensor_name, tensor in source.tensors():
                bar.update(source.sizes[tensor_name])
                if tied and tensor_name == f"{schemes.OUTPUT}.weight":  # a copy that nobody reads
                    continue
                sizes[tensor_name] = tensor.nbytes
                if tensor_name in linear:
                    kind = linear[tensor_name]
                    parts = schemes.quantised(kind, tensor, made[kind])
                    sizes[tensor_name] = sum(part.nbytes for part in parts.values())
                    module = schemes.OUTPUT if tensor_name == output else tensor_name.removesuffix(".weight")
                    yield from ((f"{module}.{part}", value) for part, value in parts.items())
                if tensor_name not in linear or tensor_name == tied:
                    yield tensor_name, tensor

    expected = _expected_bytes(source.sizes, linear) + source.sizes.get(tied, 0)
    with new_folder(out, expected) as folder:
        copy_the_rest(source.folder, folder)
        write_tensors(folder, converted())
        # Matrices that stay as they are: vLLM must not look for their scales.
        stay = {n for n, dims in source.shapes.items() if len(dims) == 2 and (n not in linear or n == tied)}
        modules = {n.removesuffix(".weight") for n in stay} | {schemes.OUTPUT}
        modules -= {schemes.OUTPUT} if output else set()
        config = source.config | {"quantization_config": schemes.config_entry(made, modules)}
        config |= {"tie_word_embeddings": False} if output else {}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        before, after = source.bytes_a_pass(source.sizes), source.bytes_a_pass(sizes)
        found = {
            "source": model_label(options.draft),
            "source_revision": model_revision(options.draft),
            "scheme": name,
            "bytes_a_pass": {"before": before, "after": after},
            "versions": versions(),
            "command": command_line(),
            "created": now(),
        }
        (folder / SHRUNK_FILE).write_text(json.dumps(found, indent=2) + "\n")
    saved = f"{after / 1e6:.0f} MB of weights instead of {before / 1e6:.0f} ({after / before:.0%})"
    print(f"{out}: {name}, a pass reads {saved}")
    return found


def _expected_bytes(sizes: dict[str, int], schemes: dict[str, str]) -> int:
    """Of the new folder, scales included, at most."""
    shares = {"int4": 0.3, "int8": 0.6, "fp8": 0.6}
    return round(sum(size * shares.get(schemes.get(name, ""), 1.0) for name, size in sizes.items())) + (64 << 20)


def _is_made(options: ShrinkOptions) -> bool:
    """Whether the folder is there, made of this draft with these options: it is then only checked.

    Raises:
        ValueError: one line: it is there, and another.
    """
    from vllm_specdecpp.provenance import model_revision, shrinking

    found = shrinking(options.out)
    if not found:
        return False
    if found["source_revision"] != model_revision(options.draft) or options.scheme not in (None, found["scheme"]):
        raise ValueError(f"specdecpp: out={str(options.out)!r} holds another shrunk draft; name another folder")
    return True


def _say(text: str) -> None:
    print(f"specdecpp: {text}", file=sys.stderr)
