# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own arithmetic and bookkeeping: methods, bootstrap, aggregation, resumable raw rows, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import demo, run
from benchmarks.engines import Engines, EngineSettings, Generation, restore_proposer
from benchmarks.methods import Method, parse_method, parse_methods, rotated
from benchmarks.provenance import command_line
from benchmarks.records import RawFile, load_prompts, make_units, output_hash, unit_id
from benchmarks.render import round_line
from benchmarks.report import main as report_main
from benchmarks.report import write_report
from benchmarks.stats import aggregate, rate, rate_ratio

SETTINGS = {"pair": "T + D", "temperature": 0.0, "batch": 1, "max_tokens": 128, "eager": True}
METHODS = ["off", "draft_model:K=2", "draft_model:K=4", "confidence"]
PROVENANCE = {"methods": METHODS, "command": "python -m benchmarks.run", "versions": {"vllm": "0"}, "git": "abc"}
# Seconds that 100 tokens take.
SECONDS = {"off": 20.0, "draft_model:K=2": 12.5, "draft_model:K=4": 10.0, "confidence": 8.0}
RESULT_KEYS = (
    "pair set temperature batch method tokens_per_second low high mean_candidate_length acceptance command versions git"
)


def raw_row(prompt: str, method: str, **changes: Any) -> dict[str, Any]:
    drafted = {"rounds": 0, "candidates": 0, "accepted": 0}
    if method != "off":
        drafted = {"rounds": 25, "candidates": 100, "accepted": 75}
    row = {"prompt": prompt, "set": prompt.split("-")[0], "method": method, "seconds": SECONDS[method], "tokens": 100}
    return {**row, **drafted, "output": "same", "equals_off": None} | changes


def all_rows() -> list[dict[str, Any]]:
    return [raw_row(f"{name}-{i}", method) for name in ("a", "b") for i in range(3) for method in METHODS]


# --- methods


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("off", "off"),
        ("draft_model:4", "draft_model:K=4"),
        ("draft_model:K=4", "draft_model:K=4"),
        ("confidence", "confidence"),
        ("confidence:num_speculative_tokens=12,threshold=0.60", "confidence:threshold=0.6,num_speculative_tokens=12"),
        ("fixed:num_speculative_tokens=4", "fixed:num_speculative_tokens=4"),
    ],
)
def test_a_method_is_read_and_written_canonically(text: str, label: str) -> None:
    assert parse_method(text).label == label
    assert parse_method(label) == parse_method(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draft_model", "needs its fixed K"),
        ("draft_model:0", "needs its fixed K"),
        ("draft_model:k=4", "unknown option 'k'"),
        ("off:K=4", "unknown option 'K'"),
        ("confidence:treshold=0.6", "takes threshold"),
        ("confidence:threshold=high", "is not a float"),
        ("confidence:threshold=0.5,threshold=0.6", "given twice"),
        ("confidence:", "write name"),
        ("", "write name"),
    ],
)
def test_a_bad_method_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)


def test_a_method_may_be_named_once_only() -> None:
    with pytest.raises(ValueError, match="draft_model:K=4' is given twice"):
        parse_methods(["draft_model:4", "off", "draft_model:K=4"])


def test_rotation_gives_each_method_each_place_once() -> None:
    methods = parse_methods(["off", "draft_model:2", "confidence"])
    orders = [rotated(methods, turn) for turn in range(3)]
    assert all({order[place] for order in orders} == set(methods) for place in range(3))


# --- statistics


def test_rate_is_total_tokens_over_total_seconds() -> None:
    assert rate(np.array([100.0, 10.0]), np.array([10.0, 10.0])).value == pytest.approx(5.5)
    assert rate(np.array([100.0, 10.0]), np.array([10.0, 2.0])).value == pytest.approx(110 / 12)


def test_bootstrap_interval_of_the_mean_of_known_numbers() -> None:
    """With equal seconds the rate is a mean: its 95 % interval is close to mean ± 1.96 sd/sqrt(n)."""
    tokens = np.random.default_rng(1).normal(100.0, 10.0, size=400)
    spread = rate(tokens, np.ones(400))
    half = 1.96 * tokens.std() / 20
    # 4000 resamples put the ends within about 5 % of the half-width; 15 % leaves room.
    assert spread.low == pytest.approx(tokens.mean() - half, abs=0.15 * half)
    assert spread.high == pytest.approx(tokens.mean() + half, abs=0.15 * half)


def test_a_paired_ratio_does_not_spread_with_the_prompts() -> None:
    """Prompts differ by a factor of five, the ratio is 2 on each of them: the pairing must leave no spread."""
    seconds = np.linspace(1.0, 5.0, 20)
    tokens = np.full(20, 100.0)
    spread = rate_ratio(tokens, seconds, tokens, 2 * seconds)
    assert (spread.value, spread.low, spread.high) == pytest.approx((2.0, 2.0, 2.0))
    assert rate(tokens, seconds).high - rate(tokens, seconds).low > 1.0


