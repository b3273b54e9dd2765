# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specdecpp.decision import tails
from vllm_specdecpp.decision.cost_aware.acceptance import AcceptanceModel, OnlineLogistic, bucket, logit, sigmoid
from vllm_specdecpp.decision.cost_aware.logistic import BUCKETS
from vllm_specdecpp.decision.tail_params import CostAwareParams


def following(model, x, position, num):
    """[num_reqs, num] acceptance of the candidates after those scored ``x`` at ``position``."""
    params = CostAwareParams.allocate(len(x), 20, 1, BUCKETS, "cpu")
    params.load(
        limits=[1], price=0.0, this=model.this.theta, next=model.next.theta, means=model.means,
        step_seconds=np.zeros(len(x) + 1), verify_seconds=np.zeros(2),
    )  # fmt: skip
    return tails.following(torch.tensor(x, dtype=torch.float32), position, num, params).double().numpy()


def batch(rng, n, slope, common, shift_at_1=0.0):
    """Observed candidates whose true log-odds are slope * x + common (+ shift at position 1)."""
    x = rng.normal(1.5, 2.0, n)
    buckets = rng.integers(0, 4, n)
    p = sigmoid(slope * x + common + shift_at_1 * (buckets == 0))
    return x, buckets, (rng.random(n) < p).astype(float)


def log_loss(model, x, buckets, labels):
    p = np.clip(sigmoid(model.log_odds(x, buckets)), 1e-9, 1 - 1e-9)
    return -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))


def test_starts_at_the_identity_and_finds_a_miscalibration():
    rng = np.random.default_rng(0)
    model = OnlineLogistic()
    x = np.array([-3.0, 0.0, 2.0])
    assert model.log_odds(x, np.zeros(3, dtype=int)).tolist() == x.tolist()
    test = batch(rng, 20000, 0.6, -1.0, 0.7)
    before = log_loss(model, *test)
    for _ in range(300):  # rounds
        model.update(*batch(rng, 4, 0.6, -1.0, 0.7))
    best = log_loss_of_truth(test)
    assert before > best + 0.05
    assert log_loss(model, *test) < best + 0.01
    assert model.slope == pytest.approx(0.6, abs=0.15)
    assert model.intercepts[0] - model.intercepts[1] > 0.2


def log_loss_of_truth(test):
    x, buckets, labels = test
    p = sigmoid(0.6 * x - 1.0 + 0.7 * (buckets == 0))
    return -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))


def test_follows_a_shift_within_a_few_hundred_rounds():
    rng = np.random.default_rng(1)
    model = OnlineLogistic()
    for _ in range(500):
        model.update(*batch(rng, 4, 1.0, 0.0))
    after = batch(rng, 20000, 0.5, -1.5)
    stale = log_loss(model, *after)
    for _ in range(300):
        model.update(*batch(rng, 4, 0.5, -1.5))
    x, _, labels = after
    p = sigmoid(0.5 * x - 1.5)
    best = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert log_loss(model, *after) < best + 0.2 * (stale - best)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_survives_constant_labels_and_recovers(label):
    rng = np.random.default_rng(2)
    model = OnlineLogistic()
    for _ in range(2000):
        x, buckets, _ = batch(rng, 4, 1, 0)
        model.update(x, buckets, np.full(4, label))
    assert np.isfinite(model.theta).all() and np.abs(model.theta).max() < 12
    p = sigmoid(model.log_odds(np.array([1.5]), np.array([1])))
    assert abs(p[0] - label) < 0.05
    for _ in range(400):
        model.update(*batch(rng, 4, 1.0, 0.0))
    assert sigmoid(model.log_odds(np.array([1.5]), np.array([1])))[0] == pytest.approx(sigmoid(np.array(1.5)), abs=0.1)


def test_nan_scores_and_empty_batches_change_nothing():
    model = AcceptanceModel()
    start = model.this.theta.copy()
    model.this.update(np.array([np.nan]), np.array([0]), np.array([1.0]))
    model.update(np.full((2, 3), np.nan), np.full((2, 3), np.nan))
    model.update(np.zeros((0, 3)), np.zeros((0, 3)))
    assert (model.this.theta == start).all()
    # A missing score: the position's mean acceptance, which labels without scores teach too.
    for _ in range(300):
        model.update(np.full((1, 2), np.nan), np.array([[1.0, 0.0]]))
    assert model.accept(np.array([np.nan]), 1)[0] == pytest.approx(0.5, abs=0.02)
    assert (model.this.theta == start).all()


def test_unobserved_candidates_teach_nothing():
    model, other = AcceptanceModel(), AcceptanceModel()
    x = np.array([[1.0, 2.0], [-3.0, 0.5]])
    model.update(x, np.array([[0.0, 1.0], [np.nan, 0.0]]))
    x[1, 0] = 7.0  # a score after the first rejection
    other.update(x, np.array([[0.0, 1.0], [np.nan, 0.0]]))
    assert (model.this.theta == other.this.theta).all() and (model.next.theta == other.next.theta).all()


