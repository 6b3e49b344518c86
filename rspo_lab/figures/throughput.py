"""The figure of notebook 06: the frame of `throughput.measure` in, a Figure out; no files."""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from rspo_lab.figures.style import INK, PAGE, POLICY, TARGET, new_figure

CACHED = ("rollout, dual cache", 1)  # stands beside the naive rollout, which has no cache
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def throughput_figure(results: pd.DataFrame) -> Figure:
    """Sequences/s of ours over those of the naive path, and peak memory per update against views.

    Whiskers: half the two spreads, relative, added.  A work that the naive path has no memory for
    has no point but says so.
    """
    part = results[results["sequences"] > 0].set_index(["work", "views", "path"])
    works = [key[:2] for key in part.index if key[2] == "naive" or key[:2] == CACHED]
    with new_figure(PAGE, 0.75 + 0.22 * len(works)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        left.axvline(1, color=INK, linewidth=0.7, linestyle="--")
        for place, work in enumerate(works):
            naive = ("rollout", 1) if work == CACHED else work
            _draw_speedup(left, place, part.loc[(*work, "ours")], part.loc[(*naive, "naive")])
        names = [name if name != "update" else f"update, K = {views}" for name, views in works]
        left.set_yticks(range(len(works)), names)
        left.set_ylim(len(works) - 0.5, -0.7)
        left.set(xscale="log", xlabel="ours over naive", title="Sequences/s")
        _set_ticks(left)
        left.grid(axis="y", visible=False)
        _draw_memory(right, results[results["work"] == "update"].sort_values("views"))
    return figure


def _draw_speedup(axis: Axes, place: int, ours: pd.Series, naive: pd.Series) -> None:
    """How many times more sequences/s, with the number; or why the naive path has none."""
    times = ours["sequences_per_s"] / naive["sequences_per_s"]
    if math.isnan(times):
        note = f"naive: {naive['note']}"
        axis.text(1.03, place, note, va="center", fontsize=6.5, color=TARGET)
        return
    whisker = times * sum(row["spread"] / row["seconds"] for row in (ours, naive)) / 2
    whiskers = [[min(whisker, 0.9 * times)], [whisker]]
    axis.errorbar(times, place, xerr=whiskers, color=POLICY, marker="o", capsize=1.5)
    axis.annotate(
        f"{times:.2f}",
        (times, place),
        (0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=6,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
    )


def _set_ticks(axis: Axes) -> None:
    """Round factors around 1 on the log axis."""
    low, high = axis.get_xlim()
    low = min(low, 0.8)
    high = max(high, 2.5)
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _draw_memory(axis: Axes, updates: pd.DataFrame) -> None:
    """Peak memory per update against its views; a path that ran out of memory says where."""
    for path, color, marker in (("ours", POLICY, "o"), ("naive", TARGET, "^")):
        rows = updates[updates["path"] == path]
        axis.plot(rows["views"], rows["peak_gib"], color=color, marker=marker, label=path)
        without = [str(views) for views in rows["views"][rows["peak_gib"].isna()]]
        if without:
            axis.text(
                0.98,
                0.95,
                f"{path}: out of memory at K = {', '.join(without)}",
                transform=axis.transAxes,
                ha="right",
                va="top",
                fontsize=6.5,
                color=color,
            )
    views = sorted(updates["views"].unique())
    axis.set_xticks(views)
    axis.set(xlabel="views per sequence, K", title="Peak memory per update, GiB")
    axis.set_xlim(0, max(views) + min(views))
    axis.set_ylim(0, 1.15 * axis.get_ylim()[1])  # room for the line on what had no memory
    axis.legend(loc="best")
