# SPDX-License-Identifier: Apache-2.0
"""Make a draft model cheaper: quantise its weights, trim its output layer to the tokens that the target emits.

Example: vllm-specdecpp shrink Qwen/Qwen2.5-0.5B-Instruct --out draft-int8
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_specdecpp.provenance import SHRUNK_FILE
from vllm_specdecpp.shrink.options import ShrinkOptions


def run(options: ShrinkOptions) -> int:
    """Carry out the command.

    Returns:
        1 if --check finds that it would not pay.

    Raises:
        ValueError: one line: a bad option, an unfit model or counts, a folder that exists, a full disk.
    """
    if options.check and (options.target is None or options.prompts is None):
        raise ValueError("specdecpp: check= needs the target and some prompts; give --target and --prompts")
    if not (options.check and _is_made(options)):
        if (options.vocab is None) != (not options.counts):
            raise ValueError("specdecpp: vocab= and counts= belong together: how many tokens, and the text to count in")
        shrink(options)
    if not options.check:
        return 0
    from vllm_specdecpp.shrink.check import check

    return check(options)


def shrink(options: ShrinkOptions) -> dict[str, Any]:
    """Write ``options.out``; returns what its provenance file says."""
    import torch
    from safetensors.torch import save
    from tqdm import tqdm

    from vllm_specdecpp.engine.shared import draft_vocab
    from vllm_specdecpp.files import write_whole
    from vllm_specdecpp.provenance import command_line, model_label, model_revision, now, versions
    from vllm_specdecpp.shrink import schemes
    from vllm_specdecpp.shrink.checkpoint import copy_the_rest, new_folder, open_checkpoint, write_tensors

    out = options.out.expanduser()
    if out.exists():
        raise ValueError(f"specdecpp: out={str(out)!r} exists; name another folder, nothing is overwritten")
    source = open_checkpoint(options.draft)
    name = options.scheme or schemes.default_scheme()
    if name != "none" and (reason := schemes.missing_kernel(name)):
        _say(f"warning: scheme {name}: {reason}; the folder may serve elsewhere")
    linear = {n: shape for n, shape in source.shapes.items() if schemes.is_linear(n, shape)} if name != "none" else {}
    scheme = schemes.scheme_for(name, linear) if name != "none" else None
    num_rows = source.shapes[source.output_layer][0]
    kept = None if options.vocab is None else _kept(options, source.folder, num_rows)
    sizes: dict[str, int] = {}  # of the tensors that are written, by the name that they had

    def converted() -> Iterator[tuple[str, torch.Tensor]]:
        with tqdm(total=sum(source.sizes.values()), unit="B", unit_scale=True, file=sys.stderr, desc=name) as bar:
            for tensor_name, tensor in source.tensors():
                if tensor_name in linear:
                    parts = schemes.quantised(name, tensor, scheme)
                    sizes[tensor_name] = sum(part.nbytes for part in parts.values())
                    module = tensor_name.removesuffix("weight")
                    yield from ((module + part, value) for part, value in parts.items())
                else:
                    sizes[tensor_name] = tensor.nbytes
                    yield tensor_name, tensor
                bar.update(source.sizes[tensor_name])

    with new_folder(out, _expected_bytes(source.sizes, linear, name)) as folder:
        copy_the_rest(source.folder, folder)
        write_tensors(folder, converted())
        if scheme is not None:
            # Matrices that stay as they are: vLLM must not look for their scales.
            stay = [
                n.removesuffix(".weight") for n, dims in source.shapes.items() if len(dims) == 2 and n not in linear
            ]
            config = source.config | {"quantization_config": schemes.config_entry(name, scheme, stay)}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if kept is not None:
            ids = {draft_vocab.TENSOR: torch.tensor(kept.ids)}  # [num_kept] int64
            write_whole(folder / draft_vocab.FILE, save(ids))
        share = 1.0 if kept is None else len(kept.ids) / num_rows
        before, after = source.bytes_a_pass(source.sizes), source.bytes_a_pass(sizes, share)
        found = {
            "source": model_label(options.draft),
            "source_revision": model_revision(options.draft),
            "scheme": name,
            "vocab": None if kept is None else {"kept": len(kept.ids), "of": num_rows, "coverage": kept.coverage},
            "bytes_a_pass": {"before": before, "after": after},
            "versions": versions(),
            "command": command_line(),
            "created": now(),
        }
        (folder / SHRUNK_FILE).write_text(json.dumps(found, indent=2) + "\n")
    saved = f"{after / 1e6:.0f} MB of weights instead of {before / 1e6:.0f} ({after / before:.0%})"
    print(f"{out}: {name}, a pass reads {saved}")
    if kept is not None:
        print(f"{len(kept.ids)} of {num_rows} tokens kept; they hold {kept.coverage}")
    return found


def _kept(options: ShrinkOptions, folder: Path, num_rows: int) -> Any:
    from transformers import AutoTokenizer

    from vllm_specdecpp.shrink import vocabulary

    assert options.vocab is not None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # whatever a tokenizer's own code raises
        raise ValueError(f"specdecpp: {options.draft} has no tokenizer to count with ({str(error)[:99]})") from None
    texts = (text for source in options.counts for text in vocabulary.read_texts(source, tokenizer, num_rows))
    return vocabulary.choose(texts, vocabulary.always_kept(folder, tokenizer, num_rows), options.vocab, num_rows)


def _expected_bytes(sizes: dict[str, int], linear: Any, scheme: str) -> int:
    """Of the new folder, scales included, at most."""
    share = {"none": 1.0, "int4": 0.3}.get(scheme, 0.6)
    return round(sum(share * size if name in linear else size for name, size in sizes.items())) + (64 << 20)


def _is_made(options: ShrinkOptions) -> bool:
    """Whether the folder is there, made of this draft with these options: it is then only checked.

    Raises:
        ValueError: one line: it is there, and another.
    """
    from vllm_specdecpp.provenance import model_revision, shrinking

    found = shrinking(options.out)
    if not found:
        return False
    same = found["source_revision"] == model_revision(options.draft) and options.scheme in (None, found["scheme"])
    if not same or options.vocab not in (None, (found["vocab"] or {}).get("kept")):
        raise ValueError(f"specdecpp: out={str(options.out)!r} holds another shrunk draft; name another folder")
    return True


def _say(text: str) -> None:
    print(f"specdecpp: {text}", file=sys.stderr)
