# SPDX-License-Identifier: Apache-2.0
"""Figures as PNG: reliability, and the paper's Pareto plot."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specdecpp.files import write_whole

if TYPE_CHECKING:
    from vllm_specdecpp.training.statistics import Reliability

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart with every kind of colour vision (Okabe and Ito, 2008); each group also has its own marker."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#777777"
_PANELS_A_ROW = 3
_MIN_ROWS = 10
_CHARACTERS_AN_INCH = 9  # of a title


def plot_reliability(panels: Mapping[str, Mapping[str, Reliability]], path: Path, title: str) -> None:
    """Accept rate against estimated probability: one panel a set, one line an estimator; on the diagonal is calibrated.

    The first estimator gets 95 % intervals (Wilson, as if rows were independent), and its rows a bin stand as bars.
    Bins of fewer than 10 rows are not drawn, but count in the ECE.

    Args:
        panels: set → name of an estimator → its bins; the same estimators in every panel.
        path: of the PNG.
        title: names the pair and the number of rows.

    Raises:
        ValueError: one line: matplotlib is not installed.
    """
    num_columns = min(len(panels), _PANELS_A_ROW)
    num_rows = math.ceil(len(panels) / num_columns)
    size = (max(3.9 * num_columns + 0.4, 5.0), 4.1 * num_rows + 1.2)
    figure, grid = _figure(size, title, num_rows, num_columns)
    flat = [axes for row in grid for axes in row]
    lines: dict[str, Any] = {}
    for axes, (name, curves) in zip(flat, panels.items(), strict=False):
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for i, (label, curve) in enumerate(curves.items()):
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            line = _reliability_line(axes, curve, first=i == 0, **style)
            lines.setdefault(label, line)
            # Lower right, where only a hopelessly overconfident estimator has its line.
            axes.text(
                0.98, 0.22 + 0.055 * (len(curves) - 1 - i), f"ECE {curve.ece:.3f}", color=style["color"], fontsize=9,
                ha="right", path_effects=[_halo()], zorder=5,
            )  # fmt: skip
        rows = int(next(iter(curves.values())).num.sum())
        axes.set_title(f"{name} (n = {rows:,})", fontsize=11)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set_xlabel("estimated P(accepted)")
        axes.set_ylabel("share accepted")
    for axes in flat[len(panels) :]:
        axes.set_axis_off()
    columns = len(lines) if num_columns > 1 else 1
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
    _save(figure, path)


def plot_pareto(points: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """The paper's plot (arXiv:2405.19715): target passes a token against discarded candidates a token.

    Lower left is better. The points of a group are joined in the order of their discard rate; those with ``emphasis``
    have a larger mark, and the legend says their labels.

    Args:
        points: mappings with ``group``, ``label`` (None: the group's name says it), ``emphasis`` (bool: chosen),
            ``discard_rate`` (N_discarded / N) and ``verification_rate`` (N_target / N).
        path: of the PNG.
        title: names the pair and the number of tokens.

    Raises:
        ValueError: one line: matplotlib is not installed.
    """
    figure, [[axes]] = _figure((7.6, 5.4), title)
    for i, (group, members) in enumerate(_groups(points).items()):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        members = sorted(members, key=lambda point: (point["discard_rate"], -point["verification_rate"]))
        chosen = [point for point in members if point["emphasis"]]
        labels = ", ".join(point["label"] for point in chosen if point["label"])
        name = f"{group}, chosen: {labels}" if labels else group
        axes.plot(*_rates(members), markersize=5, linewidth=1.6, label=name, zorder=2, **style)
        axes.scatter(*_rates(chosen), s=150, edgecolors="black", linewidths=1.4, zorder=4, **style)
    axes.set_xlabel("discard rate: rejected or unused candidates a token (N_discarded / N)")
    axes.set_ylabel("verification rate: target passes a token (N_target / N)")
    axes.margins(x=0.1, y=0.1)
    axes.legend(fontsize=9, loc="upper right", title="lower left is better", title_fontsize=9)
    _save(figure, path)


def _rates(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """x and y of the points in the Pareto plot."""
    return [point["discard_rate"] for point in points], [point["verification_rate"] for point in points]


def _reliability_line(axes: Any, curve: Reliability, *, first: bool, color: str, marker: str) -> Any:
    """One estimator: its bins joined; the first estimator also with intervals and the share of rows a bin."""
    filled = curve.num >= _MIN_ROWS
    if not filled.any():
        filled = curve.num > 0
    num, x, y = curve.num[filled].tolist(), curve.probability[filled].tolist(), curve.accept_rate[filled].tolist()
    if first:
        share = (curve.num / curve.num.max() * 0.18).tolist()  # the fullest bin is as high as 0.18 of the panel
        width = 1 / len(share)
        axes.bar([i * width for i in range(len(share))], share, width, align="edge", color="#DDDDDD", zorder=0)
        ends = [_ends(rate, each) for rate, each in zip(y, num, strict=True)]
        below_above = list(zip(*ends, strict=True))
        axes.errorbar(x, y, below_above, color=color, linestyle="none", linewidth=1.2, capsize=2, zorder=3)
    (line,) = axes.plot(
        x, y, color=color, marker=marker, markersize=5 if first else 3.5,
        linewidth=1.8 if first else 1.2, alpha=1.0 if first else 0.85, zorder=4 if first else 2,
    )  # fmt: skip
    return line


def _ends(rate: float, num: float) -> tuple[float, float]:
    """How far Wilson's interval of a share ``rate`` of ``num`` rows reaches below it, and above."""
    from scipy.stats import binomtest

    found = binomtest(round(rate * num), round(num)).proportion_ci(method="wilson")
    return max(rate - found.low, 0.0), max(found.high - rate, 0.0)


def _groups(points: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The points by group, in the order of first appearance."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(str(point["group"]), []).append(point)
    return groups


def check_installed() -> None:
    """Say early that no figure can be drawn.

    Raises:
        ValueError: one line: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError("specdecpp: plots need matplotlib; in the clone: pip install '.[train]'") from None


def _figure(size: tuple[float, float], title: str, num_rows: int = 1, num_columns: int = 1) -> tuple[Any, Any]:
    """A figure without pyplot's global state, and its axes as rows of columns."""
    check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, int(size[0] * _CHARACTERS_AN_INCH), break_on_hyphens=False), fontsize=12)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _halo() -> Any:
    """White around letters, so that a line behind them does not make them unreadable."""
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=2.5, foreground="white")


def _save(figure: Any, path: Path) -> None:
    """Write the PNG in one move."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(path, image.getvalue())
