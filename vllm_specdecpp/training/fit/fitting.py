# SPDX-License-Identifier: Apache-2.0
"""The training loop of an acceptance head: rows in, a fitted head and its history out. Knows no files."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from vllm_specdecpp.data.dataset import LabelRows
from vllm_specdecpp.decision.features import encode_scalars
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training import statistics as metrics
from vllm_specdecpp.training.fit.calibration import fit_regression
from vllm_specdecpp.training.fit.train_options import TrainOptions

WARMUP = 0.03
"""Share of the steps over which the learning rate rises; then it falls as a cosine does."""

PATIENCE = 5
"""Epochs without a better validation log-loss after which training ends."""

_CONSTANT = 1e-5
"""A dimension whose deviation is below this share of its mean (bfloat16 resolves 4e-3) carries nothing but rounding."""

_EVALUATION_ROWS = 4096
_COLUMNS_AT_ONCE = 256
"""Of the hidden state, in float64."""


def batches(rows: LabelRows, batch_size: int, seed: int, epoch: int) -> Iterator[LabelRows]:
    """The rows of one epoch, shuffled, in batches; the same for the same arguments."""
    generator = torch.Generator().manual_seed((seed << 16) + epoch)
    for index in torch.randperm(len(rows), generator=generator).split(batch_size):
        yield rows.select(index)


@torch.no_grad()
def standardize(head: AcceptanceHead, hidden: Tensor) -> None:
    """Let the head bring every dimension to mean 0 and deviation 1 first; a constant one to 0.

    Args:
        head: freshly made; changed in place.
        hidden: [num_rows, hidden_size] of the training rows.
    """
    columns = hidden.split(_COLUMNS_AT_ONCE, dim=1)
    parts = [torch.std_mean(part.double(), dim=0, correction=0) for part in columns]
    deviation, mean = (torch.cat(part) for part in zip(*parts, strict=True))  # [hidden_size] each
    constant = deviation <= _CONSTANT * mean.abs().clamp_min(1e-6)
    head.mean.copy_(mean)
    head.scale.copy_(torch.where(constant, 0.0, 1 / deviation))


def targets(rows: LabelRows) -> Tensor:
    """[n] float32: min(1, p/q) where it is known, else 1 for accepted and 0 for rejected."""
    return torch.where(rows.soft.isnan(), rows.accepted.float(), rows.soft.float())


@torch.no_grad()
def start_at_scalars(head: AcceptanceHead, rows: LabelRows, w_rej: float) -> None:
    """Let a head that reads scalars begin as their logistic regression, to which training adds the hidden state.

    The blocks start as the identity and the hidden state without a say; otherwise a few hundred steps would leave a
    head behind what the scalars alone can tell. A head without scalars stays as it is.

    Args:
        head: freshly made; changed in place.
        rows: training rows.
        w_rej: weight of the reject class.
    """
    if not head.features:
        return
    label = targets(rows).double()  # [num_rows]
    weight = label + w_rej * (1 - label)
    found = fit_regression(encode_scalars(rows.scalars, head.features), label / weight, weights=weight)
    for block in head.blocks:
        for parameter in block.parameters():
            parameter.zero_()
    half = torch.tensor([[-0.5], [0.5]])  # the two classes' logits differ by the log-odds
    head.output.weight.zero_()
    head.output.weight[:, -len(found.coefficients) :] = half * found.coefficients.float()
    head.output.bias.copy_(half.squeeze(1) * found.intercept)


def weighted_loss(logit: Tensor, target: Tensor, w_rej: float) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy with weight ``w_rej`` on the reject class, and the weighted count that normalises it.

    Its optimum is p / (p + w_rej * (1 - p)) for a true acceptance probability p (arXiv:2405.19715, section 3.2).

    Args:
        logit: [n] float32, accept minus reject.
        target: [n] float32 in [0, 1].
        w_rej: weight of the reject class.

    Returns:
        Sum of the losses, and sum of the weights.
    """
    accept = logsigmoid(logit) * target
    reject = logsigmoid(-logit) * (1 - target) * w_rej
    return -(accept + reject).sum(), (target + w_rej * (1 - target)).sum()


