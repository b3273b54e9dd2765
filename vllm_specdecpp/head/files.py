# SPDX-License-Identifier: Apache-2.0
"""Files of an acceptance head: where they are, what they hold, and how they are replaced."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_specdecpp.decision.features import check_features

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")
_STANDARDISATION = ("mean", "scale")


@dataclass(frozen=True)
class HeadConfig:
    """A checked ``config.json``."""

    hidden_size: int
    num_layers: int
    may_share: bool
    """Whether one stored block may stand for all; False if our own file says that the blocks are untied."""
    width: int | None
    features: tuple[str, ...]
    lag: int
    standardize: bool
    calibration: dict[str, Any] | None
    metadata: dict[str, Any]
    """Every other key."""


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


def read_json(folder: Path) -> Any:
    """What ``config.json`` holds, unchecked."""
    path = folder / CONFIG_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"specdecpp: head={str(folder)!r} has no readable {CONFIG_FILE} ({error.strerror}); write "
            '{"hidden_size": ..., "num_layers": ...} beside the weights'
        ) from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"specdecpp: head file {path} is not valid JSON ({error}); fetch the head again") from None


def read_config(folder: Path) -> HeadConfig:
    """The checked config.

    Raises:
        ValueError: one line: it cannot be read, or a field is missing or not what it must be.
    """
    return parse_config(read_json(folder), folder / CONFIG_FILE)


def parse_config(config: Any, path: Path) -> HeadConfig:
    """``config`` as read from ``path``, checked."""
    sizes: list[Any] = [config.get(key) for key in ("hidden_size", "num_layers")] if isinstance(config, dict) else []
    if not (len(sizes) == 2 and all(type(size) is int for size in sizes) and sizes[0] > 0 and sizes[1] >= 0):
        raise ValueError(
            f'specdecpp: head file {path} must hold {{"hidden_size": N, "num_layers": L}} with whole numbers N > 0, '
            "L >= 0; write them as the head was trained"
        )
    rest = {key: value for key, value in config.items() if key not in ("hidden_size", "num_layers", "tied")}
    width, features, lag = rest.pop("width", None), rest.pop("features", []), rest.pop("lag", 1)
    standardize, calibration = rest.pop("standardize", False), rest.pop("calibration", None)

    def refuse(key: str, value: object, must: str) -> ValueError:
        return ValueError(f"specdecpp: head file {path}: {key}={value!r} must be {must}; fetch or train the head again")

    if width is not None and not (type(width) is int and width > 0):
        raise refuse("width", width, "a whole number > 0, or null")
    if type(lag) is not int or lag not in (0, 1):
        raise refuse("lag", lag, "0 or 1")
    if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
        raise refuse("features", features, "a list of names")
    if type(standardize) is not bool:
        raise refuse("standardize", standardize, "true or false")
    try:
        check_features(features, lag)
        if calibration is not None:
            check_calibration(calibration)
    except ValueError as error:
        raise ValueError(f"specdecpp: head file {path}: {str(error).removeprefix('specdecpp: ')}") from None
    return HeadConfig(
        sizes[0], sizes[1], config.get("tied") is not False, width, tuple(features), lag, standardize, calibration, rest
    )


def check_calibration(calibration: Any) -> None:
    """Refuse a ``calibration`` that :meth:`AcceptanceHead.probability` could not apply.

    Raises:
        ValueError: one line.
    """
    slope = calibration.get("slope") if isinstance(calibration, Mapping) else None
    intercepts = calibration.get("intercepts") if isinstance(calibration, Mapping) else None
    if not (_is_finite(slope) and isinstance(intercepts, list) and intercepts and all(map(_is_finite, intercepts))):
        raise ValueError(
            f'specdecpp: calibration={calibration!r} must be {{"slope": a, "intercepts": [b1, ...]}} with finite '
            "numbers; calibrate the head again"
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def update_config(folder: str | os.PathLike[str], **changes: Any) -> None:
    """Rewrite some keys of a saved head's ``config.json`` in one move; a value of None removes the key.

    Raises:
        ValueError: one line: no head there, or the changed config would not load.
    """
    path = Path(folder)
    read_config(path)
    config = {**read_json(path), **changes}
    config = {key: value for key, value in config.items() if not (key in changes and value is None)}
    parse_config(config, path / CONFIG_FILE)
    write_config(path, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` into an existing folder."""
    text = json.dumps(config, indent=2) + "\n"
    replace(folder / CONFIG_FILE, lambda to: to.write_text(text, encoding="utf-8"))


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
    expected = blocks if len(blocks) == 1 and config.may_share else range(num_layers)
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


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path`` and move it there, so that a reader never meets half a file."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # safetensors writes for its owner alone, and a server may run as somebody else
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
