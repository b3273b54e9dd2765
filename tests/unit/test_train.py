# SPDX-License-Identifier: Apache-2.0
"""Training a head: what it learns, what it must not, reproducibility, early stopping, and wrong data."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_specdecpp.data.dataset import LabelRows
from vllm_specdecpp.head.model import AcceptanceHead
from vllm_specdecpp.training import statistics as metrics
from vllm_specdecpp.training.fit import fitting
from vllm_specdecpp.training.fit.train import TrainOptions, train_head

HIDDEN = 12


def options(**changes: Any) -> TrainOptions:
    """Quick settings for small data."""
    quick = {
        "data": ["d"], "out": "o", "layers": 1, "width": 0, "features": ["none"], "lr": 3e-3, "epochs": 8,
        "batch_size": 64, "dropout": 0.0, "weight_decay": 0.0,
    }  # fmt: skip
    return TrainOptions(**{**quick, **changes})


def make_rows(hidden: Tensor, accepted: Tensor, soft: Tensor | None = None, **scalars: Tensor) -> LabelRows:
    n = len(hidden)
    defaults = {"top1_prob": 0.5, "entropy": 1.0, "margin": 1.0}
    return LabelRows(
        hidden=hidden,
        scalars={name: scalars.get(name, torch.full((n,), value)) for name, value in defaults.items()},
        position=torch.ones(n, dtype=torch.int64),
        accepted=accepted.float(),
        soft=torch.full((n,), math.nan) if soft is None else soft,
        prompt=torch.arange(n) // 5,
        prompts=tuple((str(i), "a") for i in range(-(-n // 5))),
    )


def planted(num_rows: int, seed: int = 0, shift: float = 0.0) -> LabelRows:
    """Accepted if a curved function of two dimensions says so; the others are noise of other sizes and offsets."""
    x = torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(seed))
    accepted = x[:, 0] + 0.5 * x[:, 1].abs() > 0.2
    size = torch.logspace(-2, 2, HIDDEN)
    return make_rows(x * size + shift * size, accepted)


def auc(head: AcceptanceHead, rows: LabelRows) -> float:
    with torch.no_grad():
        return metrics.auc(fitting.score(head, rows.hidden, rows.scalars), rows.accepted)


def test_the_loss_and_its_normaliser() -> None:
    """Against the formula in float64: sum of -y ln p - w (1 - y) ln(1 - p), over sum of y + w (1 - y)."""
    logit, target = torch.tensor([2.0, -1.0, 0.5, -40.0]), torch.tensor([1.0, 0.0, 0.3, 0.0])
    loss, weight = fitting.weighted_loss(logit, target, 6.0)
    expected = weights = 0.0
    for x, y in zip(logit.tolist(), target.tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        expected -= y * math.log(p) + 6 * (1 - y) * math.log1p(-p)
        weights += y + 6 * (1 - y)
    assert float(loss) == pytest.approx(expected, rel=1e-6) and float(weight) == pytest.approx(weights)
    # Saturated: no probability of exactly 0 on the way.
    assert float(fitting.weighted_loss(torch.tensor([-200.0]), torch.tensor([1.0]), 1.0)[0]) == pytest.approx(200)


class TestLearning:
    @pytest.mark.parametrize("changes", [{}, {"layers": 3, "tied": False}, {"width": 6}, {"lag": 1}])
    def test_a_planted_problem(self, changes: dict[str, Any]) -> None:
        head, history = train_head(planted(3000), planted(500, 1), options(**changes))
        assert auc(head, planted(1000, 2)) > 0.95
        assert history[-1]["train_loss"] < 0.5 * math.log(2)
        assert (head.lag, head.width, head.tied) == (changes.get("lag", 0), changes.get("width"), "tied" not in changes)

    def test_shuffled_labels_are_not_learned(self) -> None:
        rows, val_rows = planted(3000), planted(500, 1)
        generator = torch.Generator().manual_seed(3)
        rows, val_rows = (
            replace(part, accepted=part.accepted[torch.randperm(len(part), generator=generator)])
            for part in (rows, val_rows)
        )
        head, _ = train_head(rows, val_rows, options())
        assert auc(head, planted(1000, 2)) == pytest.approx(0.5, abs=0.2)
        assert auc(head, val_rows) == pytest.approx(0.5, abs=0.12)

    @pytest.mark.parametrize("name", ["top1_prob", "entropy", "margin"])
    def test_a_scalar_alone_tells(self, name: str) -> None:
        def rows(seed: int, num_rows: int = 1500) -> LabelRows:
            generator = torch.Generator().manual_seed(seed)
            accepted = torch.rand(num_rows, generator=generator) < 0.6
            value = 0.2 + 0.5 * accepted + 0.2 * torch.rand(num_rows, generator=generator)
            return make_rows(torch.randn(num_rows, HIDDEN, generator=generator), accepted, **{name: value})

        with_it, _ = train_head(rows(0), rows(1), options(features=[name], lr=0.02))
        without, _ = train_head(rows(0), rows(1), options(lr=0.02))
        assert auc(with_it, rows(2)) > 0.95
        assert auc(without, rows(2)) == pytest.approx(0.5, abs=0.1)

    @pytest.mark.parametrize("w_rej", [1.0, 4.0])
    def test_a_head_with_scalars_starts_as_their_regression(self, w_rej: float) -> None:
        """Before any step, and on soft labels; so a short training never ends behind the scalars alone."""
        generator = torch.Generator().manual_seed(4)
        num_rows = 4000
        entropy = 0.05 + 3 * torch.rand(num_rows, generator=generator)
        p = (1.0 - 1.5 * (entropy / 2).log()).sigmoid()
        accepted = torch.rand(num_rows, generator=generator) < p
        rows = make_rows(torch.randn(num_rows, HIDDEN, generator=generator), accepted, soft=p, entropy=entropy)
        head, history = train_head(
            rows, rows, options(features=["entropy"], lr=1e-9, epochs=1, w_rej=w_rej, dropout=0.0)
        )
        start = history[0]
        assert (start["epoch"], start["rows"]) == (0, 0) and math.isnan(start["train_loss"])
        best = float(-(p * p.log() + (1 - p) * (1 - p).log()).mean())  # log-loss of the true law
        assert start["val_log_loss"] == pytest.approx(best, abs=0.01)
        shifted = (fitting.score(head, rows.hidden, rows.scalars) + math.log(w_rej)).sigmoid()
        assert float((shifted - p).abs().mean()) < 0.03

    def test_a_head_without_scalars_keeps_its_random_start(self) -> None:
        head = AcceptanceHead(HIDDEN, 1)
        before = [parameter.clone() for parameter in head.parameters()]
        fitting.start_at_scalars(head, planted(100), 1.0)
        assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))

    @pytest.mark.parametrize("w", [1.0, 3.0, 6.0])
    def test_w_rej_shifts_the_optimum(self, w: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """The optimum is p / (p + w * (1 - p)). Two states, of which one is accepted 3 times in 10, the other 9."""
        state = torch.arange(2000) % 2
        hidden = torch.nn.functional.one_hot(state, 2).float()
        accepted = torch.where(state == 0, torch.arange(2000) % 20 < 6, torch.arange(2000) % 20 < 18)
        rows = make_rows(hidden, accepted)
        # Whole-data batches: the weighted count of a small one varies.
        monkeypatch.setattr(fitting, "PATIENCE", 400)
        settings = options(w_rej=w, layers=0, batch_size=2000, epochs=400, lr=0.05)
        head, history = train_head(rows, rows, settings)
        with torch.no_grad():
            p_hat = head.probability(torch.eye(2))
        p = torch.tensor([0.3, 0.9])
        torch.testing.assert_close(p_hat, p / (p + w * (1 - p)), atol=0.01, rtol=0)
        entropy = float(torch.special.entr(torch.stack([p, 1 - p])).sum(0).mean())
        assert min(row["val_log_loss"] for row in history) == pytest.approx(entropy, abs=1e-3)  # undone
        assert head.metadata == {"w_rej": w}

    def test_soft_labels(self) -> None:
        """They win over the outcome where they are known."""
        hidden = torch.nn.functional.one_hot(torch.arange(1200) % 2, 2).float()
        soft = torch.where(torch.arange(1200) % 2 == 0, 0.25, math.nan)
        rows = make_rows(hidden, torch.arange(1200) % 4 < 3, soft)  # accepted: state 0 always, state 1 half the time
        head, _ = train_head(rows, None, options(layers=0, batch_size=1200, epochs=400, lr=0.05))
        with torch.no_grad():
            assert head.probability(torch.eye(2)).tolist() == pytest.approx([0.25, 0.5], abs=0.02)

    def test_tied_blocks_stay_one_matrix(self, tmp_path: Path) -> None:
        for tied, blocks in ((True, 1), (False, 3)):
            head, _ = train_head(planted(500), None, options(layers=3, tied=tied, epochs=1))
            assert head.num_parameters == blocks * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN + 2
            head.save_pretrained(tmp_path / str(tied))
            loaded = AcceptanceHead.from_pretrained(tmp_path / str(tied))
            assert loaded.tied is tied and len(loaded.blocks) == blocks


def state(head: AcceptanceHead) -> list[Tensor]:
    return list(head.state_dict().values())


def same(a: AcceptanceHead, b: AcceptanceHead) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


class TestReproducibility:
    CHANGES: dict[str, Any] = {"dropout": 0.3, "epochs": 3, "layers": 2}

    def test_the_seed_decides_every_bit(self) -> None:
        rows, val_rows = planted(800), planted(200, 1)
        first, history = train_head(rows, val_rows, options(**self.CHANGES))
        torch.manual_seed(99)  # the caller's own generator plays no part
        before = torch.get_rng_state()
        again, history_again = train_head(rows, val_rows, options(**self.CHANGES))
        assert torch.equal(torch.get_rng_state(), before)
        assert same(first, again)
        for row, row_again in zip(history, history_again, strict=True):
            assert {**row, "seconds": 0} == {**row_again, "seconds": 0}
        other, _ = train_head(rows, val_rows, options(**self.CHANGES, seed=1))
        assert not same(first, other)

    def test_each_epoch_has_an_order_of_its_own(self) -> None:
        rows = planted(130)
        epochs = [[batch.hidden for batch in fitting.batches(rows, 50, 4, epoch)] for epoch in (1, 1, 2)]
        assert [len(batch) for batch in epochs[0]] == [50, 50, 30]
        first, again, second = (torch.cat(epoch) for epoch in epochs)
        assert torch.equal(first, again) and not torch.equal(first, second)
        assert torch.equal(first.sort(0).values, rows.hidden.sort(0).values)

    def test_the_input_is_left_alone(self) -> None:
        rows = planted(200)
        before = rows.hidden.clone()
        train_head(rows, None, options(epochs=1))
        assert torch.equal(rows.hidden, before)


class TestRegularisation:
    def test_dropout_is_on_in_training_and_off_after(self) -> None:
        rows = planted(500)
        without, _ = train_head(rows, None, options(epochs=2))
        dropped, _ = train_head(rows, None, options(epochs=2, dropout=0.5))
        assert not same(without, dropped)
        assert not dropped.training and dropped.dropout == 0
        assert torch.equal(dropped(rows.hidden), dropped(rows.hidden))

    def test_weight_decay_shrinks_matrices_only(self) -> None:
        rows = planted(500)
        settings = {"epochs": 4, "standardize": False, "lr": 1e-3}
        light, _ = train_head(rows, None, options(**settings))
        heavy, _ = train_head(rows, None, options(**settings, weight_decay=30.0))
        assert heavy.output.weight.norm() < 0.65 * light.output.weight.norm()
        assert heavy.output.bias.norm() > 0.8 * light.output.bias.norm()

    def test_the_best_epoch_is_kept_and_training_ends_early(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Few rows with random labels: the longer, the worse on others."""
        rows, val_rows = planted(60), planted(60, 1)
        generator = torch.Generator().manual_seed(0)
        rows, val_rows = (
            replace(part, accepted=(torch.rand(60, generator=generator) < 0.5).float()) for part in (rows, val_rows)
        )
        monkeypatch.setattr(fitting, "PATIENCE", 30)
        settings = options(epochs=200, lr=0.02, layers=2)
        head, history = train_head(rows, val_rows, settings)
        losses = [row["val_log_loss"] for row in history]
        best = losses.index(min(losses))
        assert len(history) == best + 1 + 30 < 200
        assert losses[-1] > losses[best] + 0.1
        found = fitting.evaluate(head, val_rows, 1.0)
        assert found["log_loss"] == pytest.approx(losses[best], rel=1e-6)
        assert [row["best"] for row in history][best:] == [1] + 30 * [0]

    def test_without_validation_all_epochs_count(self) -> None:
        _, history = train_head(planted(100), None, options(epochs=7))
        assert len(history) == 7 and history[-1]["best"] == 1 and "val_log_loss" not in history[-1]


