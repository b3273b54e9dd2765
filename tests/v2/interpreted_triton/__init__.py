# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's Model Runner V2 run on a machine without a GPU: its Triton kernels, interpreted, on CPU tensors.

vLLM's CPU platform takes Triton for present if a backend named ``cpu`` is registered (``vllm.triton_utils.importing``).
Ours only says that it is there; what runs the kernels is Triton's own interpreter. Both are process-global, so these
tests have a pytest process of their own. Call :func:`install` before anything imports triton or vLLM.
"""

from __future__ import annotations

import os


def install() -> None:
    """Choose the interpreter, register the backend, mend the interpreter's gaps; a second call changes nothing."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import Backend, backends

    from tests.v2.interpreted_triton import gaps
    from tests.v2.interpreted_triton.backend import NoCompiler, PresentDriver

    if "cpu" not in backends:
        backends["cpu"] = Backend(NoCompiler, PresentDriver)
        gaps.mend()