def test_aggregate_known_numbers() -> None:
    cells = {(cell.set, cell.method): cell for cell in aggregate(all_rows(), METHODS)}
    assert {name for name, _ in cells} == {"a", "b", "all"}
    ours = cells["all", "confidence"]
    assert ours.units == 6
    assert ours.tokens_per_second.value == pytest.approx(12.5)
    assert ours.mean_candidate_length == pytest.approx(4.0)
    assert ours.acceptance == pytest.approx(0.75)
    assert ours.over_off is not None and ours.over_off.value == pytest.approx(2.5)
    assert ours.over_best_fixed_k is not None and ours.over_best_fixed_k.value == pytest.approx(1.25)
    assert ours.best_fixed_k == 4
    assert ours.equal_outputs == 6
    off = cells["a", "off"]
    assert (off.mean_candidate_length, off.acceptance, off.equal_outputs) == (None, None, None)


def test_best_fixed_k_is_chosen_for_each_set() -> None:
    rows = [r | {"seconds": 5.0} if (r["set"], r["method"]) == ("b", "draft_model:K=2") else r for r in all_rows()]
    best = {cell.set: cell.best_fixed_k for cell in aggregate(rows, METHODS)}
    assert (best["a"], best["b"]) == (4, 2)


def test_an_unfinished_prompt_is_left_out_for_every_method() -> None:
    rows = [*all_rows(), raw_row("a-9", "off", seconds=1000.0)]
    cells = {(cell.set, cell.method): cell for cell in aggregate(rows, METHODS)}
    assert cells["a", "off"].units == 3
    assert cells["a", "off"].tokens_per_second.value == pytest.approx(5.0)
    with pytest.raises(ValueError, match="no prompt was finished"):
        aggregate(rows[-1:], METHODS)


def test_equality_is_judged_by_hash_even_where_off_ran_last() -> None:
    rows = all_rows()
    rows = [r | {"output": "other"} if (r["prompt"], r["method"]) == ("a-1", "confidence") else r for r in rows]
    cells = {(cell.set, cell.method): cell for cell in aggregate(rows, METHODS)}
    assert cells["a", "confidence"].equal_outputs == 2
    assert cells["b", "confidence"].equal_outputs == 3


# --- prompts and raw rows


