# SPDX-License-Identifier: Apache-2.0
"""The environment of every test, and the fixtures of those that run vLLM.

vLLM runs in this process (no engine-core process), on one thread, in float32: the tests reach its proposer, and its
numbers are those of a plain Hugging Face model up to rounding.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path


def _cache_root() -> str:
    """An empty folder for vLLM's caches, in which measured costs are kept.

    What vLLM finds out about a class of models, in a process that takes ten seconds, goes beside it for the next time.
    """
    root = Path(tempfile.mkdtemp(prefix="specdecpp-cache-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    vllm = importlib.util.find_spec("vllm")
    if vllm is not None and vllm.origin:
        version = hashlib.sha256(Path(vllm.origin).with_name("_version.py").read_bytes()).hexdigest()[:12]
        infos = root.with_name(f"specdecpp-modelinfos-{version}")
        infos.mkdir(exist_ok=True)
        (root / "modelinfos").symlink_to(infos)
    return str(root)


os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CACHE_ROOT=_cache_root(),
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_V2_MODEL_RUNNER="0",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest  # noqa: E402

V2_TESTS = Path(__file__).parent / "v2"
LONG_FILES = {
    "test_cost_aware_robust", "test_free_runs", "test_lora", "test_lossless", "test_oracle", "test_parity",
    "test_ray_collect", "test_runs_only", "test_seeds", "test_server", "test_shrink", "test_simulate",
    "test_tensor_parallel", "test_v1_v2", "test_v2_features", "test_v2_lossless", "test_v2_plain_requests",
    "test_v2_runs_only", "test_v2_vocabulary",
}  # fmt: skip


def pytest_ignore_collect(collection_path, config):
    """Model Runner V2's tests need a process of their own (``make test-v2``): they run when they are named."""
    named = [Path(str(argument).split("::")[0]).resolve() for argument in config.args]
    if collection_path == V2_TESTS and not any(V2_TESTS in (path, *path.parents) for path in named):
        return True
    return None


def pytest_collection_modifyitems(items):
    """A worker takes whole files: those that last begin, so that the workers end together."""
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)


@pytest.fixture(scope="session")
def tiny():
    """Folders of the tiny checkpoints."""
    from tests import tiny_models

    return tiny_models.ensure()


@pytest.fixture(autouse=True, scope="module")
def kept_engine_ends():
    """With its module: what comes next may start an engine of its own."""
    from tests import engine_harness

    yield
    engine_harness.end_kept()


@pytest.fixture(scope="session")
def reference(tiny):
    """name → the checkpoint as the oracle's :class:`reference_loop.GreedyModel`, which remembers what it computed."""
    import functools

    import torch
    from transformers import AutoModelForCausalLM

    from tests.reference_loop import GreedyModel

    @functools.cache
    def load(name: str) -> GreedyModel:
        return GreedyModel(AutoModelForCausalLM.from_pretrained(getattr(tiny, name), dtype=torch.float32))

    return load


@pytest.fixture(scope="session")
def law(reference):
    """As :func:`exact_law.joint_law`, of the target with a small vocabulary."""
    import functools

    from tests.exact_law import joint_law

    return functools.partial(joint_law, reference("small_target").model)


@pytest.fixture(autouse=True)
def logs_reach_caplog(request, monkeypatch):
    """Once vLLM has started an engine, its loggers, of which ours is a child, keep to a level and a handler of their
    own."""
    if "unit" not in request.path.parts:  # an engine that the test starts
        monkeypatch.setattr("vllm.logger._configure_vllm_root_logger", lambda config: None)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    ours = logging.getLogger("vllm.specdecpp")
    level = ours.level
    ours.setLevel(logging.INFO)
    yield
    ours.setLevel(level)
