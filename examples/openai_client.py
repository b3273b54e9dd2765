# SPDX-License-Identifier: Apache-2.0
"""Ask a specdecpp server through the OpenAI client. Start the server first, in another terminal:

    vllm serve Qwen/Qwen2.5-Coder-1.5B-Instruct --speculative-config specdecpp --max-model-len 1024 \
        --dtype bfloat16 --kv-cache-memory-bytes 1073741824    # the last two options on a CPU
    python examples/openai_client.py [http://localhost:8000/v1]

A pair of your own: --speculative-config '{"method": "specdecpp", "model": "DRAFT", "head": "DIR_OR_HUB_ID"}'.
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main() -> None:
    client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1", api_key="none")
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Write a Python function that checks whether a number is prime."}],
        temperature=0.0,
        max_tokens=128,
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
