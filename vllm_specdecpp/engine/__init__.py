# SPDX-License-Identifier: Apache-2.0
"""Everything that touches vLLM: the ledger of its symbols (hooks), options, worker, proposer, metrics."""
