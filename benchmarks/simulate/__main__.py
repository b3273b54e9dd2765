# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.simulate``: see :mod:`benchmarks.simulate.play`."""

from __future__ import annotations

import sys

from benchmarks.simulate.play import main

if __name__ == "__main__":
    sys.exit(main())
