# SPDX-License-Identifier: Apache-2.0
"""The acceptance head: the module, its files, and the released checkpoints' formats.

Architecture (SpecDec++, arXiv:2405.19715): residual blocks x + SiLU(Wx + b), then a linear layer to two classes, of
which class 1 means "accepted". The released checkpoints share one W and b between all blocks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")


class ResidualBlock(nn.Module):
    """x + SiLU(Wx + b)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class AcceptanceHead(nn.Module):
    """Maps the draft's last hidden state to P(the token just read is accepted).

    Args:
        hidden_size: of the draft model.
        num_layers: residual blocks.
        tied: whether the blocks share their parameters, as in the released checkpoints.
    """

    def __init__(self, hidden_size: int, num_layers: int = 3, tied: bool = True) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.tied = tied
        num_blocks = min(num_layers, 1) if tied else num_layers
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(num_blocks))
        self.output = nn.Linear(hidden_size, 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits of (rejected, accepted), in the weights' dtype.

        Args:
            hidden_states: [num_reqs, hidden_size], after the draft's final norm.

        Returns:
            [num_reqs, 2].
        """
        x = hidden_states.to(self.output.weight.dtype)  # [num_reqs, hidden_size]
        for i in range(self.num_layers):
            x = self.blocks[0 if self.tied else i](x)
        return self.output(x)

    def probability(self, hidden_states: Tensor) -> Tensor:
        """P(accepted): [num_reqs] float32."""
        return self(hidden_states).float().softmax(dim=-1)[..., 1]

    @property
    def num_parameters(self) -> int:
        """Parameters stored, a shared one counted once."""
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` with the released checkpoints' key names.

        Raises:
            ValueError: the folder is a file, or holds a head and ``overwrite`` is False.
        """
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise ValueError(f"specdecpp: cannot save a head to {path}: it is a file; name a folder")
        present = [name for name in (CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE) if (path / name).exists()]
        if present and not overwrite:
            raise ValueError(f"specdecpp: {path} holds {', '.join(present)} already; pass overwrite=True")
        tensors = {
            key.replace("blocks.", "model.").replace("output.", f"model.{self.num_layers}."): p
            for key, p in self.state_dict().items()
        }
        config = {"hidden_size": self.hidden_size, "num_layers": self.num_layers, "tied": self.tied}
        path.mkdir(parents=True, exist_ok=True)
        tensors = {key: p.detach().contiguous().cpu() for key, p in tensors.items()}
        _replace(path / SAFETENSORS_FILE, lambda to: save_file(tensors, to, metadata={"format": "pt"}))
        _replace(path / CONFIG_FILE, lambda to: to.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        revision: str | None = None,
        *,
        expected_hidden_size: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> AcceptanceHead:
        """Load a head of ours or one in the paper's released formats.

        Reads ``model.safetensors``, else ``pytorch_model.bin`` (tensors only, never code). The blocks come out tied if
        the file stores one of them, or equal ones.

        Args:
            source: a folder, or a hub id ``org/name``, which may go on into a folder: ``org/name/folder``.
            revision: branch, tag or commit on the hub.
            expected_hidden_size: the draft model's; None skips the check.
            device: where the head goes.
            dtype: of its weights.

        Raises:
            ValueError: one line: nothing there, unreadable or foreign files, or another hidden size.
        """
        folder = _find(source, revision)
        hidden_size, num_layers, may_share = _read_config(folder)
        if expected_hidden_size is not None and hidden_size != expected_hidden_size:
            raise ValueError(
                f"specdecpp: head={str(source)!r} is for hidden size {hidden_size}, but the draft model has "
                f"{expected_hidden_size}; use the head that was trained for this draft"
            )
        path, tensors = _read_tensors(folder)
        tensors, tied = _named(tensors, num_layers, may_share, path)
        head = cls(hidden_size, num_layers, tied=tied)
        for key, parameter in head.state_dict().items():
            found = tensors[key]
            if found.shape != parameter.shape:
                raise ValueError(
                    f"specdecpp: head file {path}: {key} has shape {list(found.shape)}, but {CONFIG_FILE} "
                    f"(hidden_size {hidden_size}) wants {list(parameter.shape)}; the two files do not belong together"
                )
            if not found.is_floating_point() or not bool(found.isfinite().all()):
                raise ValueError(
                    f"specdecpp: head file {path}: {key} holds values that are no finite numbers; "
                    "fetch or train the head again"
                )
        head.load_state_dict(tensors)
        return head.to(device=device, dtype=dtype).eval()


def _find(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The local folder of ``source``, fetched from the hub when it is no folder here."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"specdecpp: head_revision={revision!r} is for a hub id, but head={name!r} is a folder; leave it out"
            )
        return path
    if path.exists():
        raise ValueError(f"specdecpp: head={name!r} is a file; give the folder with {CONFIG_FILE} and the weights")
    if name.startswith((".", "~", "/")) or not _HUB_ID.fullmatch(name):
        raise ValueError(f"specdecpp: head={name!r} does not exist; give a folder or a hub id (org/name)")
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    org, repository, *inside = name.split("/")
    prefix = "".join(f"{part}/" for part in inside)
    wanted = [prefix + file for file in (CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE)]
    try:
        folder = Path(snapshot_download(f"{org}/{repository}", revision=revision, allow_patterns=wanted)) / prefix
    except Exception as error:  # the hub client raises its own, requests' and OS errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"specdecpp: head={name!r} is no folder here, and the hub did not give it ({reason}); "
            "check the name, or fetch it and give the folder"
        ) from None
    if not folder.is_dir():
        raise ValueError(f"specdecpp: head={name!r}: the hub repository has no folder {prefix!r}; check the name")
    return folder


def _read_config(folder: Path) -> tuple[int, int, bool]:
    """hidden_size, num_layers, and whether blocks may share parameters (our own files say so)."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f'specdecpp: head={str(folder)!r} has no readable {CONFIG_FILE} ({error.strerror}); write '
            '{"hidden_size": ..., "num_layers": ...} beside the weights'
        ) from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"specdecpp: head file {path} is not valid JSON ({error}); fetch the head again") from None
    sizes: list[Any] = [config.get(key) for key in ("hidden_size", "num_layers")] if isinstance(config, dict) else []
    if not (len(sizes) == 2 and all(type(size) is int for size in sizes) and sizes[0] > 0 and sizes[1] >= 0):
        raise ValueError(
            f'specdecpp: head file {path} must hold {{"hidden_size": N, "num_layers": L}} with whole numbers N > 0, '
            "L >= 0; write them as the head was trained"
        )
    return sizes[0], sizes[1], config.get("tied") is not False


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weights file and what is in it."""
    for name, read in ((SAFETENSORS_FILE, load_file), (PICKLE_FILE, _unpickle)):
        path = folder / name
        if not path.exists():
            continue
        try:
            tensors = read(path)
        except Exception as error:  # a damaged file can raise nearly anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"specdecpp: head file {path} is corrupt or holds more than tensors ({reason}); fetch the head again"
            ) from None
        return path, tensors
    raise ValueError(
        f"specdecpp: head={str(folder)!r} has no {SAFETENSORS_FILE} or {PICKLE_FILE}; give the folder of a trained head"
    )


