# SPDX-License-Identifier: Apache-2.0
"""A captured round waits for no device, and queues little beside its graphs: ``propose`` and its passes on tensors that
are not on the host.

``FakeTensorMode`` has no numbers, so whatever asks for one (``bool``, ``.item()``, a mask) raises; a dispatch mode adds
the copies to the host. Launches of Triton kernels, the models and vLLM's own metadata and tables are left out.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.v2 import harness
from tests.v2.cost_rounds import attach_script
from tests.v2.epochs import EpochBackend, Epochs
from vllm_specdecpp.engine.v2 import graphs
from vllm_specdecpp.engine.v2.passes import SHORT

K, HIDDEN = 3, 4
DEVICE = torch.device("meta")
"""Not the host. ``FakeTensorMode`` has no indexing of CUDA tensors where torch was built without CUDA."""


class HostWait(AssertionError):
    """The host would wait until the device is through."""


WAITS = (HostWait, DataDependentOutputException, DynamicOutputShapeException)


class NoWaits(TorchDispatchMode):
    """Refuses copies between host and device that are waited for."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        result = func(*args, **kwargs)
        source = given.get("src", given.get("self"))  # of copy_, of the others
        crosses = (
            isinstance(source, torch.Tensor)
            and isinstance(result, torch.Tensor)
            and source.device.type != result.device.type
        )
        if crosses and not given.get("non_blocking", False):
            raise HostWait(f"{func}: a blocking copy from {source.device} to {result.device}")
        return result


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given one by one: aten calls that are no views and no allocations."""

    num = 0

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        is_view = alias is not None and not alias.is_write
        name = func.name().split("::")[1].split(".")[0]
        if name == "to":  # another type or device is a copy
            is_view = result is args[0]
        self.num += not (is_view or name in ("device", "scalar_tensor", "empty", "empty_like", "new_empty"))
        return result


class HostNumbers:
    """A tensor of the host, with its numbers."""

    def __init__(self, array: Any) -> None:
        self._array = np.asarray(array)

    def __getitem__(self, key: Any) -> HostNumbers:
        return HostNumbers(self._array[key])

    def __len__(self) -> int:
        return len(self._array)

    def numpy(self) -> Any:
        return self._array

    def max(self) -> int:
        return int(self._array.max())


class Later:
    """An event that the device has not reached yet."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        raise HostWait("Event.synchronize")


class Model:
    def __call__(self, *, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(input_ids), HIDDEN, device=DEVICE)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(hidden_states), 512, dtype=torch.bfloat16, device=DEVICE)


def _tables(speculator: Any) -> Any:
    most = speculator.max_num_tokens + speculator.max_num_reqs

    def slots(*args: Any, out: Any = None) -> torch.Tensor:
        return torch.empty(1, args[3], dtype=torch.int64, device=DEVICE)

    table = torch.empty(speculator.max_num_reqs, 9, dtype=torch.int32, device=DEVICE)
    return types.SimpleNamespace(
        compute_slot_mappings=slots, slot_mappings=torch.empty(1, most, dtype=torch.int64, device=DEVICE), cp_size=1,
        block_tables=[types.SimpleNamespace(gpu=table)], block_sizes=[32],
    )  # fmt: skip


