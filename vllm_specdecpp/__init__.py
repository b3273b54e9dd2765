# SPDX-License-Identifier: Apache-2.0
"""SpecDec++ for vLLM: speculative decoding whose candidate length is decided per request and round.

Importing this package is cheap: vLLM's plugin loader imports it in every process, so it imports nothing.
"""

__version__ = "0.1.0"