def write_prompts(folder: Path, name: str, count: int) -> None:
    lines = [json.dumps({"id": f"{name}-{i}", "set": name, "prompt": f"question {i}"}) for i in range(count)]
    (folder / f"eval_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_units_go_round_robin_over_the_sets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_prompts(tmp_path, name, 5)
    prompts = load_prompts(tmp_path, ["a", "b"], 5)
    assert [unit_id(unit) for unit in make_units(prompts, 1)][:4] == ["a-0", "b-0", "a-1", "b-1"]
    # A fifth prompt alone would be another batch size.
    assert [unit_id(unit) for unit in make_units(prompts, 2)] == ["a-0+a-1", "b-0+b-1", "a-2+a-3", "b-2+b-3"]


def test_missing_prompts_are_reported(tmp_path: Path) -> None:
    write_prompts(tmp_path, "a", 2)
    with pytest.raises(ValueError, match="holds only 2"):
        load_prompts(tmp_path, ["a"], 3)
    with pytest.raises(ValueError, match="has a$"):
        load_prompts(tmp_path, ["z"], 1)


def test_output_hash_sees_order_and_length() -> None:
    assert output_hash([[1, 2], [3]]) == output_hash([(1, 2), (3,)])
    assert len({output_hash(x) for x in ([[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]])}) == 3


def test_raw_rows_survive_a_kill_in_mid_line(tmp_path: Path) -> None:
    path = tmp_path / "x.raw.jsonl"
    raw = RawFile(path)
    raw.start_run(SETTINGS, PROVENANCE)
    raw.add(raw_row("a-0", "off"))
    before = path.read_bytes()
    path.write_bytes(before + b'{"prompt": "a-0", "meth')
    again = RawFile(path)
    again.start_run(SETTINGS, PROVENANCE)
    again.add(raw_row("a-0", "confidence"))
    assert path.read_bytes().startswith(before)
    assert RawFile(path).done() == {("a-0", "off"), ("a-0", "confidence")}
    assert [r["run"] for r in RawFile(path).runs] == [0, 1]


def test_raw_rows_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "x.raw.jsonl"
    RawFile(path).start_run(SETTINGS, PROVENANCE)
    with pytest.raises(ValueError, match="temperature=0.0, not 1.0"):
        RawFile(path).start_run({**SETTINGS, "temperature": 1.0}, PROVENANCE)


# --- the run's loop, with engines that only count


class FakeEngines(Engines):
    """Answers at once; an answer's tokens depend on the prompt only, so that every method agrees with off."""

    calls: list[tuple[str, int]] = []
    die_after: int | None = None

    def start(self) -> None:
        pass

    def encode(self, prompt: str) -> list[int]:
        return [ord(letter) for letter in prompt]

    def generate(self, method: Method, prompts: Any, max_tokens: int, *_: Any, **__: Any) -> Generation:
        if max_tokens == 8:  # the measured ones; warm-up asks for 24
            if FakeEngines.die_after == len(FakeEngines.calls):
                raise KeyboardInterrupt
            FakeEngines.calls.append((method.label, prompts[0][-1]))
        counters = (
            {"rounds": 2, "candidates": 6, "accepted": 4}
            if method.name != "off"
            else dict.fromkeys(("rounds", "candidates", "accepted"), 0)
        )
        return Generation([list(ids[-4:]) for ids in prompts], 0.5, counters)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("a", "b"):
        write_prompts(tmp_path, name, 3)
    FakeEngines.calls, FakeEngines.die_after = [], None
    monkeypatch.setattr(run, "Engines", FakeEngines)
    parts = ["--pair", "T", "D", "--data", str(tmp_path), "--sets", "a", "b", "--prompts", "3", "--max-tokens", "8"]
    return [*parts, "--methods", "off", "draft_model:2", "confidence", "--out", str(tmp_path / "x.jsonl")]


def test_a_run_writes_rows_with_the_agreed_keys(command: list[str], tmp_path: Path) -> None:
    assert run.main(command) == 0
    assert len(FakeEngines.calls) == 2 * 3 * 3
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [RESULT_KEYS.split()] * (3 * 3)
    assert rows[-1]["mean_candidate_length"] == 3.0 and rows[-1]["set"] == "all"
    table = (tmp_path / "x.md").read_text()
    assert "| all | confidence | 6 | 8.00 [8.00, 8.00] | 1.00 [1.00, 1.00] |" in table
    assert "| 6/6 |" in table
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_where_it_stopped(command: list[str], tmp_path: Path) -> None:
    FakeEngines.die_after = 5
    assert run.main(command) == 130
    first = list(FakeEngines.calls)
    assert len(RawFile(tmp_path / "x.raw.jsonl").rows) == 5
    assert not (tmp_path / "x.jsonl").exists()
    FakeEngines.die_after = None
    assert run.main(command) == 0
    assert FakeEngines.calls[:5] == first
    assert len(RawFile(tmp_path / "x.raw.jsonl").rows) == len(RawFile(tmp_path / "x.raw.jsonl").done()) == 18


def test_a_finished_run_is_not_overwritten(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(command) == 0
    before = (tmp_path / "x.raw.jsonl").read_bytes()
    assert run.main(command) == 2
    assert "pass --force" in capsys.readouterr().err
    assert run.main([*command, "--force"]) == 0
    assert len(FakeEngines.calls) == 18  # nothing is measured twice
    assert (tmp_path / "x.raw.jsonl").read_bytes().startswith(before)


def test_a_time_budget_stops_between_prompts(command: list[str], tmp_path: Path) -> None:
    assert run.main([*command, "--minutes", "0.01"]) == 0  # 0.6 s; a prompt "takes" 3 * 0.5 s
    assert len(RawFile(tmp_path / "x.raw.jsonl").rows) == 3
    assert not (tmp_path / "x.jsonl").exists()
    assert report_main([str(tmp_path / "x.raw.jsonl"), "--out", str(tmp_path / "x.jsonl")]) == 0
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 2 * 3


def test_more_prompts_can_be_added_later(command: list[str], tmp_path: Path) -> None:
    fewer = [{"3": "2"}.get(part, part) for part in command]
    assert run.main(fewer) == 0
    assert run.main([*command, "--force"]) == 0
    assert len(FakeEngines.calls) == 18


def test_too_long_a_prompt_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*command, "--max-model-len", "30"]) == 2
    assert "--max-model-len 30: a-0 needs 38" in capsys.readouterr().err


def test_a_report_needs_rows(tmp_path: Path) -> None:
    raw = RawFile(tmp_path / "x.raw.jsonl")
    with pytest.raises(ValueError, match="holds no run"):
        write_report(raw, tmp_path / "x.jsonl")


# --- the rest


