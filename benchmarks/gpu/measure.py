# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own: ``python -m benchmarks.gpu.measure JOB``; the last line is its JSON result.

An engine that does not start, or a capture that fails, costs its own row and no other.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

PROMPT_TOKENS = 128


def _engine(job: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        model=job["target"], load_format="dummy", skip_tokenizer_init=True, max_model_len=2048,
        max_num_seqs=max(job["batches"]), enable_prefix_caching=False, disable_log_stats=False, seed=0,
        speculative_config=job["speculative_config"],
    )  # fmt: skip


def _generate(llm: Any, batch: int, num_tokens: int) -> float:
    """Seconds that ``batch`` requests of ``num_tokens`` tokens each take."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 + 10 for j in range(PROMPT_TOKENS)]} for i in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def draft_rounds(job: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a draft round on the device, and host waits in it, at each batch size.

    The engine runs in this process, so that its speculator can be timed by events around ``propose``.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch

    from vllm_specdecpp.engine.v2 import graphs

    if (mode := job.get("mode")) is not None:
        graphs.choose_mode = lambda **_: (mode, "asked for by the benchmark")
    llm = _engine(job)
    speculator = llm.llm_engine.model_executor.driver_worker.worker.model_runner.speculator
    if mode not in (None, graphs.EAGER) and speculator.graphs is None:
        raise RuntimeError(f"mode {mode} was not captured")
    timed: list[tuple[Any, Any]] = []
    propose: Callable[..., Any] = speculator.propose

    def between_events(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = propose(input_batch, *args, **kwargs)
        end.record()
        if not input_batch.is_prefilling_np.any():
            timed.append((start, end))
        return result

    speculator.propose = between_events
    rows = []
    for batch in job["batches"]:
        _generate(llm, batch, 24)
        timed.clear()
        _generate(llm, batch, 96)
        torch.cuda.synchronize()
        rounds = [start.elapsed_time(end) for start, end in timed]
        waits = _host_waits(llm, speculator, propose, between_events, batch)
        rows.append({"batch": batch, "rounds": len(rounds), "ms": statistics.median(rounds), "host_waits": waits})
    how = () if mode is None else speculator.how_rounds_run()  # the captured ones say how many there are
    return {"rows": rows, "ran": list(how)}


def _host_waits(llm: Any, speculator: Any, propose: Any, timed_propose: Any, batch: int) -> float:
    """Calls that wait for the device, a draft round: those of CUDA's own sync debug mode, which leaves out waits for
    events, and these."""
    import torch

    counts: list[int] = []
    wait, waits = torch.cuda.Event.synchronize, [0]

    def counted(self: Any) -> None:
        waits[0] += 1
        wait(self)

    def watched(*args: Any, **kwargs: Any) -> Any:
        waits[0] = 0
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return propose(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                counts.append(waits[0] + sum("synchroniz" in str(w.message) for w in found))

    event: Any = torch.cuda.Event
    speculator.propose, event.synchronize = watched, counted
    try:
        _generate(llm, batch, 32)
    finally:
        speculator.propose, event.synchronize = timed_propose, wait
    return statistics.median(counts)


if __name__ == "__main__":
    print(json.dumps(draft_rounds(json.loads(sys.argv[1]))))