@pytest.fixture
def on_device(tiny, monkeypatch) -> Iterator[Callable[..., Any]]:
    """Makes a speculator on a GPU that is not there, with captured rounds."""
    from triton.runtime.interpreter import InterpretedFunction
    from vllm.config import set_current_vllm_config
    from vllm.utils import torch_utils
    from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as vllms

    from vllm_specdecpp.config import SpecDecPPConfig
    from vllm_specdecpp.decision.tail_params import CostAwareParams
    from vllm_specdecpp.engine.v2 import capture, passes
    from vllm_specdecpp.engine.v2.speculator import SpecDecPPSpeculator

    def upload(data: Any, device: Any = None, dtype: Any = None, out: Any = None) -> torch.Tensor:
        """vLLM's, whose copies are pinned and not waited for."""
        kinds = {np.dtype("int64"): torch.int64, np.dtype("int32"): torch.int32, np.dtype("bool"): torch.bool}
        return torch.empty(data.shape, dtype=kinds[data.dtype], device=DEVICE) if out is None else out

    def load(self: Any, **_: Any) -> None:
        self.packed.copy_(torch.empty(self.packed.shape), non_blocking=True)

    vllm_config = harness._vllm_config(tiny.target, tiny.draft_good, K, (("draft_sample_method", "greedy"),))
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(torch_utils, "async_tensor_h2d", upload)
    monkeypatch.setattr(torch.cuda, "Event", Later)
    monkeypatch.setattr(CostAwareParams, "load", load)
    monkeypatch.setattr(capture, "prepare_inputs_to_capture", lambda *_, **__: ({}, {}))
    for module in (passes, vllms):
        monkeypatch.setattr(module, "build_slot_mappings_by_layer", lambda *_: {})

    def make(change: Callable[[Any], None] = lambda s: None, **options: Any) -> Any:
        config = SpecDecPPConfig(model=tiny.draft_good, num_speculative_tokens=K, **options)
        speculator: Any = SpecDecPPSpeculator(vllm_config, DEVICE, config)
        speculator.model, speculator.block_tables = Model(), _tables(speculator)
        speculator.model_state = speculator.attn_groups = None
        speculator.draft_attn_layer_names = {"layer"}
        group = types.SimpleNamespace(layer_names=["layer"], kv_cache_spec=None)
        speculator.kv_cache_config = types.SimpleNamespace(kv_cache_groups=[group], num_blocks=64)
        most = speculator.max_num_tokens + speculator.max_num_reqs
        speculator.expanded_slot_mappings = torch.empty(1, most, dtype=torch.int64, device=DEVICE)
        speculator._build_attn_metadata = lambda **_: {}
        # vLLM's own first pass, of a prompt's width, works out its metadata with the host's numbers.
        speculator._prefill = lambda batch, *_: speculator._eager_pass(batch, SHORT)
        speculator.refresh_first_pass = lambda size, bound: speculator._load_short(size)
        speculator._update_draft_decode_metadata = lambda *_: None
        speculator.gaps.__dict__["can_catch_up"] = True
        token_ids = torch.empty(4, 256, dtype=torch.int32, device=DEVICE)
        state = types.SimpleNamespace(all_token_ids=types.SimpleNamespace(gpu=token_ids))
        speculator.runner = types.SimpleNamespace(req_states=state)
        speculator.set_rule(config)
        if config.resolved_rule == "cost_aware":
            attach_script(speculator, seed=3)
        change(speculator)
        epochs = Epochs()
        epochs.begin()
        speculator.graphs = graphs.DraftGraphs(speculator, graphs.IF_NODES, [4], K, EpochBackend(epochs))
        return speculator

    # torch.tensor(0, device="meta") is no fake.
    with FakeTensorMode(allow_non_fake_inputs=True), set_current_vllm_config(vllm_config):
        yield make


def _batch(num_reqs: int, *, prompt: bool = False) -> Any:
    lengths = [3] * num_reqs
    lens = np.full(num_reqs, 40)
    prefilling = np.array([prompt and row == 0 for row in range(num_reqs)])
    return types.SimpleNamespace(
        req_ids=[f"request {row}" for row in range(num_reqs)], num_reqs=num_reqs, num_tokens=sum(lengths),
        idx_mapping=torch.empty(num_reqs, dtype=torch.int64, device=DEVICE),
        input_ids=torch.empty(sum(lengths), dtype=torch.int32, device=DEVICE),
        positions=torch.empty(sum(lengths), dtype=torch.int64, device=DEVICE),
        query_start_loc=torch.empty(num_reqs + 1, dtype=torch.int32, device=DEVICE),
        query_start_loc_np=np.array([0, *np.cumsum(lengths)], np.int32),
        seq_lens=torch.empty(num_reqs, dtype=torch.int32, device=DEVICE), seq_lens_cpu_upper_bound=HostNumbers(lens),
        is_prefilling_np=prefilling, num_computed_prefill_tokens_np=np.full(num_reqs, 20),
        num_scheduled_tokens=np.array(lengths), prefill_len_np=np.full(num_reqs, 30),
    )  # fmt: skip


