# SPDX-License-Identifier: Apache-2.0
"""The shifting workload: its prompts, who answers when, what is read from the engines, the curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.engines import Engines, Generation
from benchmarks.common.records import RawFile
from benchmarks.serve import shift
from benchmarks.serve.shift import sentences, translations, variants_of
from benchmarks.serve.shift_plot import calibration_error, plot, rate, summary, windows
from tests.benchmark_rows import write_prompts


def row(phase: str, answered: int, variant: str = "online", **changes: Any) -> dict[str, Any]:
    """Two observed candidates: estimates 0.9 and 0.3, of which the first was accepted."""
    sums = {"num": [1.0, 1.0], "probability": [0.3, 0.9], "accepted": [0.0, 1.0]}
    same = {"prompt": "p", "seconds": 2.0, "tokens": 10, "rho": None, "reliability": sums}
    return {"phase": phase, "answered": answered, "variant": variant, **same, **changes}


class TestPrompts:
    def test_plain_sentences_once_each(self) -> None:
        texts = [
            "Tom has 5 apples, and he buys 3 more of them. How many does he have? Short one.",
            "Tom has 5 apples, and he buys 3 more of them. def f(x): return the value of x.",
            "lower case at the start of this one here.\nThis sentence is broken\nover two lines of the text.",
        ]
        found = list(sentences([{"prompt": text} for text in texts]))
        assert found == ["Tom has 5 apples, and he buys 3 more of them."]

    def test_translations_take_turns_in_language(self) -> None:
        rows = [{"prompt": f"This is the plain sentence with number {i}."} for i in range(4)]
        found = translations(rows, 4)
        assert [r["prompt"].split(":")[0].split()[-1] for r in found] == ["German", "French", "Spanish", "German"]
        assert found[3]["prompt"].endswith(": This is the plain sentence with number 3.")
        with pytest.raises(ValueError, match="--prompts 5: .* hold only 4"):
            translations(rows, 5)

    def test_another_rule_has_one_engine(self) -> None:
        assert variants_of("confidence") == {"confidence": {"rule": "confidence"}}
        both = variants_of("cost_aware")
        assert {name: options["online_calibration"] for name, options in both.items()} == {
            "online": True, "frozen": False,
        }  # fmt: skip
        with pytest.raises(ValueError, match="name the rule alone"):
            variants_of("confidence:threshold=0.5")


class TestFigures:
    def test_calibration_error_is_of_the_sums(self) -> None:
        assert calibration_error([row("code", 1)]) == pytest.approx((0.3 + 0.1) / 2)
        # What one group has too much another may lack: only the sums of both count.
        low = row("code", 2, reliability={"num": [1.0, 0.0], "probability": [0.3, 0.0], "accepted": [1.0, 0.0]})
        assert calibration_error([row("code", 1), low]) == pytest.approx((abs(0.6 - 1) + 0.1) / 3)

    def test_nothing_observed_is_no_error(self) -> None:
        nothing = row("code", 1, reliability={key: [0.0, 0.0] for key in ("num", "probability", "accepted")})
        assert calibration_error([row("code", 1, reliability={}), nothing]) is None

    def test_windows_do_not_reach_into_the_phase_before(self) -> None:
        rows = [row("code", i) for i in (1, 2, 3)] + [row("chat", i) for i in (4, 5)]
        assert [[r["answered"] for r in window] for window in windows(rows, 2)] == [[1], [1, 2], [2, 3], [4], [4, 5]]
        assert rate([row("code", 1), row("code", 2, seconds=3.0)]) == pytest.approx(4.0)

    def test_summary_by_phase_and_engine(self) -> None:
        rows = [row("code", 1), row("code", 1, "frozen", seconds=4.0), row("chat", 2, reliability={})]
        assert summary(rows) == {
            "code": {
                "online": {"tokens_per_second": 5.0, "calibration_error": 0.2},
                "frozen": {"tokens_per_second": 2.5, "calibration_error": 0.2},
            },
            "chat": {"online": {"tokens_per_second": 5.0}},
        }

    @pytest.mark.parametrize("reliability", [{}, {"num": [2.0], "probability": [1.5], "accepted": [1.0]}])
    def test_what_is_missing_is_left_out_of_the_plot(self, tmp_path: Path, reliability: dict[str, Any]) -> None:
        rows = [row(p, i, v, reliability=reliability) for i, p in ((1, "code"), (2, "chat")) for v in ("a", "b")]
        plot(rows, "title", tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


class FakePair(Engines):
    """Counts what each engine observes: one candidate a call, since its start."""

    calls: list[tuple[str, str]] = []

    def start_engine(self, name: str, speculative_config: dict[str, Any] | None) -> None:
        assert speculative_config is not None and speculative_config["rule"] == "cost_aware"
        self._observed = {**getattr(self, "_observed", {}), name: 0.0}

    def encode(self, prompt: str) -> list[int]:
        return [ord(letter) for letter in prompt]

    def answer(self, name: str, prompts: Any, max_tokens: int, *_: Any, **__: Any) -> Generation:
        self._observed[name] += 1
        if max_tokens == 8:  # the measured ones; warm-up asks for 24
            FakePair.calls.append((name, "".join(map(chr, prompts[0]))))
        return Generation([list(ids[-4:]) for ids in prompts], 0.5)

    def rpc(self, name: str, method: Any, **kwargs: Any) -> Any:
        assert (method, kwargs) == ("specdecpp_stats", {"reset": True})
        num = self._observed[name]
        sums = {"num": [num], "probability": [0.75 * num], "accepted": [num]}
        rule = {"admission": {"rho": 9.0}, "calibration": {"slope": 1.0, "reliability": sums}}
        return {"rounds": 1, "candidates": 2, "accepted": 1, "cost_aware": rule}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("humaneval", "mt_bench", "gsm8k", "alpaca"):
        write_prompts(tmp_path, name, 4)
    lines = [
        json.dumps({"id": f"s-{i}", "set": "gsm8k", "prompt": f"Here is a plain sentence with number {i}."})
        for i in range(4)
    ]
    (tmp_path / "eval_gsm8k.jsonl").write_text("\n".join(lines) + "\n")
    FakePair.calls = []
    monkeypatch.setattr(shift, "Engines", FakePair)
    parts = ["--pair", "T", "D", "--data", str(tmp_path), "--prompts", "4", "--max-tokens", "8", "--batch", "2"]
    return [*parts, "--out", str(tmp_path / "x.jsonl")]


class TestCommand:
    def test_both_engines_answer_the_same_prompts_in_turns(self, command: list[str], tmp_path: Path) -> None:
        assert shift.main(command) == 0
        rows = RawFile(tmp_path / "x.jsonl").rows
        assert [r["phase"] for r in rows] == ["code"] * 4 + ["chat"] * 4 + ["translation"] * 4
        assert [r["variant"] for r in rows[:4]] == ["online", "frozen", "frozen", "online"]
        assert [r["answered"] for r in rows if r["variant"] == "frozen"] == [2, 4, 6, 8, 10, 12]
        for name in ("online", "frozen"):
            assert [p for n, p in FakePair.calls if n == name][-1].startswith("Translate into Spanish: Here is a")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    def test_rows_hold_what_their_own_group_observed(self, command: list[str], tmp_path: Path) -> None:
        """The engine's sums run on from its start, warm-up included."""
        shift.main(command)
        rows = RawFile(tmp_path / "x.jsonl").rows
        assert all(r["reliability"] == {"num": [1.0], "probability": [0.75], "accepted": [1.0]} for r in rows)
        assert {r["rho"] for r in rows} == {9.0}
        assert {r["rounds"] for r in rows} == {1}

    def test_an_earlier_run_is_kept(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "x.jsonl").write_text("mine")
        assert shift.main(command) == 2
        assert "pass --force" in capsys.readouterr().err
        assert (tmp_path / "x.jsonl").read_text() == "mine"
        assert shift.main([*command, "--force"]) == 0
        assert len(RawFile(tmp_path / "x.jsonl").runs) == 1

    def test_the_plot_can_be_drawn_again(self, command: list[str], tmp_path: Path) -> None:
        assert shift.main([*command, "--plot-only"]) == 2
        assert not (tmp_path / "x.jsonl").exists()
        shift.main(command)
        before = (tmp_path / "x.jsonl").read_bytes()
        (tmp_path / "x.png").unlink()
        assert shift.main([*command, "--plot-only"]) == 0
        assert (tmp_path / "x.png").exists() and (tmp_path / "x.jsonl").read_bytes() == before

    @pytest.mark.parametrize("batch", ["0", "5"])
    def test_batch_out_of_range(self, command: list[str], batch: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert shift.main([*command, "--batch", batch]) == 2
        assert f"--batch {batch} must be 1 to 4" in capsys.readouterr().err
