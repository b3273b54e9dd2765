# SPDX-License-Identifier: Apache-2.0
"""Files of an acceptance head: where they are, and what they hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator
from safetensors.torch import load_file
from torch import Tensor

from vllm_specdecpp.decision.features import check_features
from vllm_specdecpp.files import parse_json, read_json, write_whole

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")
_STANDARDISATION = ("mean", "scale")


class Calibration(BaseModel):
    """P(accepted) = sigmoid(slope * logit + intercept of the candidate's position)."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    slope: float
    intercepts: list[float] = Field(min_length=1)
    """Of position 1, 2, ...; the last one is that of all positions beyond."""
    fitted_on: str | None = None
    """The rows, in words."""

    def probability(self, logit: Tensor, position: int | Tensor) -> Tensor:
        """Calibrated probability.

        Args:
            logit: [num_rows] the score on the log-odds scale.
            position: 1-based index of the candidate in its round: of all rows, or [num_rows] of each.

        Returns:
            [num_rows] in the dtype of ``logit``.
        """
        intercept: float | Tensor
        if isinstance(position, Tensor):
            table = logit.new_tensor(self.intercepts)  # [num_positions]
            intercept = table[(position.long() - 1).clamp(0, len(table) - 1)]  # [num_rows]
        else:  # no tensor: a CUDA graph that is captured may copy nothing from the host
            intercept = self.intercepts[min(position, len(self.intercepts)) - 1]
        return (self.slope * logit + intercept).sigmoid()

    def shown(self) -> str:
        """Slope and intercepts in words."""
        texts = [f"{each + 0.0:.3f}".replace("-0.000", "0.000") for each in self.intercepts]
        if len(set(texts)) == 1:
            return f"slope {self.slope:.3f}, intercept {texts[0]} at every position"
        return f"slope {self.slope:.3f}, intercepts by position {', '.join(texts)}"


class HeadConfig(BaseModel):
    """A checked ``config.json``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    hidden_size: int = Field(gt=0)
    num_layers: int = Field(ge=0)
    tied: bool | None = None
    """False if our own file says that the blocks are untied; else one stored block may stand for all."""
    width: int | None = Field(default=None, gt=0)
    features: list[str] = []
    lag: Literal[0, 1] = 1
    standardize: bool = False
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _readable(self) -> HeadConfig:
        check_features(self.features, self.lag)
        return self


_ADAPTER = TypeAdapter(HeadConfig)
_MEND = "fetch or train the head again"


def find(source: str | os.PathLike[str], revision: str | None) -> Path:
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


def read_config(folder: Path) -> HeadConfig:
    """The checked config.

    Raises:
        ValueError: one line: it cannot be read, or a field is missing or not what it must be.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"specdecpp: head={str(folder)!r} has no {CONFIG_FILE}; give the folder that train wrote (of fit: OUT/head)"
        )
    return read_json(folder / CONFIG_FILE, _ADAPTER, _MEND)


def update_config(folder: Path, **changes: Any) -> None:
    """Rewrite some keys of a saved head's ``config.json`` in one move.

    Raises:
        ValueError: one line: no head there, or the changed config would not load.
    """
    read_config(folder)
    path = folder / CONFIG_FILE
    write_config(folder, json.loads(path.read_text(encoding="utf-8")) | changes)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json``, if it can be read again; else ValueError."""
    text = (json.dumps(config, indent=2) + "\n").encode()
    parse_json(text, _ADAPTER, folder / CONFIG_FILE, _MEND)
    write_whole(folder / CONFIG_FILE, text)


def read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
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


def named(tensors: dict[str, Tensor], config: HeadConfig, path: Path) -> tuple[dict[str, Tensor], bool]:
    """Any known key layout as ours (``blocks.*``, ``output.*``, ...), and whether the blocks are tied."""
    num_layers = config.num_layers
    extra = ["project.weight", "project.bias"] if config.width is not None else []
    extra += _STANDARDISATION if config.standardize else ()
    blocks: dict[int, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        block = re.fullmatch(r"(?:model|blocks)\.(\d+)\.linear\.(weight|bias)", key)
        output = re.fullmatch(rf"(?:model\.{num_layers}|output)\.(weight|bias)", key)
        if block and int(block[1]) < num_layers:
            blocks.setdefault(int(block[1]), {})[block[2]] = tensor
        elif output:
            found[f"output.{output[1]}"] = tensor
        elif key in extra:
            found[key] = tensor
        else:
            raise ValueError(
                f"specdecpp: head file {path} has the unknown key {key!r} for num_layers {num_layers}; "
                f"check num_layers in {CONFIG_FILE}, or give an acceptance head's folder"
            )
    missing = [f"model.{num_layers}.{name}" for name in ("weight", "bias") if f"output.{name}" not in found]
    missing += [key for key in extra if key not in found]
    # One stored block stands for all: a writer that knows shared tensors drops the repeats.
    expected = blocks if len(blocks) == 1 and config.tied is not False else range(num_layers)
    for i in expected:
        missing += [f"model.{i}.linear.{name}" for name in ("weight", "bias") if name not in blocks.get(i, {})]
    if missing:
        raise ValueError(f"specdecpp: head file {path} lacks {', '.join(missing)}; fetch or train the head again")
    stored = [blocks[i] for i in sorted(blocks)]
    tied = all(torch.equal(block[name], stored[0][name]) for block in stored for name in ("weight", "bias"))
    for i, parameters in enumerate(stored[:1] if tied else stored):
        found |= {f"blocks.{i}.linear.{name}": tensor for name, tensor in parameters.items()}
    return found, tied


def same_model(label: str, other: str) -> bool:
    """Whether two models' labels, ids or folders end in the same name, whatever the case."""
    return _short_name(label) == _short_name(other)


def _short_name(label: str) -> str:
    parts = [part for part in label.replace("\\", "/").split("/") if part]
    # In the hub's cache the name is a part of its own: models--ORG--NAME/snapshots/COMMIT.
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or parts or [""])[-1].lower()
