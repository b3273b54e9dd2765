# SPDX-License-Identifier: Apache-2.0
"""Generate for a batch of prompts with specdecpp: ``python examples/offline_batch.py [TARGET DRAFT]``."""

from __future__ import annotations

import sys

from vllm import LLM, SamplingParams

PROMPTS = ["Write a Python function that checks whether a number is prime.", "Explain recursion in three sentences."]


def main() -> None:
    target, draft = sys.argv[1:3] if len(sys.argv) > 2 else ("Qwen/Qwen2.5-Coder-1.5B-Instruct", None)
    # Without "model" the draft comes from the table of known pairs.
    speculative_config = {"method": "specdecpp"} | ({"model": draft} if draft else {})
    print("loading and timing both models: about a minute at the first start on a CPU, then less", flush=True)
    # A KV cache of a given size: on CPUs vLLM would want 92 % of the memory free.
    llm = LLM(
        model=target,
        speculative_config=speculative_config,
        dtype="bfloat16",
        max_model_len=1024,
        kv_cache_memory_bytes=2**30,
    )
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    for output in llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=128)):
        print(output.outputs[0].text, "\n---")
    stats = llm.collective_rpc("specdecpp_stats")[0]
    print(f"mean candidate length {stats['candidates'] / max(stats['rounds'], 1):.2f}, {stats['accepted']} accepted")


if __name__ == "__main__":
    main()
