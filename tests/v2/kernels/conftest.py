# SPDX-License-Identifier: Apache-2.0
"""Kernels run on the CPU, under Triton's interpreter, each load and store watched: in a pytest process of their own.

The interpreter is chosen when triton is first imported, for the whole process.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.v2.interpreted_triton import gaps
from tests.v2.kernels import element_guard

gaps.watch_for_overflow(True)
element_guard.install()