class TestStandardisation:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_against_float64(self, dtype: torch.dtype) -> None:
        rows = planted(777, shift=30.0)
        rows = replace(rows, hidden=rows.hidden.to(dtype))
        head = AcceptanceHead(HIDDEN, 1, standardize=True)
        fitting.standardize(head, rows.hidden)
        expected = rows.hidden.double()
        torch.testing.assert_close(head.mean.double(), expected.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(1 / head.scale.double(), expected.std(0, unbiased=False), rtol=1e-4, atol=0)

    def test_a_constant_dimension_is_left_out(self) -> None:
        rows = planted(100)
        rows.hidden[:, 3] = 1000.0
        rows.hidden[:, 4] = 0.0
        rows.hidden[:, 5] = 1000.0 + 1e-3 * torch.randn(100)
        head, _ = train_head(rows, None, options(epochs=1))
        assert (head.scale == 0).nonzero().squeeze(1).tolist() == [3, 4, 5]
        other = rows.hidden.clone()
        other[:, 3:6] += 1e4
        assert torch.equal(head(other), head(rows.hidden))

    def test_of_training_rows_only(self) -> None:
        rows = planted(300)
        val_rows = planted(100, 1, shift=1000.0)
        head, _ = train_head(rows, val_rows, options(epochs=1))
        torch.testing.assert_close(head.mean.double(), rows.hidden.double().mean(0), rtol=1e-4, atol=1e-4)
        plain, _ = train_head(rows, val_rows, options(epochs=1, standardize=False))
        assert not plain.standardize and "mean" not in plain.state_dict()


class TestErrors:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_data_that_are_no_numbers(self, bad: float) -> None:
        rows = planted(50)
        rows.hidden[7, 2] = bad
        with pytest.raises(ValueError, match=r"^specdecpp: .*no finite number"):
            train_head(rows, None, options())
