# SPDX-License-Identifier: Apache-2.0
"""How long to draft: pure torch, batched over requests, no vLLM import.

One loop serves every adapter::

    state = DraftRound(rule, max_lengths)  # from make_rule, or a CostAwareTail with its parameters loaded
    while state.goes_on():
        features = ...            # the draft's forward pass
        state.observe(features)   # what is decided by is settled, before the candidate exists
        state.append(token_ids)   # the drawn candidate; who draws another one
"""
