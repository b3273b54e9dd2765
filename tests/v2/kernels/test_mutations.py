# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in the kernels' sources: each must fail the comparison that the other tests make.

A mutant is a copy of the package with one piece of text replaced, imported under another name.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.v2.kernels import cost_aware_cases, device_cases, logits_cases, runs_cases, threshold_cases
from tests.v2.kernels.element_guard import OutOfBounds

KERNELS = Path(__file__).resolve().parents[3] / "kernels"


def _threshold(mutant: ModuleType) -> None:
    for case in threshold_cases.CASES:
        threshold_cases.check_rounds(mutant.threshold_tail, case)


def _cost_aware(mutant: ModuleType) -> None:
    cost_aware_cases.check_small(mutant.cost_aware_tail)


def _device(mutant: ModuleType) -> None:
    for check in device_cases.CHECKS:
        check(mutant)


def _logits(mutant: ModuleType) -> None:
    for case in logits_cases.CASES:
        logits_cases.check(mutant.logits_summary, case, seeds=1)


def _matches(mutant: ModuleType) -> None:
    runs_cases.check_matches(mutant.suffix_match)


def _others(mutant: ModuleType) -> None:
    runs_cases.check_others(mutant.match_others)


def _runs(mutant: ModuleType) -> None:
    runs_cases.check_behind(mutant.behind_drafts)  # first: its cases are small
    runs_cases.check_takes(mutant.take_runs)


