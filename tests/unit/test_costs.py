# SPDX-License-Identifier: Apache-2.0
"""Step costs: reading between and beyond the measured points, and the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_specdecpp.costs.model import CostCache
from vllm_specdecpp.training.replay.costs import Costs


def costs(**changes: Any) -> Costs:
    values: dict[str, Any] = {
        "draft_seconds": {1: 0.05, 2: 0.10, 6: 0.50},
        "verify_seconds": {2: 0.20, 3: 0.15, 7: 0.19},
        "off_seconds": 0.125,
    }
    return Costs(**(values | changes))


class TestEngineCosts:
    """The file that the engine keeps for cost_aware serves as well."""

    POINTS = {
        "first": {1: 0.07, 2: 0.08}, "step": {1: 0.06, 2: 0.065},
        "verify": {1: 0.17, 2: 0.2, 6: 0.18, 16: 0.4, 256: 4.0},
    }  # fmt: skip

    def test_of_one_request(self, tmp_path: Path) -> None:
        cache = CostCache(tmp_path, {"target": "org/large", "draft": "org/small", "device": "a machine", "vllm": "1.2"})
        assert cache.save(self.POINTS)
        found = Costs.load(cache.path)
        assert [found.draft(k) for k in (1, 2, 5)] == pytest.approx([0.07, 0.13, 0.31])
        assert found.verify(6) == 0.18 and found.verify(4) == pytest.approx(0.19) and found.off_seconds == 0.17
        assert (found.max_length, found.machine, found.draft_model, found.batch) == (15, "a machine", "org/small", 1)
        assert found.round(3) == pytest.approx(0.19 + 0.19)

    def test_damaged(self, tmp_path: Path) -> None:
        cache = CostCache(tmp_path, {"target": "org/large"})
        cache.save({**self.POINTS, "verify": {2: 0.2, 6: 0.18}})
        with pytest.raises(ValueError, match=r"^specdecpp: costs file .* has no verification of one token; measure"):
            Costs.load(cache.path)
        cache.save({**self.POINTS, "first": {1: -1.0}})
        with pytest.raises(ValueError, match="^specdecpp: [^\n]*$"):
            Costs.load(cache.path)


class TestCurves:
    @pytest.mark.parametrize(
        ("length", "seconds"), [(0, 0.0), (1, 0.05), (2, 0.10), (3, 0.20), (5, 0.40), (6, 0.50), (8, 0.70)]
    )
    def test_drafting(self, length: int, seconds: float) -> None:
        """Measured, between two points, and beyond the last one at the last piece's slope."""
        assert costs().draft(length) == pytest.approx(seconds)

    @pytest.mark.parametrize(("rows", "seconds"), [(1, 0.125), (2, 0.20), (3, 0.15), (5, 0.17), (9, 0.21)])
    def test_verification_need_not_grow(self, rows: int, seconds: float) -> None:
        """Two rows may cost more than three (they do on some CPUs): what was measured is kept."""
        assert costs().verify(rows) == pytest.approx(seconds)

    def test_one_token_is_what_speculation_off_does(self) -> None:
        assert costs().verify(1) == 0.125
        assert costs(verify_seconds={1: 0.13, 2: 0.20}).verify(1) == 0.13

    def test_a_round_is_both(self) -> None:
        assert costs().round(2) == pytest.approx(0.10 + 0.15)
        assert costs().round(0) == pytest.approx(0.125)

    def test_noise_at_the_end_does_not_make_long_rounds_cheap(self) -> None:
        noisy = costs(verify_seconds={2: 0.20, 9: 0.30, 10: 0.28})
        assert noisy.verify(100) == pytest.approx(0.28)

    def test_never_negative(self) -> None:
        assert costs(draft_seconds={3: 0.01, 4: 0.04}).draft(1) == 0.0

    def test_order_of_the_points_does_not_matter(self) -> None:
        assert costs(draft_seconds={6: 0.50, 1: 0.05, 2: 0.10}).draft(3) == pytest.approx(0.20)

    def test_longest_measured(self) -> None:
        assert costs().max_length == 6


