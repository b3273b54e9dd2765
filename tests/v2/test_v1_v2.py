# SPDX-License-Identifier: Apache-2.0
"""Both runners take the same decisions for the same models: one decision core, two adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import HIDDEN_SIZE
from tests.v2 import v1_rounds
from vllm_specdecpp.head.model import AcceptanceHead


@pytest.fixture
def head(tmp_path):
    """A head that reads scalars: the features' path through both adapters."""
    torch.manual_seed(2)
    head = AcceptanceHead(HIDDEN_SIZE, 2, features=("top1_prob", "margin", "entropy"), lag=0)
    with torch.no_grad():
        head.output.weight.mul_(3.0)
        head.output.bias.copy_(torch.tensor([0.0, 1.0]))
    head.save_pretrained(tmp_path / "head")
    return str(tmp_path / "head")


def test_rounds_are_the_same_on_both_runners(tiny, head):
    config: dict[str, Any] = {
        "method": "specdecpp", "model": tiny.draft_good, "head": head, "rule": "threshold", "threshold": 0.5,
        "num_speculative_tokens": 8, "trace_rounds": 100_000,
    }  # fmt: skip
    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    environment.pop("TRITON_INTERPRET")
    command = [sys.executable, "-m", "tests.v2.v1_rounds", json.dumps(config)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    v1 = json.loads(done.stdout.splitlines()[-1])
    v2 = json.loads(json.dumps(v1_rounds.rounds(config)))
    for changes, theirs, mine in zip(v1_rounds.CHANGES, v1, v2, strict=True):
        assert mine == theirs, changes
        assert len({len(candidates) for request in mine for candidates, *_ in request}) >= 4, changes