def test_the_proposer_is_vllms_own_and_comes_back() -> None:
    from benchmarks.engines import use_native_proposer, use_padding

    draft_model = pytest.importorskip("vllm.v1.spec_decode.draft_model")

    class Ours(draft_model.DraftModelProposer):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.weights = object()

        def propose(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("our propose ran")

        def _sample_draft_tokens(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("our sampling ran")

    class Runner:
        def __init__(self) -> None:
            self.drafter: Any = Ours()

        def _determine_batch_execution_and_padding(self) -> str:
            return "vLLM's"

    class Worker:
        model_runner = Runner()

    worker, ours = Worker(), Worker.model_runner.drafter
    worker.model_runner._determine_batch_execution_and_padding = lambda: "ours"  # type: ignore[method-assign]
    for k in (2, 4):
        use_native_proposer(worker, k)
        assert worker.model_runner._determine_batch_execution_and_padding() == "vLLM's"
        native = worker.model_runner.drafter
        assert native.weights is ours.weights and not isinstance(native, Ours)
        assert type(native)._sample_draft_tokens is draft_model.DraftModelProposer._sample_draft_tokens
        # vLLM's propose notes the K it was given before it fails on our missing arguments.
        with pytest.raises(AttributeError):
            native.propose(20, *[None] * 7)
        assert ours.num_speculative_tokens == k
    restore_proposer(worker)
    assert worker.model_runner.drafter is ours
    assert worker.model_runner._determine_batch_execution_and_padding() == "ours"
    use_padding(worker, False)
    use_padding(worker, False)
    assert worker.model_runner._determine_batch_execution_and_padding() == "vLLM's"
    restore_proposer(worker)
    assert worker.model_runner._determine_batch_execution_and_padding() == "ours"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("draft_model:8", "raise --max-candidates"),
        ("confidence:num_speculative_tokens=8", "raise --max-candidates"),
        ("confidense", "rule='confidense' must be one of"),
        ("confidence:threshold=1.5", "strictly between 0 and 1"),
        ("threshold", "needs an acceptance head"),
        ("fixed:threshold=0.5", "no meaning with rule='fixed'"),
    ],
)
def test_a_method_that_cannot_run_is_refused_before_the_engine_starts(method: str, message: str) -> None:
    settings = EngineSettings("T", "D", num_speculative_tokens=4)
    with pytest.raises(ValueError, match=message):
        Engines(settings, [parse_method(method)]).start()
    good = ["off", "draft_model:4", "confidence:num_speculative_tokens=4,min_speculative_tokens=2", "fixed", "entropy"]
    Engines(settings, parse_methods(good)).check()


def test_the_command_line_holds_no_machine_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "repo").mkdir()
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.chdir(tmp_path / "repo")
    argv = ["--pair", str(tmp_path / "home/m 1"), "org/draft", "--data", str(tmp_path / "data")]
    expected = "python -m benchmarks.run --pair ~/'m 1' org/draft --data ../data"
    assert command_line(argv, "benchmarks.run") == expected


def test_round_line_shows_accepted_rejected_and_own_token() -> None:
    def decode(ids: Any) -> str:
        return "".join(chr(i) for i in ids)

    row = {"candidates": [ord(c) for c in "ab\nd"], "accepted": 2, "next_token": ord("x")}
    assert round_line(7, row, decode, colour=False) == "   7   2 of  4 accepted  |ab~\\nd~+x|"
    assert "\033[32mab\033[0m" in round_line(7, row, decode, colour=True)
    assert "~" not in round_line(1, {**row, "accepted": 4}, decode, colour=False)


def test_demo_summary_has_the_agreed_object() -> None:
    def answers(seconds: float, ids: list[int]) -> list[Generation]:
        return [Generation([ids], seconds, {"rounds": 2, "candidates": 7, "accepted": 5})] * 2

    results = {method: answers(1.0, [1, 2, 3, 4]) for method in demo.METHODS}
    results[Method("off")] = answers(2.0, [1, 2, 3, 4])
    results[parse_method("draft_model:6")] = answers(0.8, [1, 2, 3, 4])
    results[demo.OURS] = answers(0.5, [1, 2, 3, 4])
    table, last = demo.summary(results, 2)
    assert last == {
        "tokens_per_second": {"off": 2.0, "draft_model": 5.0, "specdecpp": 8.0},
        "best_fixed_k": 6,
        "mean_candidate_length": 3.5,
        "outputs_equal": True,
        "prompts": 2,
    }
    assert "specdecpp over the best fixed K: 1.60" in table
    results[demo.OURS] = answers(0.5, [1, 2, 3, 5])
    assert demo.summary(results, 2)[1]["outputs_equal"] is False


def test_demo_prompts_are_there() -> None:
    prompts = demo.load_prompts(6)
    assert {prompt["set"] for prompt in prompts} == {"code", "chat", "maths"}
    with pytest.raises(ValueError, match="choose 1 to 6"):
        demo.load_prompts(7)


def test_demo_says_where_outputs_part() -> None:
    assert demo.difference([1, 2, 3], [1, 2, 3]).startswith("same")
    assert "from token 3 on" in demo.difference([1, 2, 3], [1, 2, 4])
    assert "from token 3 on" in demo.difference([1, 2, 3], [1, 2])
