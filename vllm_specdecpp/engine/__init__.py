# SPDX-License-Identifier: Apache-2.0
"""Everything that touches vLLM: the ledger of its symbols (hooks), options, Workers, drafters (v1, v2), recording."""
