"""Charts of an evaluation: scatter, distributions, curves, bars, dots and clusters; numbers in, a Figure out.

Missing (NaN), constant and single values are drawn or said, never an error: a picture is made of every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.report.style import (
    INK,
    LABEL_SIZE,
    MUTED,
    PALETTE,
    RULE,
    SCALE_COLORS,
    TICK_SIZE,
    color_range,
    legend,
    new_figure,
    note,
    plain_axes,
    score_text,
    title,
    widened,
)

# Beyond this many spots single points hide each other, and their density is drawn instead.
MAX_POINTS = 3000


def scatter(gene: str, *, measured: np.ndarray, predicted: np.ndarray, unit: str, pearson: float | None) -> Figure:
    """Draw predicted against measured expression of one gene, one point a spot, with the line of equality."""
    measured, predicted = np.ravel(measured).astype(float), np.ravel(predicted).astype(float)
    known = np.isfinite(measured) & np.isfinite(predicted)
    figure = new_figure(4.0, 4.0)
    axes = figure.subplots()
    plain_axes(axes, x_label=f"measured, {unit}", y_label=f"predicted, {unit}")
    low, high = color_range(measured[known], predicted[known], percentiles=(0, 100))
    margin = 0.04 * (high - low)
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    if not known.any():
        note(axes, "no spot with both values")
    elif known.sum() <= MAX_POINTS:
        axes.scatter(measured[known], predicted[known], s=11, color=PALETTE[0], alpha=0.45, linewidths=0, zorder=2)
    else:
        axes.hexbin(
            measured[known], predicted[known], gridsize=60, extent=(*limits, *limits), bins="log", mincnt=1,
            cmap="viridis", linewidths=0, zorder=2,
        )  # fmt: skip
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    title(axes, f"{gene}\nPCC {score_text(pearson)}   {known.sum():,} spots".replace(",", " "))
    return figure


def pcc_distribution(scores: Mapping[str, np.ndarray], *, label: str = "PCC of a gene") -> Figure:
    """Draw PCC over genes, one row a scale (or method): every gene a point, the middle half a bar, the median a line."""
    figure = new_figure(6.4, 0.9 + 0.72 * max(1, len(scores)))
    axes = figure.subplots()
    plain_axes(axes, x_label=label, grid="x")
    axes.axvline(0.0, color=MUTED, linewidth=0.9)
    names = []
    for row, (name, values) in enumerate(scores.items()):
        values = np.ravel(values).astype(float)
        known = np.sort(values[np.isfinite(values)])
        color = SCALE_COLORS.get(name, PALETTE[row % len(PALETTE)])
        undefined = f", {values.size - known.size} undefined" if known.size < values.size else ""
        names.append(f"{name}\n{known.size} genes{undefined}")
        if known.size == 0:
            continue
        axes.scatter(known, row + _spread(known.size), s=7, color=color, alpha=0.55, linewidths=0, zorder=2)
        lower, median, upper = np.percentile(known, (25, 50, 75))
        axes.plot((lower, upper), (row, row), color=INK, linewidth=1.6, solid_capstyle="butt", zorder=3)
        axes.plot((median, median), (row - 0.26, row + 0.26), color=INK, linewidth=1.6, zorder=3)
        axes.annotate(
            score_text(median), (median, row - 0.28), ha="center", va="bottom", fontsize=TICK_SIZE, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}, zorder=4,
        )  # fmt: skip
    if not any(np.isfinite(values).any() for values in scores.values()):
        axes.set_xlim(-1, 1)
        note(axes, "no gene with a defined PCC")
    axes.set(yticks=range(len(names)), ylim=(len(names) - 0.45, -0.62))
    axes.set_yticklabels(names)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def training_curves(records: Sequence[Mapping[str, float]], *, selected_epoch: int | None = None) -> Figure:
    """Draw loss terms, MSE and PCC(A) over the epochs of one fold.

    records: one mapping an epoch as in `metrics.jsonl`; keys that no epoch has are not drawn.
    selected_epoch: the epoch whose weights were evaluated, marked by a line.
    """
    panels = (
        ("training loss", {"total": "train/total", "instance": "train/instance", "group": "train/group"}),
        ("MSE", {"training": "train/prediction", "validation": "validation/mse", "test": "test/mse"}),
        ("PCC(A)", {"validation": "validation/pcc_all", "test": "test/pcc_all"}),
    )
    colors = {"training": MUTED, "validation": PALETTE[0], "test": PALETTE[1], "total": INK,
              "instance": PALETTE[2], "group": PALETTE[3]}  # fmt: skip
    figure = new_figure(9.6, 2.9)
    epochs = np.asarray([record["epoch"] for record in records], dtype=float)
    for axes, (name, series) in zip(figure.subplots(1, 3), panels):
        plain_axes(axes, x_label="epoch", grid="y")
        title(axes, name)
        for label, key in series.items():
            values = np.asarray([_number(record.get(key)) for record in records])
            known = np.isfinite(values)
            if known.any():
                marker = "o" if known.sum() == 1 else None
                axes.plot(epochs[known], values[known], color=colors[label], linewidth=1.5, label=label, marker=marker)
        if not axes.lines:
            axes.set(xlim=(0, max(1, epochs.max(initial=0))), yticks=[])
            note(axes, "not recorded")
        if selected_epoch is not None:
            axes.axvline(selected_epoch, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
            axes.set_title(f"evaluated: epoch {selected_epoch}", fontsize=TICK_SIZE, color=MUTED, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend(axes)
    return figure


def gene_bars(
    genes: Sequence[str], pearson: np.ndarray, *, spread: np.ndarray | None = None, count: int = 15
) -> Figure:
    """Draw the genes predicted best and worst, by PCC. spread: (G,) standard deviation over slides, drawn as a line."""
    pearson = np.asarray(pearson, dtype=float)
    known = np.flatnonzero(np.isfinite(pearson))
    order = known[np.lexsort((np.asarray(genes, dtype=str)[known], -pearson[known]))]
    # Every gene stands in one of the two lists at most.
    count = min(count, max(1, len(order) // 2))
    worst = order[max(count, len(order) - count) :]
    figure = new_figure(7.2, 1.1 + 0.2 * max(count, 3))
    panels = figure.subplots(1, 2, sharex=True)
    for axes, (name, chosen, color) in zip(panels, (("best", order[:count], PALETTE[0]), ("worst", worst, PALETTE[1]))):
        plain_axes(axes, x_label="PCC", grid="x")
        title(axes, f"{name} {len(chosen)} of {len(genes)} genes" if len(chosen) else name)
        rows = np.arange(len(chosen))
        whisker = None if spread is None else np.nan_to_num(np.asarray(spread, dtype=float)[chosen])
        axes.barh(
            rows, pearson[chosen], height=0.72, color=color, xerr=whisker,
            error_kw={"ecolor": MUTED, "elinewidth": 0.9},
        )  # fmt: skip
        axes.set(yticks=rows, ylim=(max(count, 3) - 0.4, -0.6))
        axes.set_yticklabels([genes[index] for index in chosen])
        axes.axvline(0.0, color=MUTED, linewidth=0.9)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if len(chosen) == 0:
            note(axes, "no further gene with a defined PCC" if len(order) else "no gene with a defined PCC")
    return figure


def patient_dots(
    slide_scores: Mapping[str, Sequence[float]],
    *,
    mean: float,
    interval: tuple[float, float] | None,
    label: str = "PCC(A)",
) -> Figure:
    """Draw one row a patient: its slides as small dots and their mean as a large one; the mean over patients below.

    slide_scores: patient -> score of each of its slides. interval: of the mean over patients, None when there are too
    few of them.
    """
    figure = new_figure(5.6, 1.1 + 0.28 * (len(slide_scores) + 1))
    axes = figure.subplots()
    plain_axes(axes, x_label=label, grid="x")
    axes.axvline(0.0, color=MUTED, linewidth=0.9)
    for row, given in enumerate(slide_scores.values()):
        scores = np.asarray(given, dtype=float)
        known = scores[np.isfinite(scores)]
        axes.scatter(known, np.full(known.size, row), s=16, color=PALETTE[0], alpha=0.45, linewidths=0, zorder=2)
        if known.size:
            axes.scatter([known.mean()], [row], s=52, color=PALETTE[0], edgecolors="white", linewidths=0.8, zorder=3)
    last = len(slide_scores)
    axes.axhline(last - 0.5, color=RULE, linewidth=0.8)
    if interval is not None and np.isfinite(interval).all():
        axes.plot(interval, (last, last), color=INK, linewidth=2.2, solid_capstyle="butt", zorder=2)
    axes.scatter([mean], [last], s=52, marker="D", color=INK, edgecolors="white", linewidths=0.8, zorder=3)
    if not np.isfinite(mean):
        axes.set_xlim(-1, 1)
        note(axes, f"no defined {label}")
    axes.set(yticks=range(last + 1), ylim=(last + 0.6, -0.6))
    axes.set_yticklabels([*(f"patient {name}" for name in slide_scores), "mean, 95 % interval" if interval else "mean"])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def cluster_composition(
    image_clusters: np.ndarray, gene_clusters: np.ndarray, patients: Sequence[str], *, max_groups: int = 6
) -> Figure:
    """Draw of which patients the clusters of one batch are made, in both modalities; a bar is a cluster, largest first.

    image_clusters, gene_clusters: (B,) cluster of each spot by its fused vector and by its gene vector.
    patients: (B,) patient (or slide) of the same spot. The smallest groups beyond `max_groups` are drawn as "other".
    """
    of_spot = np.asarray(patients, dtype=str)
    names, sizes = np.unique(of_spot, return_counts=True)
    shown = sorted(names[np.argsort(-sizes, kind="stable")][:max_groups])
    groups = [(name, of_spot == name, PALETTE[index]) for index, name in enumerate(shown)]
    rest = ~np.isin(of_spot, shown)
    if rest.any():
        groups.append((f"other ({len(names) - len(shown)})", rest, "#bdbdbd"))
    figure = new_figure(8.0, 4.6)
    panels = figure.subplots(2, 1)
    for axes, clusters, name in zip(panels, (image_clusters, gene_clusters), ("image", "gene")):
        _composition_bars(axes, np.asarray(clusters), groups)
        title(axes, f"clusters of the {name} vectors")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=TICK_SIZE,
        labelcolor=INK, title="spots of", title_fontsize=LABEL_SIZE,
    )  # fmt: skip
    return figure


def _composition_bars(axes: Axes, clusters: np.ndarray, groups: Sequence[tuple[str, np.ndarray, str]]) -> None:
    names, sizes = np.unique(clusters, return_counts=True)
    order = names[np.argsort(-sizes, kind="stable")]
    positions, base = np.arange(len(order)), np.zeros(len(order))
    for label, members, color in groups:
        heights = np.asarray([(members & (clusters == cluster)).sum() for cluster in order], dtype=float)
        axes.bar(positions, heights, bottom=base, width=0.82, color=color, label=label)
        base += heights
    plain_axes(axes, y_label="spots", grid="y")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set(xticks=[], xlim=(-0.7, len(order) - 0.3), ylim=(0, widened(0, 1.06 * base.max(initial=0))[1]))
    axes.set_xlabel(f"{len(order)} clusters that hold a spot, largest first", fontsize=LABEL_SIZE, color=INK)


def _spread(count: int) -> np.ndarray:
    """(count,) vertical offsets that keep neighboring points of a row apart: a golden-ratio sequence, not a lottery."""
    return (np.arange(count) * 0.6180339887498949 % 1.0 - 0.5) * 0.52


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
