# SPDX-License-Identifier: Apache-2.0
"""A Triton backend that compiles nothing: it is looked up, never used, while kernels are interpreted."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.driver import DriverBase


class PresentDriver(DriverBase):
    """Says that there is a device, the CPU."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise RuntimeError("kernels are interpreted here, never launched")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("interpreted kernels have no speed worth measuring")


class NoCompiler(BaseBackend):
    """Refuses to compile."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("kernels are interpreted here: TRITON_INTERPRET=1 was set too late")

    hash = parse_options = add_stages = load_dialects = get_module_map = _refuse
