# SPDX-License-Identifier: Apache-2.0
"""Asynchronous scheduling on a CPU, where vLLM switches it off: the scheduler books room before anything is drafted."""

from __future__ import annotations

from typing import Any


def allow(monkeypatch: Any) -> None:
    """Let ``async_scheduling=True`` stand."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_update_config))
