# SPDX-License-Identifier: Apache-2.0
"""The options of ``train``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from vllm_specdecpp.decision.features import SCALAR_FEATURES, check_features
from vllm_specdecpp.training.options import POSITIONAL, CommandOptions


class TrainOptions(CommandOptions):
    """Train an acceptance head on collected labels, with early stopping on held-out prompts.

    The defaults are those that did best with 20,000 labels: a small head, held back. The paper's head, loss and
    optimiser: --lag 1 --layers 3 --width 0 --features none --no-standardize --w-rej 6 --lr 5e-5 --batch-size 32
    --epochs 3 --dropout 0 --weight-decay 0
    """

    data: list[Path] = Field(min_length=1, json_schema_extra=POSITIONAL)
    """Dataset folders of ``collect``, all of the same pair."""

    out: Path
    """Folder for the head, its log and its provenance."""

    lag: Literal[0, 1] = 0
    """0: look ahead to the candidate that is about to be drawn. 1: score the one that the draft has just read (the
    paper's head); it may still be submitted."""

    layers: int = Field(default=1, ge=0)
    """Residual blocks; 0 is a linear probe."""

    width: int | None = Field(default=16, ge=0)
    """Project the hidden state to this size first; 0: it keeps its own, as in the paper."""

    tied: bool = True
    """Whether the blocks share their parameters, as in the paper's released heads."""

    features: list[Literal["top1_prob", "entropy", "margin", "none"]] | None = None
    """Scalars that the head reads too, by default all of them; ``none``: the hidden state alone, as with lag 1."""

    standardize: bool = True
    """Whether each dimension of the hidden state is brought to mean 0 and deviation 1 (of the training rows) first."""

    w_rej: float = Field(default=1.0, gt=0)
    """Weight of the reject class in the loss; the paper's pick is 6. ``calibrate`` undoes it."""

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate (AdamW); it rises over the first steps, then falls as a cosine does."""

    weight_decay: float = Field(default=1.0, ge=0)
    """Of the matrices, not of the biases."""

    dropout: float = Field(default=0.5, ge=0, lt=1)
    """Of the hidden state and of each block's update, in training only."""

    epochs: int = Field(default=15, ge=1)
    """Passes over the data at most; training ends after five without a better validation log-loss, and keeps the best
    weights."""

    batch_size: int = Field(default=256, ge=1)
    """Rows a step."""

    validation: float = Field(default=0.2, ge=0, lt=1)
    """Share of the prompts that is held out for early stopping, and for ``calibrate`` and ``tune``, which may use no
    others of these; chosen by a hash of their ids; 0 for none."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the weights, the order of the rows, the dropout and the held-out prompts: same seed, same head."""

    force: bool = False
    """Replace the head that ``out`` holds."""

    @field_validator("width")
    @classmethod
    def _own_width(cls, width: int | None) -> int | None:
        return width or None

    @model_validator(mode="after")
    def _check_together(self) -> TrainOptions:
        if self.features and "none" in self.features and len(self.features) > 1:
            raise ValueError("specdecpp: features=none goes alone; leave out either it or the others")
        check_features(self.resolved_features, self.lag)
        return self

    @property
    def resolved_features(self) -> list[str]:
        """The scalars in force."""
        if self.features is None:
            return [] if self.lag else list(SCALAR_FEATURES)
        return [name for name in self.features if name != "none"]