def score(head: AcceptanceHead, hidden: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """The head's uncalibrated logits: [n] float32, with gradients if they are on.

    Args:
        hidden: [n, hidden_size].
        columns: name of a scalar feature → [n]; more than the head reads may be there.
    """
    scalars = encode_scalars(columns, head.features) if head.features else None
    return head.logit(hidden, scalars)


@torch.no_grad()
def evaluate(head: AcceptanceHead, rows: LabelRows, w_rej: float) -> dict[str, float]:
    """Losses of a head in evaluation mode.

    Returns:
        ``loss``: the training loss. ``log_loss``: of the probability, with the shift that ``w_rej`` causes undone by
        adding ln(w_rej) to the accept logit, so that heads of different ``w_rej`` compare. ``auc``: of accepted
        against rejected; NaN if there is only one of them.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    logits = []
    for index in torch.arange(len(rows.hidden)).split(_EVALUATION_ROWS):
        chunk = rows.select(index)
        logit, target = score(head, chunk.hidden, chunk.scalars), targets(chunk)
        logits.append(logit)
        weighted = weighted_loss(logit, target, w_rej)
        plain = weighted_loss(logit + math.log(w_rej), target, 1.0)
        sums += torch.stack([*weighted, *plain]).double()
    ranked = metrics.auc(torch.cat(logits), rows.accepted)
    return {"loss": float(sums[0] / sums[1]), "log_loss": float(sums[2] / sums[3]), "auc": ranked}


def fit(
    head: AcceptanceHead,
    rows: LabelRows,
    val_rows: LabelRows | None,
    settings: TrainOptions,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
) -> list[dict[str, Any]]:
    """Train ``head`` in place, and leave it in evaluation mode with the weights of the best epoch.

    The best epoch is the one with the lowest validation log-loss, 0 standing for the start; without validation rows it
    is the last. Draws from torch's global generator (dropout), which the caller seeds.

    Args:
        head: on the CPU, float32.
        rows: to train on.
        val_rows: for early stopping; None trains all epochs.
        settings: of the optimiser.
        on_epoch: called with the history so far after every epoch.

    Returns:
        One row an epoch, and with validation rows one for the start (epoch 0, no training loss): losses, learning
        rate, seconds, and whether it is the best so far.

    Raises:
        ValueError: one line: the loss became infinite or NaN.
    """
    from transformers.optimization import get_cosine_schedule_with_warmup  # imports a lot

    decayed = [p for p in head.parameters() if p.dim() > 1]
    free = [p for p in head.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    num_steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * num_steps), num_steps)
    history: list[dict[str, Any]] = []
    row: dict[str, Any]
    best: tuple[float, int, dict[str, Tensor]] | None = None  # log-loss, epoch, weights
    start = time.perf_counter()
    if val_rows is not None:
        found = evaluate(head.eval(), val_rows, settings.w_rej)
        if not math.isfinite(found["log_loss"]):
            raise ValueError("specdecpp: the validation rows hold values that are no numbers; collect them again")
        best = (found["log_loss"], 0, copy.deepcopy(head.state_dict()))
        row = {"epoch": 0, "lr": 0.0, "rows": 0, "train_loss": math.nan}
        row |= {f"val_{key}": value for key, value in found.items()} | {"best": 1, "seconds": 0.0}
        history.append(row)
    with tqdm(total=num_steps, desc="train", unit="step", dynamic_ncols=True) as progress:
        for epoch in range(1, settings.epochs + 1):
            row = {"epoch": epoch, "lr": scheduler.get_last_lr()[0]}
            shuffled = batches(rows, settings.batch_size, settings.seed, epoch)
            row |= _train(head, shuffled, optimizer, scheduler, settings, progress)
            judged = row["train_loss"]
            if math.isfinite(judged) and val_rows is not None:
                found = evaluate(head, val_rows, settings.w_rej)
                row |= {f"val_{key}": value for key, value in found.items()}
                judged = found["log_loss"]
            if not math.isfinite(judged):
                raise ValueError(
                    f"specdecpp: the loss of epoch {epoch} is no finite number; lower lr={settings.lr}, or check the "
                    "data for values that are none"
                )
            if val_rows is None or best is None or judged < best[0]:
                best = (judged, epoch, copy.deepcopy(head.state_dict()))
            row |= {"best": int(best[1] == epoch), "seconds": round(time.perf_counter() - start, 2)}
            history.append(row)
            progress.set_postfix({key: f"{row[key]:.4f}" for key in ("train_loss", "val_log_loss") if key in row})
            on_epoch(history)
            if epoch - best[1] >= PATIENCE:
                break
    if best is not None:
        head.load_state_dict(best[2])
    return history


def _train(
    head: AcceptanceHead,
    shuffled: Iterable[LabelRows],
    optimizer: Any,
    scheduler: Any,
    settings: TrainOptions,
    progress: Any,
) -> dict[str, Any]:
    """One epoch; leaves the head in evaluation mode. Returns its number of rows and mean loss."""
    sums, num_rows = torch.zeros(2, dtype=torch.float64), 0
    head.train()
    head.dropout = settings.dropout
    for batch in shuffled:
        logit = score(head, batch.hidden, batch.scalars)
        loss, weight = weighted_loss(logit, targets(batch), settings.w_rej)
        optimizer.zero_grad(set_to_none=True)
        (loss / weight).backward()
        optimizer.step()
        scheduler.step()
        sums += torch.stack([loss.detach(), weight]).double()
        num_rows += len(batch.hidden)
        progress.update()
    head.eval()
    head.dropout = 0.0
    return {"rows": num_rows, "train_loss": float(sums[0] / sums[1])}
