"""The figure of notebook 06: the frame of `throughput.measure` in, a matplotlib Figure out; no
files, no global state.
"""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from rspo_lab.figures.style import INK, PAGE, POLICY, TARGET, new_figure

CACHED = ("rollout, dual cache", 1)  # stands beside the naive rollout, which has no cache
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def throughput_figure(results: pd.DataFrame) -> Figure:
    """Sequences/s of ours over those of the naive path, and the peak memory of an update against
    its views.

    Whiskers: half the two spreads, relative, added.  A work that the naive path has no memory for
    has no point but says so.
    """
    part = results[results["sequences"] > 0].set_index(["work", "views", "path"])
    works = [key[:2] for key in part.index if key[2] == "naive" or key[:2] == CACHED]
    with new_figure(PAGE, 0.75 + 0.22 * len(works)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        left.axvline(1, color=INK, linewidth=0.7, linestyle="--")
        for place, work in enumerate(works):
            ours, naive = (
                part.loc[(*work, "ours")],
                part.loc[("rollout", 1, "naive") if work == CACHED else (*work, "naive")],
            )
            times = ours["sequences_per_s"] / naive["sequences_per_s"]
            if times == times:
                whisker = times * sum(row["spread"] / row["seconds"] for row in (ours, naive)) / 2
                left.errorbar(
                    times,
                    place,
                    xerr=[[min(whisker, 0.9 * times)], [whisker]],
                    color=POLICY,
                    marker="o",
                    capsize=1.5,
                )
                white = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
                left.annotate(
                    f"{times:.2f}",
                    (times, place),
                    (0, 4),
                    textcoords="offset points",
                    ha="center",
                    fontsize=6,
                    color=INK,
                    bbox=white,
                )
            else:
                left.text(
                    1.03, place, f"naive: {naive['note']}", va="center", fontsize=6.5, color=TARGET
                )
        left.set_yticks(
            range(len(works)),
            [name if name != "update" else f"update, K = {views}" for name, views in works],
        )
        left.set_ylim(len(works) - 0.5, -0.7)
        left.set(xscale="log", xlabel="ours over naive", title="Sequences/s")
        low, high = min(left.get_xlim()[0], 0.8), max(left.get_xlim()[1], 2.5)
        left.set_xlim(low, high)
        left.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
        left.xaxis.set_minor_locator(NullLocator())
        left.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        left.grid(axis="y", visible=False)
        for path, colour, marker in (("ours", POLICY, "o"), ("naive", TARGET, "^")):
            rows = results[(results["work"] == "update") & (results["path"] == path)].sort_values(
                "views"
            )
            right.plot(rows["views"], rows["peak_gib"], color=colour, marker=marker, label=path)
            if out := [str(views) for views in rows["views"][rows["peak_gib"].isna()]]:
                said = f"naive: out of memory at K = {', '.join(out)}"
                right.text(
                    0.98,
                    0.95,
                    said,
                    transform=right.transAxes,
                    ha="right",
                    va="top",
                    fontsize=6.5,
                    color=colour,
                )
        views = sorted(results[results["work"] == "update"]["views"].unique())
        right.set_xticks(views)
        right.set(
            xlabel="masks a sequence, K",
            title="Peak memory of an update, GiB",
            xlim=(0, max(views) + min(views)),
        )
        right.set_ylim(0, 1.15 * right.get_ylim()[1])  # room for the line on what had no memory
        right.legend(loc="lower right")
    return figure
