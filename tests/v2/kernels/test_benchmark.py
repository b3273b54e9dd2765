# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks.kernels`` times: each workload's kernel and twin agree; without a GPU it says so."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels as benchmark

WORKLOADS = list(benchmark.workloads([3], "cpu"))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: f"{w.kernel}, {w.shape}")
def test_kernel_and_twin_agree(workload) -> None:
    benchmark.compare(workload)


def test_all_kernels_are_timed() -> None:
    kernels = {"threshold_tail", "cost_aware_tail", "logits_summary"}
    assert {workload.kernel for workload in WORKLOADS} == kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_well(capsys) -> None:
    assert benchmark.main([]) == 0
    assert "without an NVIDIA GPU" in capsys.readouterr().out