def _rows(mutant: ModuleType) -> None:
    runs_cases.check_rows(mutant.one_hot_rows)


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "threshold_tail": _threshold, "cost_aware_tail": _cost_aware, "cost_aware_device": _device,
    "logits_summary": _logits, "suffix_match": _matches, "suffix_cache": _others, "one_hot_rows": _rows,
    "runs": _runs,
}  # fmt: skip
MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "threshold_tail": [
        ("inside = reqs < num_reqs", "inside = reqs <= num_reqs"),
        ("for start in range(0, num_reqs, BLOCK_REQS)", "for start in range(0, num_reqs - 1, BLOCK_REQS)"),
        ("1.0 - survival > threshold", "1.0 - survival >= threshold"),
        ("tl.minimum(tl.maximum(score, 0.0), 1.0), 0.0)", "tl.minimum(tl.maximum(score, 0.0), 1.0), 1.0)"),
        ("tl.minimum(tl.maximum(score, 0.0), 1.0), 0.0)", "tl.maximum(score, 0.0), 0.0)"),
        ("tl.minimum(tl.maximum(score, 0.0), 1.0), 0.0)", "tl.minimum(score, 1.0), 0.0)"),
        ("survival = tl.where(running, survival * score, survival)", "survival = survival * score"),
        ("if SCORED:", "if True:"),
        ("> threshold) & (step >= min_length)\n\n", "> threshold) & (step > min_length)\n\n"),
        ("running & (lengths < max_lengths)", "running & (lengths <= max_lengths)"),
        ("other=0) + running.to(tl.int32)", "other=0) + 1"),
        ("* draft_stride + (step - 1)", "* draft_stride + step"),
        ("tl.where(running, token_ids, -1), mask", "token_ids, mask"),
        ("(ends == 0)", "(ends == ends)"),
        ("any_running |= tl.max(go_on, axis=0)", "any_running = tl.max(go_on, axis=0)"),
    ],
    "stop_tokens": [
        ("& (columns < num_stop)[None, :]", ""),
        ("range(0, num_stop, BLOCK_STOP)", "range(0, min(num_stop, BLOCK_STOP), BLOCK_STOP)"),
        ("ends |= tl.max", "ends = tl.max"),
    ],
    "cost_aware_device": [
        ("& (number <= reqs[None, :])", "& (number < reqs[None, :])"),
        ("first = (others == values[None, :]) & (number <= reqs[None, :])", "first = others == values[None, :]"),
        ("tl.where(members, values, -1.0)", "values"),
        ("range(0, tl.cdiv(num_reqs, BLOCK_RANK))", "range(0, num_reqs // BLOCK_RANK)"),
        ("+ beyond * slope", ""),
        ("tl.load(means_ptr + position + 1)", "tl.load(means_ptr + position)"),
        ("tl.load(drift_ptr + position)", "tl.load(drift_ptr + position + 1)"),
        ("    log_odds += levels\n", ""),
        ("tl.minimum(tl.maximum(expected, -MAX_LOG_ODDS), MAX_LOG_ODDS)", "expected"),
    ],
    "cost_aware_tail": [
        ("position = step - LAG", "position = step"),
        ("- lengths - 1", "- lengths"),
        ("running & (position > 0), survival * accept", "running, survival * accept"),
        ("position + LAG + ahead - 1", "position + ahead - 1"),
        ("running & (ahead <= longest)", "running"),
        ("tl.where(running, room, 0)", "tl.where(running, room, 9)"),
        ("verify_size, num_tokens + num_running)", "verify_size, num_tokens)"),
        ("value += tl.where(ahead <= room, product, 0.0)", "value += product"),
        ("price * (ahead * tl.load(", "price * (tl.load("),
        ("chosen = chosen & (room > 0)", "chosen = chosen & (room > -1)"),
        ("counts, 0), axis=0)\n        better", "counts, 0), axis=0) - 1\n        better"),
        ("| ((top == best_gain) & (count > best_count))", ""),
        ("base = num_tokens + tl.sum(chosen.to(tl.int32), axis=0)", "base = num_tokens"),
        ("stops = running & (chosen == 0)", "stops = running"),
        ("tl.maximum(tl.max(gain, axis=0), 0.0)", "tl.max(gain, axis=0)"),
        ("tl.where(submits, reach, 0.0)", "reach"),
        ("lengths + submits.to(tl.int32)", "lengths + running.to(tl.int32)"),
        ("tl.where(submits, token_ids, -1), mask", "tl.where(running, token_ids, -1), mask"),
    ],
    "logits_summary": [
        ('columns < vocab_size, other=float("-inf")', "columns < vocab_size, other=0.0"),
        ("mask=columns < vocab_size", "mask=columns <= vocab_size"),
        ('tl.where(columns == index, float("-inf"), x)', 'tl.where(x == largest, float("-inf"), x)'),
        ("axis=0), vocab_size - 1)", "axis=0), vocab_size)"),
        ("(weighted + shift * sums) * scale", "weighted * scale"),
        ("0.0, sums * scale)", "0.0, sums)"),
        ("empty = (sums == 0) & (largest > float(\"-inf\"))", "empty = sums < 0"),
        ("tl.where(parts == winner, seconds, larges)", 'tl.where(parts == winner, float("-inf"), larges)'),
        ("tl.log(z) - t / z", "tl.log(z) - t"),
    ],
    "suffix_cache": [
        ("total_lens_ptr + other) - 1", "total_lens_ptr + other)"),
        ("first = tl.load(prompt_lens_ptr + other)", "first = 0"),
        (" & (state != other)", ""),
        ("(tl.load(limits_ptr + req) > 0)", "(state >= 0)"),
        ("(end - least + BLOCK - 1) // BLOCK", "(end - least) // BLOCK"),
        ("same = where < end", "same = where <= end"),
        (" & (back <= last)", ""),
        ("same &= where >= first + back", "same &= where >= first"),
        ("tl.load(own + last - back)", "token"),
        ("latest + 1, place)", "latest, place)"),
        ("tl.maximum(first, end - MOST)", "first"),
        ("while (back < MAX_MATCH)", "while (back <= MAX_MATCH)"),
    ],
    "suffix_match": [
        ("tl.where(asked, tl.load(last_ptr + req), 0)", "tl.load(last_ptr + req)"),
        ("inside = where < last", "inside = where <= last"),
        ("(last + BLOCK - 1) // BLOCK", "last // BLOCK"),
        ("+ ones <= LATEST", "<= LATEST"),
        ("num_places += total", "num_places = total"),
        ("& (best < MAX_MATCH) &", "& (best < 1) &"),
        ("while (back < MAX_MATCH)", "while (back <= MAX_MATCH)"),
        ("same &= where >= back\n", "same &= where > back\n"),
        ("tl.load(row + last - back)", "token"),
        ("+ ones <= PLACES", "<= PLACES"),
        ("(ones > 0) & (late == 0)", "ones < 0"),
        ("num_sure += total", "num_sure = total"),
        ("latest = tl.max(tl.where(lengths == longest, where, -1), axis=0)", "latest = start"),
        ("longest > best", "longest >= best"),
    ],
    "runs": [
        ("+ 1 - start, 1)", "- start, 1)"),
        ("steps + 1, BLOCK_STEPS)", "steps, BLOCK_STEPS)"),
        (" & (match > 0)", ""),
        ("run_odds_ptr + 2 + steps", "run_odds_ptr + 1 + steps"),
        ("odds += tl.load(run_shifts_ptr + req)", "odds += 0.0"),
        ("reach *= tl.load(survival_ptr + req)", "reach *= 1.0"),
        ("first + places + 1)", "first + places)"),
        ("tl.where(speeds == top, places + 1, num)", "tl.where(speeds == top, places, num)"),
        ("emitted += WORTH * tl.sum(chance", "emitted += 0 * tl.sum(chance"),
        ("(own + steps <= end)", "(own + steps < end)"),
        ("(best > 0) & ", ""),
        (" == BEHIND\n", " == 1\n"),
        ("mask=inside)\n        tl.store(accept", "mask=there)\n        tl.store(accept"),
        ("tl.where(steps == 0, tl.load", "tl.where(steps < 0, tl.load"),
        ("this_ptr + 1 + steps", "this_ptr + steps"),
        ("tl.load(widths_ptr + steps + lag,", "tl.load(widths_ptr + steps,"),
        ("tl.where(drafts, 0.0, own)", "own"),
        ("rows += tl.sum(length, axis=0)", "rows += 0"),
        ("last[:, None] + 1 + steps", "last[:, None] + steps"),
        ("drafts & ((ended == 0) | (end < 0))", "drafts"),
        ("drafts & ((ended == 0) | (end < 0))", "drafts & (ended == 0)"),
        ("(steps + lag).to", "steps.to"),
        ("accept, means[None, :])", "accept, 1.0)"),
        ("tl.where(drafted, accept, 1.0)", "accept"),
    ],
    "one_hot_rows": [
        ("token >= 0", "token > 0"),
        ("tl.load(states_ptr + req)", "req"),
        ("mask=columns < vocab_size", "mask=columns <= vocab_size"),
        ("columns == token", "columns == token + 1"),
        ('float("-inf")', "-9.0"),
        ("tl.program_id(2) * BLOCK_VOCAB", "0"),
        ("req * candidates_stride + step", "req * candidates_stride"),
    ],
}


