# SPDX-License-Identifier: Apache-2.0
"""Figures: what is drawn where, and clear words about what cannot be drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from vllm_specdecpp.training import plots
from vllm_specdecpp.training.statistics import Reliability, reliability


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    figures: list[Any] = []
    save = plots._save

    def keep(figure: Any, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def curve(num_rows: int, seed: int = 0) -> Reliability:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(num_rows, generator=generator)
    return reliability(p, torch.bernoulli(p, generator=generator))


def pareto_point(label: str | None, group: str, x: float, y: float, **more: Any) -> dict[str, Any]:
    return {"label": label, "group": group, "emphasis": False, "discard_rate": x, "verification_rate": y, **more}


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def visible(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.axison]


@pytest.mark.parametrize("num_sets", [1, 3, 5])
def test_a_panel_a_set_with_its_rows_and_ece(tmp_path: Path, drawn: list[Any], num_sets: int) -> None:
    panels = {f"set{i}": {"head": curve(1000 + i), "confidence": curve(1000 + i, 9)} for i in range(num_sets)}
    plots.plot_reliability(panels, tmp_path / "new" / "r.png", "draft → target, n = 5,000")
    assert is_png(tmp_path / "new" / "r.png") and [f.name for f in (tmp_path / "new").iterdir()] == ["r.png"]
    panels_drawn = visible(drawn[0])
    assert [axes.get_title() for axes in panels_drawn] == [f"set{i} (n = {1000 + i:,})" for i in range(num_sets)]
    texts = [text.get_text() for text in panels_drawn[0].texts]
    assert texts == [f"ECE {each.ece:.3f}" for each in panels["set0"].values()]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["head", "confidence"]
    assert drawn[0].get_suptitle() == "draft → target, n = 5,000"


def test_bins_that_hold_next_to_nothing_are_not_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    p = torch.cat([torch.full((200,), 0.9), torch.full((100,), 0.5), torch.full((3,), 0.1)])
    plots.plot_reliability({"all": {"head": reliability(p, (p > 0.4).float())}}, tmp_path / "r.png", "t")
    (axes,) = visible(drawn[0])
    x = axes.lines[-1].get_xdata()
    assert list(x) == pytest.approx([0.5, 0.9])


def test_a_set_of_few_rows_is_drawn_all_the_same(tmp_path: Path, drawn: list[Any]) -> None:
    one = reliability(torch.tensor([0.7]), torch.tensor([1.0]))
    plots.plot_reliability({"tiny": {"head": one}}, tmp_path / "r.png", "t")
    (axes,) = visible(drawn[0])
    assert list(axes.lines[-1].get_xdata()) == pytest.approx([0.7])


def test_a_long_title_is_broken_rather_than_cut(tmp_path: Path, drawn: list[Any]) -> None:
    title = "Reliability on held-out prompts: a-quite-long-draft-model-name → an-even-longer-target-model-name, n = 9"
    plots.plot_reliability({"all": {"head": curve(500)}}, tmp_path / "r.png", title)
    figure = drawn[0]
    extent = figure._suptitle.get_window_extent(figure.canvas.get_renderer())
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width
    assert figure.get_suptitle().replace("\n", " ") == title


@pytest.mark.parametrize(("num", "accepted"), [(1, 1), (1, 0), (20, 3), (500, 500), (1000, 421)])
def test_wilsons_ends_solve_the_score_equation(num: int, accepted: int) -> None:
    rate = accepted / num
    below, above = plots._ends(rate, num)
    low, high, z = rate - below, rate + above, NormalDist().inv_cdf(0.975)
    assert -1e-12 <= low <= rate <= high <= 1 + 1e-12 and low < high
    for end in (low, high):  # the rates of which the observed one is 1.96 standard errors away
        assert (rate - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / num, abs=1e-9) or end == rate


def test_pareto_joins_a_group_by_discard_rate_and_marks_what_was_chosen(tmp_path: Path, drawn: list[Any]) -> None:
    points = [pareto_point(f"K={k}", "fixed K", 0.2 * k, 1 / k, emphasis=k == 3) for k in (5, 2, 1, 4, 3)]
    points += [pareto_point(None, "oracle", 0.0, 0.15), pareto_point(None, "default", 0.1, 0.2, emphasis=True)]
    plots.plot_pareto(points, tmp_path / "p.png", "pair, n = 9")
    (axes,) = drawn[0].axes
    assert list(axes.lines[0].get_xdata()) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert list(axes.lines[0].get_ydata()) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fixed K, chosen: K=3", "oracle", "default"]
    marked = [collection.get_offsets().tolist() for collection in axes.collections]
    assert marked[0] == [pytest.approx([0.6, 1 / 3])] and marked[1:] == [[], [pytest.approx([0.1, 0.2])]]
    assert "N_discarded" in axes.get_xlabel() and "N_target" in axes.get_ylabel()
    assert is_png(tmp_path / "p.png")


def test_groups_differ_in_colour_and_marker(tmp_path: Path, drawn: list[Any]) -> None:
    plots.plot_pareto([pareto_point("x", f"g{i}", i, i) for i in range(7)], tmp_path / "p.png", "t")
    (axes,) = drawn[0].axes
    assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 7


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install '.\[train\]'"):
        plots.plot_pareto([pareto_point("a", "b", 1.0, 1.0)], tmp_path / "p.png", "t")