class TestDoubts:
    """A draft pass takes 90 ms in these costs: a quarter of that is 22.5."""

    def measured(self, spread: float, samples: int, **changes: Any) -> Costs:
        quartiles = {name: {"2": [0.1 - spread / 2, 0.1 + spread / 2]} for name in ("draft_seconds", "verify_seconds")}
        return costs(quartiles=quartiles, num_samples={name: {"2": samples} for name in quartiles}, **changes)

    def test_none(self) -> None:
        assert costs().doubts() == [] and self.measured(0.09, 16).doubts() == []

    def test_an_unsteady_median(self) -> None:
        drafting, verifying = self.measured(0.11, 16).doubts()  # 0.93 * 110 / 4
        assert drafting == "drafting 2 candidates: standard error 26 ms, a draft pass takes 90 ms"
        assert verifying.startswith("verifying 2 tokens: ")

    def test_a_file_that_does_not_tell_the_rounds(self) -> None:
        assert costs(quartiles={"draft_seconds": {"2": [0.0, 1.0]}}).doubts() == []

    def test_more_rounds_make_it_steady(self) -> None:
        assert self.measured(0.11, 64).doubts() == []

    def test_a_longer_draft_cannot_take_less(self) -> None:
        assert costs(draft_seconds={1: 0.05, 2: 0.12, 3: 0.1}).doubts() == [
            "drafting 3 candidates took 100 ms, 2 took 120"
        ]
        (backwards,) = self.measured(0.09, 16, draft_seconds={1: 0.12, 2: 0.1}).doubts()
        assert backwards.startswith("drafting 2 candidates took")


class TestBadValues:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"draft_seconds": {1: 0.05}}, "draft_seconds has 1 lengths"),
            ({"verify_seconds": {}}, "verify_seconds has 0 lengths"),
            ({"draft_seconds": {1: 0.05, 2: float("nan")}}, "draft_seconds[2]=nan"),
            ({"draft_seconds": {0: 0.05, 2: 0.1}}, "draft_seconds[0]"),
            ({"verify_seconds": {1: 0.05, 2: -0.1}}, "verify_seconds[2]=-0.1"),
            ({"off_seconds": 0.0}, "off_seconds=0.0"),
            ({"off_seconds": float("inf")}, "off_seconds=inf"),
            ({"batch": 0}, "batch=0"),
        ],
    )
    def test_named_in_one_line(self, changes: dict[str, Any], named: str) -> None:
        with pytest.raises(ValueError, match="^specdecpp: ") as error:
            costs(**changes)
        assert named in str(error.value) and "\n" not in str(error.value)


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        written = costs(
            batch=2, machine="a machine", versions={"torch": "2"}, command="measure", target="t", draft_model="d",
            quartiles={"draft_seconds": {"1": [0.04, 0.06]}}, num_samples={"draft_seconds": {"1": 60}},
        )  # fmt: skip
        written.save(tmp_path / "deep" / "costs.json")
        assert Costs.load(tmp_path / "deep" / "costs.json") == written
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["costs.json"]  # no .part is left

    def test_is_not_overwritten_unasked(self, tmp_path: Path) -> None:
        path = tmp_path / "costs.json"
        costs().save(path)
        with pytest.raises(ValueError, match="^specdecpp: .*costs.json exists.*--force"):
            costs(off_seconds=1.0).save(path)
        assert Costs.load(path).off_seconds == 0.125
        costs(off_seconds=1.0).save(path, force=True)
        assert Costs.load(path).off_seconds == 1.0

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="^specdecpp: .* is a folder"):
            costs().save(tmp_path, force=True)

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("", "not valid JSON"),
            ('{"format": 1, "draft_seconds": {"1"', "not valid JSON"),
            ("[]", "not of format 1"),
            ('{"format": 2}', "not of format 1"),
            ('{"format": 1}', "draft_seconds"),
            ('{"format": 1, "draft_seconds": [1], "verify_seconds": {}, "off_seconds": 1}', "lacks or mistakes"),
            ('{"format": 1, "draft_seconds": {"a": 1}, "verify_seconds": {}, "off_seconds": 1}', "'a'"),
        ],
    )
    def test_damaged(self, tmp_path: Path, text: str, named: str) -> None:
        path = tmp_path / "costs.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="^specdecpp: costs file .*costs.json") as error:
            Costs.load(path)
        assert named in str(error.value) and "\n" not in str(error.value)

    def test_unknown_and_bad_values_name_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "costs.json"
        costs().save(path)
        data = json.loads(path.read_text())
        path.write_text(json.dumps(data | {"surprise": 1}))
        with pytest.raises(ValueError, match="^specdecpp: costs file .*surprise"):
            Costs.load(path)
        path.write_text(json.dumps(data | {"off_seconds": -1}))
        with pytest.raises(ValueError, match="^specdecpp: costs file .*off_seconds=-1"):
            Costs.load(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="^specdecpp: costs file .*cannot be read"):
            Costs.load(tmp_path / "none.json")
