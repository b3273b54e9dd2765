# SPDX-License-Identifier: Apache-2.0
"""A draft model whose layers give blocks back must not fall behind, on Model Runner V1 (V2: ``test_v2_draft_kv``)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm_specdecpp.decision.rules import FixedRule
from vllm_specdecpp.engine.shared.kept_blocks import keeps_all_blocks
from vllm_specdecpp.engine.v1.inputs import RowState
from vllm_specdecpp.engine.v1.proposer import SpecDecPPProposer


def kv_cache_config(**specs: Any) -> SimpleNamespace:
    groups = [SimpleNamespace(layer_names=[name], kv_cache_spec=spec) for name, spec in specs.items()]
    return SimpleNamespace(kv_cache_groups=groups)


def test_sliding_windows_give_blocks_back():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape: dict[str, Any] = {"block_size": 4, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    config = kv_cache_config(target=SlidingWindowSpec(**shape, sliding_window=8), draft=FullAttentionSpec(**shape))
    plain, connected = SimpleNamespace(kv_transfer_config=None), SimpleNamespace(kv_transfer_config="a connector's")
    assert keeps_all_blocks(plain, config, {"draft"}) and not keeps_all_blocks(plain, config, {"target", "draft"})
    assert not keeps_all_blocks(connected, config, {"draft"}), "blocks come back as if the draft had written them"


@pytest.mark.parametrize(("keeps", "fed"), [(True, [1]), (False, [0, 1])])
def test_such_a_draft_reads_in_every_round(keeps, fed):
    """Request 0 may draft nothing in this round, as under a table of lengths; request 2 has switched off."""
    proposer: Any = SpecDecPPProposer.__new__(SpecDecPPProposer)
    proposer.__dict__ |= {
        "rule": FixedRule(), "device": torch.device("cpu"), "can_catch_up": keeps, "agree": lambda tensor: tensor,
        "config": SimpleNamespace(min_speculative_tokens=1),
        "requests": SimpleNamespace(
            max_length=lambda row, index, bound: (0, 3, 0)[index], is_prefilling=lambda index: False,
            stop_token_ids=lambda rows: None, will_go_on=lambda row, index: index < 2,
        ),
    }  # fmt: skip
    rows = [RowState(str(index), 4, 5) for index in range(3)]
    assert proposer._begin_round(rows, {}, 3, None, [5, 5, 5], None)[1] == fed
