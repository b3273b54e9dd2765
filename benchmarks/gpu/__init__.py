# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command: ``python -m benchmarks.gpu``."""
