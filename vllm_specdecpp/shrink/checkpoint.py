# SPDX-License-Identifier: Apache-2.0
"""A model's folder read tensor by tensor, and another one written file by file: never more than a file in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vllm_specdecpp.files import write_whole
from vllm_specdecpp.training.collect.stop_signal import sigterm_interrupts

FILE_BYTES = 1 << 30
"""A file of the new folder is closed once it holds so much."""
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "BOOL": 1}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".h5", ".msgpack", ".onnx")
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "*.safetensors"]
_EMBEDDING = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_OUTPUT = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model folder with weights in safetensors."""

    folder: Path
    config: dict[str, Any]
    """Of ``config.json``."""

    files: dict[str, Path]
    """Tensor → the file that holds it, file after file."""

    shapes: dict[str, tuple[int, ...]]
    sizes: dict[str, int]
    """Tensor → bytes."""

    @property
    def output_layer(self) -> str:
        """The matrix that gives the logits, [num_rows, hidden_size]; where it is tied, the embedding.

        Raises:
            ValueError: one line: none is found.
        """
        text = self.config.get("text_config") or self.config
        names = _EMBEDDING if text.get("tie_word_embeddings", False) else (*_OUTPUT, *_EMBEDDING)
        for ending in names:
            for name in self.shapes:
                if name.endswith(ending):
                    return name
        raise ValueError(f"specdecpp: {self.folder} has no output layer that shrink knows ({', '.join(_OUTPUT)})")

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return self.output_layer.endswith(_EMBEDDING)

    def bytes_a_pass(self, sizes: dict[str, int]) -> int:
        """Bytes of weights that one draft pass reads: all but the embedding, of which it reads a row.

        Args:
            sizes: tensor → bytes, of this model or of a quantised copy.
        """
        layers = sum(size for name, size in sizes.items() if not name.endswith(_EMBEDDING + _OUTPUT))
        return layers + sizes[self.output_layer]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, one at a time."""
        for path in dict.fromkeys(self.files.values()):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  no dict
                    yield name, file.get_tensor(name)


def open_checkpoint(model: str) -> Checkpoint:
    """The checkpoint of a folder or a hub id (downloaded if it is not there).

    Raises:
        ValueError: one line: not found, without safetensors, or quantised already.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _from_hub(model)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"specdecpp: {model} is no model: its config.json cannot be read ({error})") from None
    if "quantization_config" in config or "quantization_config" in (config.get("text_config") or {}):
        raise ValueError(f"specdecpp: {model} is quantised already; give the model that it was made of")
    paths = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # beside them other files may lie, as the original's "consolidated.safetensors"
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"specdecpp: {index} names {outside[0]!r}, which is not in its folder; fetch it again")
        paths = [folder / name for name in names]
    files, shapes, sizes = {}, {}, {}
    try:
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  no dict
                    part = file.get_slice(name)
                    files[name], shapes[name] = path, tuple(part.get_shape())
                    sizes[name] = prod(shapes[name]) * _BYTES.get(part.get_dtype(), 2)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"specdecpp: {path} cannot be read ({error}); fetch it again") from None
    if not files:
        raise ValueError(f"specdecpp: {model} holds no *.safetensors; convert its weights first")
    return Checkpoint(folder, config, files, shapes, sizes)


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except Exception as error:  # of the name, the network or the hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"specdecpp: {model!r} is no folder, and the hub does not give it ({reason})") from None


@contextmanager
def new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` if all goes well; whatever else happens, it is removed.

    SIGTERM counts as Ctrl-C in here.

    Args:
        num_bytes: that it will hold.

    Raises:
        ValueError: one line: the disk is full, or ``out`` has come into being meanwhile, or it cannot be written.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < num_bytes:
            needed = f"needs {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise ValueError(f"specdecpp: out={str(out)!r} {needed}; free space, or name another folder")
        with sigterm_interrupts():
            part.mkdir()
            yield part
            part.rename(out)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"specdecpp: out={str(out)!r} cannot be written ({reason}); nothing was left there") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_tensors(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], file_bytes: int = FILE_BYTES) -> None:
    """Write ``model.safetensors``, or several files, and their index: without one vLLM would load every file there."""
    names: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = 0

    def write() -> None:
        if held:
            names.append(list(held))
            write_whole(folder / f"{len(names)}.part.safetensors", save(held, {"format": "pt"}))
            held.clear()

    for name, tensor in tensors:
        held[name] = tensor
        total += tensor.nbytes
        if sum(t.nbytes for t in held.values()) >= file_bytes:
            write()
    write()
    weight_map: dict[str, str] = {}
    for number, inside in enumerate(names, 1):
        name = "model.safetensors" if len(names) == 1 else f"model-{number:05d}-of-{len(names):05d}.safetensors"
        (folder / f"{number}.part.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(inside, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_the_rest(source: Path, folder: Path) -> None:
    """Everything of a model's folder but its weights: configuration, tokenizer, templates, licence."""
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
