# SPDX-License-Identifier: Apache-2.0
"""The acceptance head: the module, and loading and saving it. Its files: :mod:`vllm_specdecpp.head.files`.

Architecture (SpecDec++, arXiv:2405.19715): residual blocks x + SiLU(Wx + b), then a linear layer to two classes, of
which class 1 means "accepted". The released checkpoints share one W and b between all blocks. Ours may also standardise
the hidden state, project it down, and read scalar features beside it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from vllm_specdecpp.decision.features import check_features, num_inputs
from vllm_specdecpp.files import write_whole
from vllm_specdecpp.head import files as head_files
from vllm_specdecpp.head.files import CONFIG_FILE, SAFETENSORS_FILE, Calibration
from vllm_specdecpp.provenance import model_label, shrinking


class ResidualBlock(nn.Module):
    """x + SiLU(Wx + b)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        return x + nn.functional.dropout(nn.functional.silu(self.linear(x)), dropout, self.training)


class AcceptanceHead(nn.Module):
    """Maps the draft's last hidden state to P(a candidate is accepted).

    With ``lag`` 1 (the paper's) the state is that of the pass that read the candidate. With ``lag`` 0 (look-ahead) it
    and the scalars are those of the pass that yields the candidate, before the draw.

    Args:
        hidden_size: of the draft model.
        num_layers: residual blocks.
        tied: whether the blocks share their parameters, as in the released checkpoints.
        width: project the hidden state to this size first.
        features: scalars that are read too, of ``SCALAR_FEATURES``, with ``lag`` 0 alone; their encodings join the
            (projected) hidden state.
        lag: which pass the hidden state is of.
        standardize: whether ``(hidden_state - mean) * scale`` comes first; ``mean`` and ``scale`` are buffers.

    Attributes:
        calibration: what makes its logits probabilities; None: the sigmoid alone.
        metadata: the config's other keys: ``draft``, ``target``, ``w_rej``, ``rule``.
        dropout: of the hidden state and of the blocks' updates, in training mode only.

    Raises:
        ValueError: one line: a feature that is unknown or given twice, or one beside a lag.
    """

    mean: Tensor  # [hidden_size]
    scale: Tensor  # [hidden_size], 1 / standard deviation

    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 3,
        tied: bool = True,
        *,
        width: int | None = None,
        features: Sequence[str] = (),
        lag: int = 1,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        check_features(features, lag)
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.tied = tied
        self.width = width
        self.features = tuple(features)
        self.lag = lag
        self.standardize = standardize
        self.metadata: dict[str, Any] = {}
        self.dropout = 0.0
        self.calibration: Calibration | None = None
        if standardize:
            self.register_buffer("mean", torch.zeros(hidden_size))
            self.register_buffer("scale", torch.ones(hidden_size))
        if width is not None:
            self.project = nn.Linear(hidden_size, width)
        size = (width or hidden_size) + num_inputs(self.features)
        num_blocks = min(num_layers, 1) if tied else num_layers
        self.blocks = nn.ModuleList(ResidualBlock(size) for _ in range(num_blocks))
        self.output = nn.Linear(size, 2)

    def forward(self, hidden_states: Tensor, scalars: Tensor | None = None) -> Tensor:
        """Logits of (rejected, accepted), in the weights' dtype.

        Args:
            hidden_states: [num_reqs, hidden_size], after the draft's final norm.
            scalars: [num_reqs, num_inputs] of ``encode_scalars`` for ``features``; None if the head reads none.

        Returns:
            [num_reqs, 2].

        Raises:
            ValueError: ``scalars`` are missing, or of another width than the head reads.
        """
        x = hidden_states.to(self.output.weight.dtype)  # [num_reqs, hidden_size]
        if self.standardize:
            x = (x - self.mean) * self.scale
        x = nn.functional.dropout(x, self.dropout, self.training)
        if self.width is not None:
            x = self.project(x)  # [num_reqs, width]
        wanted, given = num_inputs(self.features), 0 if scalars is None else scalars.shape[-1]
        if wanted != given:
            raise ValueError(
                f"specdecpp: the head reads features={list(self.features)} as {wanted} scalars a row, but got {given}; "
                "pass encode_scalars(columns, head.features)"
            )
        if scalars is not None and wanted:
            x = torch.cat([x, scalars.to(x.dtype)], dim=-1)  # [num_reqs, size]
        for i in range(self.num_layers):
            x = self.blocks[0 if self.tied else i](x, self.dropout)
        return self.output(x)

    def logit(self, hidden_states: Tensor, scalars: Tensor | None = None) -> Tensor:
        """Accept minus reject logit, uncalibrated: [num_reqs] float32."""
        rejected, accepted = self(hidden_states, scalars).float().unbind(-1)
        return accepted - rejected

    def probability(self, hidden_states: Tensor, scalars: Tensor | None = None, position: int = 1) -> Tensor:
        """P(accepted): sigmoid(logit), or what the calibration makes of it.

        Args:
            hidden_states: [num_reqs, hidden_size].
            scalars: as in :meth:`forward`.
            position: 1-based index in the round of the candidate that is scored.

        Returns:
            [num_reqs] float32.
        """
        return self.calibrated(self.logit(hidden_states, scalars), position)

    def calibrated(self, logit: Tensor, position: int) -> Tensor:
        """:meth:`probability` of uncalibrated logits [num_reqs]."""
        return logit.sigmoid() if self.calibration is None else self.calibration.probability(logit, position)

    @property
    def num_parameters(self) -> int:
        """Parameters stored, a shared one counted once."""
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` with the released checkpoints' key names; replaces them.

        Raises:
            ValueError: one line: the folder cannot be written to.
        """
        path = Path(folder)
        tensors = {
            key.replace("blocks.", "model.").replace("output.", f"model.{self.num_layers}."): p
            for key, p in self.state_dict().items()
        }
        tensors = {key: p.detach().contiguous().cpu() for key, p in tensors.items()}
        write_whole(path / SAFETENSORS_FILE, save(tensors, {"format": "pt"}))
        head_files.write_config(path, self.config())

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says: the released formats' keys, and of ours those that differ from their defaults."""
        config: dict[str, Any] = {"hidden_size": self.hidden_size, "num_layers": self.num_layers, "tied": self.tied}
        ours = {"width": self.width, "features": list(self.features), "standardize": self.standardize}
        config |= {key: value for key, value in ours.items() if value}
        config |= {} if self.lag == 1 else {"lag": self.lag}
        config |= {} if self.calibration is None else {"calibration": self.calibration.model_dump(exclude_none=True)}
        return config | {key: value for key, value in self.metadata.items() if key not in config}

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        revision: str | None = None,
        *,
        expected_hidden_size: int | None = None,
        expected_draft: str | None = None,
        device: str | torch.device = "cpu",
    ) -> AcceptanceHead:
        """Load a head of ours or one in the paper's released formats.

        Reads ``model.safetensors``, else ``pytorch_model.bin`` (tensors only, never code). The blocks come out tied if
        the file stores one of them, or equal ones. The config's other keys end up in ``metadata``.

        Args:
            source: a folder, or a hub id ``org/name``, which may go on into a folder: ``org/name/folder``.
            revision: branch, tag or commit on the hub.
            expected_hidden_size: the draft model's; None skips the check.
            expected_draft: the draft model's id or folder; checked by its last name if the config says ``draft``. A
                head of the model that a folder was shrunk from will do.
            device: where the head goes.

        Raises:
            ValueError: one line: nothing there, unreadable or foreign files, another hidden size or another draft.
        """
        folder = head_files.find(source, revision)
        config = head_files.read_config(folder)
        if expected_hidden_size is not None and config.hidden_size != expected_hidden_size:
            raise ValueError(
                f"specdecpp: head={str(source)!r} is for hidden size {config.hidden_size}, but the draft model has "
                f"{expected_hidden_size}; use the head that was trained for this draft"
            )
        draft = (config.model_extra or {}).get("draft")
        labels = [model_label(expected_draft), shrinking(expected_draft).get("source", "")] if expected_draft else []
        if labels and isinstance(draft, str) and draft and not any(head_files.same_model(draft, x) for x in labels):
            raise ValueError(
                f"specdecpp: head={str(source)!r} was trained for the draft {draft!r}, but the draft model is "
                f'{labels[0]!r}; use a head of this draft, or correct "draft" in its {CONFIG_FILE}'
            )
        path, tensors = head_files.read_tensors(folder)
        tensors, tied = head_files.named(tensors, config, path)
        head = cls(
            config.hidden_size, config.num_layers, tied,
            width=config.width, features=config.features, lag=config.lag, standardize=config.standardize,
        )  # fmt: skip
        head.metadata = dict(config.model_extra or {})
        head.calibration = config.calibration
        for key, parameter in head.state_dict().items():
            found = tensors[key]
            if found.shape != parameter.shape:
                raise ValueError(
                    f"specdecpp: head file {path}: {key} has shape {list(found.shape)}, but {CONFIG_FILE} "
                    f"(hidden_size {config.hidden_size}) wants {list(parameter.shape)}; the two files do not belong "
                    "together"
                )
            if not found.is_floating_point() or not bool(found.isfinite().all()):
                raise ValueError(
                    f"specdecpp: head file {path}: {key} holds values that are no finite numbers; "
                    "fetch or train the head again"
                )
        head.load_state_dict(tensors)
        return head.to(device).eval()