def _mutants() -> list[Any]:
    return [
        pytest.param(name, old, new, id=f"{name}: {old} -> {new or 'nothing'}")
        for name, changes in MUTATIONS.items()
        for old, new in changes
    ]


def _load(folder: Path, name: str, old: str, new: str, package: str) -> dict[str, ModuleType]:
    """The launchers' modules of a copy of the package in which ``old``, which stands in one place, is ``new``."""
    shutil.copytree(KERNELS, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / package / f"{name}.py"
    source = path.read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {name}.py"
    path.write_text(source.replace(old, new))
    sys.path.insert(0, str(folder))
    try:
        return {of: importlib.import_module(f"{package}.{of}") for of in CHECKS}
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize(("name", "old", "new"), _mutants())
def test_planted_bug_is_caught(tmp_path: Path, request: pytest.FixtureRequest, name: str, old: str, new: str) -> None:
    package = f"mutant_{abs(hash(request.node.name))}"
    modules = _load(tmp_path, name, old, new, package)
    launcher = "threshold_tail" if name == "stop_tokens" else name
    with pytest.raises((AssertionError, OutOfBounds)):
        CHECKS[launcher](modules[launcher])
    for loaded in [m for m in sys.modules if m.partition(".")[0] == package]:
        del sys.modules[loaded]


def test_a_copy_without_a_bug_passes(tmp_path: Path) -> None:
    same = "inside = reqs < num_reqs"
    modules = _load(tmp_path, "threshold_tail", same, same, "mutant_without_a_bug")
    for name in ("threshold_tail", "one_hot_rows"):
        CHECKS[name](modules[name])
