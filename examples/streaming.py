# SPDX-License-Identifier: Apache-2.0
"""Stream an answer from a specdecpp server. Start the server first, in another terminal:

    vllm serve Qwen/Qwen2.5-Coder-1.5B-Instruct --speculative-config specdecpp --max-model-len 1024 \
        --dtype bfloat16 --kv-cache-memory-bytes 1073741824    # the last two options on a CPU
    python examples/streaming.py [http://localhost:8000/v1]

Each round's accepted tokens arrive together.
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main() -> None:
    client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1", api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Explain binary search, then show it in Python."}],
        temperature=0.0,
        max_tokens=200,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
