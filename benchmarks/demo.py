# SPDX-License-Identifier: Apache-2.0
"""See a 1.5B model answer faster, with the same text: speculation off, vLLM's draft_model at its best K, specdecpp.

    python -m benchmarks.demo [--minutes 5] [--compile]

Shrinks the draft to int8 first. Needs about 12 GB of memory and, at the first start, 2 GB of downloads. Measures for
five minutes, whatever the machine; a slow one gets shorter answers. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.engines import Engines, EngineSettings, Generation
from benchmarks.common.methods import NATIVE, OFF, Method, rotated
from benchmarks.common.records import Row
from benchmarks.models.fetch import fetch, models_folder
from benchmarks.serve.render import has_colour, round_line
from vllm_specdecpp.provenance import cpu_flags, hardware, model_revision, shrinking
from vllm_specdecpp.shrink.schemes import VNNI, default_scheme, missing_kernel
from vllm_specdecpp.training.collect.stop_signal import ends_with_children

TARGET, DRAFT = "qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"
FIXED_KS = (2, 4, 6)
FEWEST_TOKENS, MOST_TOKENS = 24, 96
"""Of an answer: as many as let every prompt be answered by every method in time."""
WARM_UP_TOKENS = 12
KEPT_ROUNDS = 10_000
OURS = Method("cost_aware")  # the default rule
NATIVES = [Method(NATIVE, (("K", k),)) for k in FIXED_KS]
METHODS = [Method(OFF), *NATIVES, OURS]
Results = dict[Method, list[Generation]]


def say(text: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(text, file=sys.stderr, flush=True)


def load_prompts() -> list[Row]:
    """The bundled prompts: every other one is code to edit or to continue."""
    return [json.loads(line) for line in Path(__file__).with_name("prompts.jsonl").read_text("utf-8").splitlines()]


def machine() -> str:
    """What matters here of the machine, in one line."""
    import torch

    if torch.cuda.is_available():
        return f"machine: {hardware()}"
    if flags := cpu_flags():
        named = {"bf16": {"avx512_bf16", "amx_bf16"}, "VNNI": VNNI, "AMX": {"amx_tile"}}
        has = [f"{name} {'yes' if flags & known else 'no'}" for name, known in named.items()]
        slow = "" if flags & named["bf16"] else "; without bf16 instructions the target is slow here"
        return f"machine: {hardware()}; {', '.join(has)}{slow}"
    return f"machine: {hardware()}"


def shrunk(draft: Path) -> Path:
    """The shrunk copy of the draft, made at the first call; the draft itself where that would be no faster.

    Raises:
        ValueError: there is another folder of its name, or the disk is full.
    """
    from vllm_specdecpp.shrink.command import shrink
    from vllm_specdecpp.shrink.options import ShrinkOptions

    if reason := missing_kernel(default_scheme()):
        say(f"the draft is not shrunk: {reason}")
        return draft
    folder = models_folder() / f"{draft.name}-shrunk"
    if not folder.exists():
        shrink(ShrinkOptions(draft=str(draft), out=folder))
    elif shrinking(folder).get("source_revision") != model_revision(draft):
        raise ValueError(f"{folder} is no shrunk copy of {draft.name}: move it away")
    return folder


def rate(results: list[Generation]) -> float:
    """Tokens per second over all prompts."""
    return sum(result.num_tokens for result in results) / sum(result.seconds for result in results)


def measure(
    engines: Engines, prompts: list[Row], minutes: float, clock: Callable[[], float] = time.monotonic
) -> tuple[Results, list[list[Row]]]:
    """All methods on each prompt before the next one, while there is time; also our method's rounds, a list a prompt.

    A prompt that not every method could answer in time does not count, unless it is the first.
    """
    results: Results = {method: [] for method in METHODS}
    rounds: list[list[Row]] = []
    start = clock()
    say("warm-up ...")
    for method in METHODS:
        engines.generate(method, [engines.encode("Count to thirty.")], WARM_UP_TOKENS, 0.0)
    engines.spec_rpc("specdecpp_rounds", clear=True)
    end, warm_up = start + 60 * minutes, clock() - start
    # The warm-up's own speed: as many tokens as the time that is left has room for.
    room = WARM_UP_TOKENS * (end - clock()) / max(warm_up * len(prompts), 1e-9)
    max_tokens = int(min(max(room, FEWEST_TOKENS), MOST_TOKENS))
    say(f"answers of up to {max_tokens} tokens")
    longest = 0.0
    for number, prompt in enumerate(prompts):
        encoded = engines.encode(prompt["prompt"])
        found: dict[Method, Generation] = {}
        for method in rotated(METHODS, number):
            if rounds and end - clock() < longest:
                return results, rounds
            found[method] = result = engines.generate(method, [encoded], max_tokens, 0.0)
            if method == OURS:
                ours = engines.spec_rpc("specdecpp_rounds", clear=True)
            longest = max(longest, result.seconds)
            speed, left = result.num_tokens / result.seconds, max(end - clock(), 0.0)
            place = f"prompt {number + 1}/{len(prompts)}"
            say(f"{place}  {name(method):28} {speed:5.1f} tokens/s   at most {left // 60:.0f}:{left % 60:02.0f} left")
        for method, result in found.items():
            results[method].append(result)
        rounds.append(ours)
    return results, rounds


def name(method: Method) -> str:
    """What the user sees."""
    return f"specdecpp ({method.name})" if method.is_rule else method.label


def difference(off: list[int], ours: list[int]) -> str:
    """Says whether two outputs are the same, and if not, from which token on they differ (counted from 1)."""
    if off == ours:
        return "same output as without speculation"
    first = next((i for i, (a, b) in enumerate(zip(off, ours, strict=False)) if a != b), min(len(off), len(ours)))
    return f"output differs from speculation off from token {first + 1} on"


def show_texts(engines: Engines, prompts: list[Row], results: Results, rounds: list[list[Row]]) -> None:
    """Each answer once, and below it the rounds in which specdecpp wrote it."""
    colour = has_colour()
    for prompt, result, off, rows in zip(
        prompts[: len(rounds)], results[OURS], results[Method(OFF)], rounds, strict=True
    ):
        print(f"\n=== {prompt['prompt']}\n\n{off.texts[0]}\n")
        same = difference(off.token_ids[0], result.token_ids[0])
        # The first token comes from the prompt's own pass, before any round.
        print(f"--- rounds of specdecpp: accepted, ~rejected~, +the target's own token ({same})")
        first = {"candidates": [], "accepted": 0, "next_token": result.token_ids[0][0]}
        for number, row in enumerate([first, *rows]):
            print(round_line(number, row, engines.decode, colour))


def summary(results: Results, num_prompts: int) -> tuple[str, Row]:
    """The table, and the object of the last line."""
    best = max(NATIVES, key=lambda method: rate(results[method]))
    off, native, ours = (rate(results[method]) for method in (Method(OFF), best, OURS))
    counters = [result.counters for result in results[OURS]]
    num_rounds = sum(counter["rounds"] for counter in counters)
    length = sum(counter["candidates"] for counter in counters) / num_rounds if num_rounds else 0.0
    outputs = [[result.token_ids for result in results[method]] for method in (Method(OFF), best, OURS)]
    lines = [
        "",
        "                                       tokens/s   over off",
        f"speculation off                        {off:8.2f}      1.00",
        f"vLLM draft_model, best fixed K = {best.fixed_k}     {native:8.2f}    {native / off:6.2f}",
        f"{name(OURS):38} {ours:8.2f}    {ours / off:6.2f}",
        "",
        f"specdecpp over the best fixed K: {ours / native:.2f}; mean candidate length {length:.2f}",
        "all fixed K: " + ", ".join(f"K={method.fixed_k} {rate(results[method]):.2f}" for method in NATIVES),
    ]
    result: Row = {
        "tokens_per_second": {"off": round(off, 3), "draft_model": round(native, 3), "specdecpp": round(ours, 3)},
        "best_fixed_k": best.fixed_k,
        "mean_candidate_length": round(length, 3),
        "outputs_equal": outputs[0] == outputs[1] == outputs[2],
        "prompts": num_prompts,
    }
    return "\n".join(lines), result


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of measuring, once the engines are up")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: minutes more to start, about 9 %% faster"
    )
    args = parser.parse_args(argv)
    try:
        return _main(args)
    except ValueError as error:
        print(f"benchmarks.demo: {str(error).removeprefix('specdecpp: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.demo: interrupted", file=sys.stderr)
        return 130


def _main(args: argparse.Namespace) -> int:
    if not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes} must be above 0")
    prompts = load_prompts()
    # Both are read when vLLM is first imported, here and in the engines' processes.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    start = time.monotonic()
    say(machine())
    target, draft = fetch(TARGET), shrunk(fetch(DRAFT))
    settings = EngineSettings(str(target), str(draft), eager=not args.compile, trace_rounds=KEPT_ROUNDS)
    engines = Engines(settings, METHODS, say)
    with ends_with_children():
        try:
            engines.start()
            results, rounds = measure(engines, prompts, args.minutes)
            show_texts(engines, prompts, results, rounds)
        finally:
            engines.close()
    table, result = summary(results, len(rounds))
    say(f"done after {(time.monotonic() - start) / 60:.1f} min")
    print(f"{machine()}; {len(rounds)} prompts of {len(prompts)}")
    print(table)
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