def _unpickle(path: Path) -> dict[str, Tensor]:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError("not a dict of tensors")
    return tensors


def _named(tensors: dict[str, Tensor], num_layers: int, may_share: bool, path: Path) -> tuple[dict[str, Tensor], bool]:
    """Any known key layout as ours (``blocks.*``, ``output.*``), and whether the blocks are tied."""
    blocks: dict[int, dict[str, Tensor]] = {}
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        block = re.fullmatch(r"(?:model|blocks)\.(\d+)\.linear\.(weight|bias)", key)
        output = re.fullmatch(rf"(?:model\.{num_layers}|output)\.(weight|bias)", key)
        if block and int(block[1]) < num_layers:
            blocks.setdefault(int(block[1]), {})[block[2]] = tensor
        elif output:
            named[f"output.{output[1]}"] = tensor
        else:
            raise ValueError(
                f"specdecpp: head file {path} has the unknown key {key!r} for num_layers {num_layers}; "
                f"check num_layers in {CONFIG_FILE}, or give an acceptance head's folder"
            )
    missing = [f"model.{num_layers}.{name}" for name in ("weight", "bias") if f"output.{name}" not in named]
    # One stored block stands for all: a writer that knows shared tensors drops the repeats.
    expected = blocks if len(blocks) == 1 and may_share else range(num_layers)
    for i in expected:
        missing += [f"model.{i}.linear.{name}" for name in ("weight", "bias") if name not in blocks.get(i, {})]
    if missing:
        raise ValueError(f"specdecpp: head file {path} lacks {', '.join(missing)}; fetch or train the head again")
    stored = [blocks[i] for i in sorted(blocks)]
    tied = all(torch.equal(block[name], stored[0][name]) for block in stored for name in ("weight", "bias"))
    for i, parameters in enumerate(stored[:1] if tied else stored):
        named |= {f"blocks.{i}.linear.{name}": tensor for name, tensor in parameters.items()}
    return named, tied


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path`` and move it there, so that a reader never meets half a file."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