def test_next_predicts_from_the_score_before_and_fades_to_the_mean():
    rng = np.random.default_rng(3)
    model = AcceptanceModel()
    for _ in range(3000):
        mood = rng.random() < 0.5
        p = 0.95 if mood else 0.35
        labels = np.full((6, 1), np.nan)
        for k in range(6):
            labels[k] = float(rng.random() < p)
            if not labels[k, 0]:
                break
        model.update(np.full((6, 1), logit(np.array(p))), labels)
    good = following(model, logit(np.array([0.95])), 2, 3)[0]
    poor = following(model, logit(np.array([0.35])), 2, 3)[0]
    assert good[0] == pytest.approx(0.95, abs=0.04) and poor[0] == pytest.approx(0.35, abs=0.12)
    assert good.shape == (3,)
    model.next.theta[0] *= 0.3  # scores say little of the next: the second after is closer to the mean than the first
    good, poor = (following(model, logit(np.array([p])), 2, 3)[0] for p in (0.95, 0.35))
    assert good[1] - poor[1] < good[0] - poor[0]


def test_buckets_and_logits_are_bounded():
    assert bucket(np.array([1, 2, 5, 6, 7, 15, 5000])).tolist() == [0, 1, 4, 4, 5, 7, 7]
    out = logit(np.array([0.0, 1.0, 0.5, np.nan]))
    assert out[:3].tolist() == [-8, 8, 0] and np.isnan(out[3])


def dense_update(theta, prior, precision, x, buckets, labels, memory=1500.0):
    """The Newton step with its whole precision matrix."""
    weights = np.array([20.0, 2.0] + [4.0] * 8)
    phi = np.zeros((len(x), 10))
    phi[:, 0], phi[:, 1] = x, 1.0
    phi[np.arange(len(x)), 2 + buckets] = 1.0
    p = sigmoid(phi @ theta)
    keep = np.exp(-len(x) / memory)
    precision = keep * precision + (phi.T * np.maximum(p * (1 - p), 1e-4)) @ phi + (1 - keep) * np.diag(weights)
    step = np.linalg.solve(precision, phi.T @ (labels - p) + (1 - keep) * weights * (prior - theta))
    theta = theta + np.clip(step, -0.5, 0.5)
    theta[0] = np.clip(theta[0], 0, 4)
    return theta, precision


@pytest.mark.parametrize("n", [1, 5, 40])
def test_the_short_solve_is_the_newton_step(n):
    rng = np.random.default_rng(n)
    model = OnlineLogistic(0.8, 0.2)
    theta, prior = model.theta, model.theta
    precision = np.diag([20.0, 2.0] + [4.0] * 8)
    for _ in range(60):
        x, labels = rng.normal(1, 3, n), (rng.random(n) < 0.7).astype(float)
        buckets = rng.integers(0, 8, n)
        model.update(x, buckets, labels)
        theta, precision = dense_update(theta, prior, precision, x, buckets, labels)
        assert model.theta == pytest.approx(theta, abs=1e-9)
    assert np.abs(theta - prior).max() > 0.2  # it moved


def test_one_request_and_a_batch_teach_the_same():
    rng = np.random.default_rng(0)
    one, batch = AcceptanceModel(), AcceptanceModel()
    for _ in range(100):
        verified = int(rng.integers(0, 8))
        accepted = int(rng.integers(0, verified + 1))
        x = np.where(rng.random(verified) < 0.1, np.nan, rng.normal(1, 2, verified))
        one.update_run(x.tolist(), accepted, verified)
        labels = np.full((verified, 1), np.nan)
        labels[:accepted] = 1.0
        labels[accepted : accepted + 1] = 0.0
        batch.update(x[:, None], labels)
    assert one.this.theta == pytest.approx(batch.this.theta) and one.next.theta == pytest.approx(batch.next.theta)
    assert one.means == pytest.approx(batch.means)
    assert one.this.theta[0] != 1.0


def test_what_follows_is_thought_better_of_while_only_first_candidates_are_seen():
    model = AcceptanceModel()
    before = following(model, np.array([2.0]), 1, 1)[0, 0]
    for _ in range(200):
        model.update_run([2.0], 1, 1)
    assert following(model, np.array([2.0]), 1, 1)[0, 0] > before + 0.03


def test_a_stiff_regression_stays_nearer_to_its_start_and_returns_to_it_sooner():
    rng = np.random.default_rng(0)
    soft, stiff = OnlineLogistic(memory=200.0), OnlineLogistic(memory=200.0, stiffness=8.0)
    moved = []
    for model in (soft, stiff):
        for _ in range(300):
            x = rng.normal(0, 2, 4)
            model.update(x, np.zeros(4, dtype=np.int64), (rng.random(4) < sigmoid(0.2 * x - 1)).astype(float))
        moved.append(np.abs(model.theta[:3] - [1.0, 0.0, 0.0]).sum())
    assert 0.2 * moved[0] < moved[1] < 0.9 * moved[0]
