# SPDX-License-Identifier: Apache-2.0
"""The Worker on GPUs; named in ``worker_cls``."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker as VllmWorker

from vllm_specdecpp.engine.install import SpecDecPPWorkerMixin


class Worker(SpecDecPPWorkerMixin, VllmWorker):
    """vLLM's GPU Worker with our proposer."""