def _propose(speculator: Any, batch: Any) -> None:
    numbers = (torch.empty(batch.num_reqs, dtype=torch.int32, device=DEVICE) for _ in range(2))
    last = torch.empty(4, 1, dtype=torch.int64, device=DEVICE)
    temperature, seeds = torch.empty(4, device=DEVICE), torch.empty(4, dtype=torch.int64, device=DEVICE)
    with NoWaits():
        speculator.propose(batch, {}, {}, None, None, *numbers, last, None, temperature, seeds)


def _play(speculator: Any) -> None:
    """The capture, then rounds of several batch sizes, with and without a prompt."""
    with NoWaits():
        speculator.graphs.capture()
    for num_reqs in (1, 3, 4, 2, 4, 1, 3):
        _propose(speculator, _batch(num_reqs))
    if speculator.cost_aware is None:  # reading up waits once, to learn how much there is to read
        _propose(speculator, _batch(3, prompt=True))


RULES: list[dict[str, Any]] = [
    {"rule": "fixed"}, {"rule": "confidence", "threshold": 0.5}, {"rule": "entropy", "threshold": 0.5},
    {"rule": "cost_aware"},
]  # fmt: skip


def _let(speculator: Any, draft: bool, ran: int = 1) -> None:
    """Under the cost-aware rule everybody drafts, or nobody does; and behind each draft of before there was a run."""
    if speculator.cost_aware is None:
        return
    if speculator.runs is not None:  # who took a run: waits for the round before, ahead of a target's pass
        speculator.log.ran = lambda: dict.fromkeys(speculator.runs._names, (1, ran))
    speculator.cost_aware.rule._random = types.SimpleNamespace(
        integers=lambda low, high, size: np.full(size, K * draft), random=lambda size=None: np.zeros(size or 1)
    )


@pytest.mark.parametrize("options", RULES, ids=lambda o: o["rule"])
def test_waits_for_nothing(on_device, options):
    speculator = on_device(**options)
    _let(speculator, draft=True)  # whoever drafts nothing has to be read up later
    _play(speculator)
    assert {kind for kind, _ in speculator.graphs._backend.epochs.replayed} == {"draft"}


def test_waits_are_needed_without_graphs(on_device):
    """The test's power: the eager loop asks after each pass, and is seen to."""
    speculator = on_device(rule="confidence", threshold=0.5)
    speculator.graphs = None
    with pytest.raises(WAITS):
        _propose(speculator, _batch(2))


DRAFT_MODEL = {"rule": "cost_aware", "sources": ["draft_model"]}


@pytest.mark.parametrize(
    ("options", "drafts", "most"),
    [({"rule": "fixed"}, True, 43), ({"rule": "cost_aware"}, True, 74), ({"rule": "cost_aware"}, False, 67),
     (DRAFT_MODEL, True, 51), (DRAFT_MODEL, False, 40)],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else str(x),
)  # fmt: skip
def test_launches_outside_the_graphs(on_device, monkeypatch, options, drafts, most):
    from triton.runtime.interpreter import InterpretedFunction

    kernels: list[Any] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, **__: kernels.append(self))
    speculator = on_device(**options)
    speculator.graphs.capture()
    _let(speculator, drafts, ran=0)
    for _ in range(2):
        _propose(speculator, _batch(3))
    kernels.clear()
    with Launches() as launches:
        _propose(speculator, _batch(3))
    assert launches.num + len(kernels) <= most


def _mask(speculator: Any) -> None:
    load, state = speculator._load_candidates, speculator.round
    speculator._load_candidates = lambda n: (load(n), speculator.draft_tokens[state.running > 0])


def _item(speculator: Any) -> None:
    stage = speculator._stage_short
    speculator._stage_short = lambda batch, *args: (stage(batch, *args), int(batch.query_start_loc[-1]))


def _to_host(speculator: Any) -> None:
    note = speculator._note
    speculator._note = lambda *args: (note(*args), speculator.round.lengths.cpu())


def _from_host(speculator: Any) -> None:
    start = speculator.round.start
    speculator.round.start = lambda n, *args: (start(n, *args), speculator.round.limits[:n, 0].copy_(torch.ones(n)))


@pytest.mark.parametrize("bug", [_mask, _item, _to_host, _from_host])
def test_waits_that_are_planted_are_noticed(on_device, bug):
    with pytest.raises(WAITS):
        _play(on_device(bug, rule="confidence", threshold=0.5))
