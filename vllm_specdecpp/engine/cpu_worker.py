# SPDX-License-Identifier: Apache-2.0
"""The Worker on CPUs; named in ``worker_cls``."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker as VllmCPUWorker

from vllm_specdecpp.engine.install import SpecDecPPWorkerMixin


class CPUWorker(SpecDecPPWorkerMixin, VllmCPUWorker):
    """vLLM's CPU Worker with our proposer."""
