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
_RATES = ("discard_rate", "verification_rate")
_NEAR = 0.12
"""Labels of the Pareto plot keep this share of the axes apart."""

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


def plot_pareto(
    points: Sequence[Mapping[str, Any]], path: Path, title: str = "Verification against discard rate"
) -> None:
    """The paper's plot (arXiv:2405.19715): target passes a token against discarded candidates a token.

    Lower left is better. The points of a group are joined in the order of their discard rate. The legend says the
    labels of those with ``emphasis``; beside the first and last point of a group goes theirs, unless one is near.

    Args:
        points: mappings with ``label``, ``group``, ``discard_rate`` (N_discarded / N), ``verification_rate``
            (N_target / N) and, if wanted, ``emphasis`` (bool: a larger mark, for a chosen setting).
        path: of the PNG.
        title: names the pair and the number of tokens.

    Raises:
        ValueError: one line: matplotlib is not installed.
    """
    figure, [[axes]] = _figure((7.6, 5.4), title)
    reach = [max(p[key] for p in points) - min(p[key] for p in points) or 1.0 for key in _RATES]
    labelled: list[tuple[float, float]] = []
    for i, (group, members) in enumerate(_groups(points).items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        members = sorted(members, key=lambda point: (point["discard_rate"], -point["verification_rate"]))
        x = [point["discard_rate"] for point in members]
        y = [point["verification_rate"] for point in members]
        chosen = [str(p["label"]) for p in members if p.get("emphasis") and str(p["label"]) != group]
        name = f"{group}, chosen: {', '.join(chosen)}" if chosen else group
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name, zorder=2)
        for j, point in enumerate(members):
            if point.get("emphasis"):
                axes.scatter(
                    x[j], y[j], s=150, marker=marker, color=colour, edgecolors="black", linewidths=1.4, zorder=4
                )
            if j == 0:
                place = {"xytext": (-8, 0), "ha": "right", "va": "center"}
            elif j == len(members) - 1:
                place = {"xytext": (8, 0), "ha": "left", "va": "center"}
            else:
                continue
            near = any(math.hypot((x[j] - a) / reach[0], (y[j] - b) / reach[1]) < _NEAR for a, b in labelled)
            if str(point["label"]) != group and not near:
                labelled.append((x[j], y[j]))
                axes.annotate(
                    str(point["label"]), (x[j], y[j]), textcoords="offset points", fontsize=9, color=colour,
                    path_effects=[_halo()], zorder=5, **place,
                )  # fmt: skip
    axes.set_xlabel("discard rate: rejected or unused candidates a token (N_discarded / N)")
    axes.set_ylabel("verification rate: target passes a token (N_target / N)")
    axes.margins(x=0.1, y=0.1)
    axes.legend(fontsize=9, loc="upper right", title="lower left is better", title_fontsize=9)
    _save(figure, path)


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
