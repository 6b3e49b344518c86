"""Figures of estimator noise: frames in, a matplotlib Figure out; no files, no global state.
Log-ratios in nats.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rspo_lab.figures.style import COLUMN, INK, PAGE, POLICY, design_look, new_figure


def variance_figure(results: pd.DataFrame) -> Figure:
    """Variance against cost, a panel a quantity, a line a design or scheme; whiskers 95 %; dashed:
    from count as 1/cost.
    """
    panels = {
        "var_score": "score, nats²",
        "var_d_independent": "d, masks not shared",
        "var_d_shared": "d, shared masks",
        "var_gradient": "RSPO gradient (trace)",
    }
    looks = design_look(list(results["design"].unique()))
    with new_figure(PAGE, 4.0) as figure:
        axes = figure.subplots(2, 2)
        for axis, (quantity, title) in zip(axes.flat, panels.items()):
            part = results[results["quantity"] == quantity]
            for design, rows in part.groupby("design", sort=False):
                axis.errorbar(
                    rows["cost"],
                    rows["value"],
                    1.96 * rows["stderr"],
                    **looks[design],
                    label=design,
                    capsize=1.5,
                )
            count = part[(part["design"] == "count") & (part["views"] == part["views"].min())]
            if len(count):
                span = np.array([part["cost"].min(), part["cost"].max()])
                axis.plot(
                    span,
                    count["value"].iloc[0] * count["cost"].iloc[0] / span,
                    color=INK,
                    linestyle="--",
                    linewidth=0.7,
                )
            axis.set(title=f"Variance of {title}", xscale="log", yscale="log")
            ticks = sorted(part[part["design"] == "count"]["cost"].round(2))
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            axis.minorticks_off()
        for axis in axes[1]:
            axis.set_xlabel("cost, views a sequence")
        handles = {
            label: handle
            for axis in axes.flat
            for handle, label in zip(*axis.get_legend_handles_labels())
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5)
    return figure


def profile_figure(profile) -> Figure:
    """Noise of one view of d by how many tokens it hides (a `views.CountProfile`), with the power
    law that it recommends.
    """
    with new_figure(COLUMN, 1.8) as figure:
        axis = figure.subplots()
        axis.plot(profile.size, profile.sd, color=POLICY, marker="o", label="sd of a view of d")
        seen = np.array([(n, sd) for n, sd in zip(profile.size, profile.sd) if sd > 0])
        if len(seen) > 1:
            size, sd = np.log(seen).T
            slope, start = np.polyfit(size, sd, 1)
            label = f"l to the power {slope:.2f}"
            axis.plot(
                seen[:, 0],
                np.exp(start) * seen[:, 0] ** slope,
                color=INK,
                linestyle="--",
                linewidth=0.8,
                label=label,
            )
            axis.set(xscale="log", yscale="log")
        axis.set(xlabel="hidden tokens l", ylabel="nats")
        axis.set_xticks(profile.size, [f"{n:.3g}" for n in profile.size])
        axis.minorticks_off()
        axis.legend()
    return figure


def efficiency_figure(efficiency: pd.DataFrame, views: dict[str, int]) -> Figure:
    """How many times less noise than `count` at equal cost, a panel a quantity of `views`, a row a
    policy; whiskers 95 %.
    """
    titles = {"var_d_shared": "Variance of d", "var_gradient": "Variance of the gradient"}
    efficiency = efficiency[efficiency["design"] != "count"]
    looks, policies = (
        design_look(list(efficiency["design"].unique())),
        list(efficiency["policy"].unique()),
    )
    with new_figure(COLUMN, 1.0 + 0.42 * len(policies) * len(views)) as figure:
        axes = figure.subplots(len(views), 1, squeeze=False)[:, 0]
        handles = {}
        for axis, (quantity, k) in zip(axes, views.items()):
            part = efficiency[(efficiency["quantity"] == quantity) & (efficiency["views"] == k)]
            designs = list(part["design"].unique())
            for i, design in enumerate(designs):
                rows = part[part["design"] == design]
                place = [
                    policies.index(p) + (i - (len(designs) - 1) / 2) * 0.8 / max(len(designs), 1)
                    for p in rows["policy"]
                ]
                look = looks[design] | {"linestyle": ""}
                spread = np.exp(rows["half"] / rows["ratio"])  # symmetric on a log axis
                whiskers = [
                    rows["ratio"] - rows["ratio"] / spread,
                    rows["ratio"] * spread - rows["ratio"],
                ]
                handles[design] = axis.errorbar(
                    rows["ratio"], place, xerr=whiskers, **look, capsize=1, elinewidth=0.6
                )
            for edge in range(1, len(policies)):
                axis.axhline(edge - 0.5, color="#dddddd", linewidth=0.5)
            axis.axvline(1, color=INK, linewidth=0.7, linestyle="--")
            axis.set_yticks(range(len(policies)), policies)
            axis.set_ylim(len(policies) - 0.5, -0.5)
            axis.set(title=f"{titles[quantity]}, {k} views", xscale="log")
            axis.grid(axis="y", visible=False)
            ticks = [
                t
                for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
                if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]
            ]
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axis.minorticks_off()
        axes[-1].set_xlabel("times less variance than count")
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2)
    return figure


def bias_figure(results: pd.DataFrame) -> Figure:
    """Bias of score and d against the oracle, nats, with 95 % whiskers."""
    looks = design_look(list(results["design"].unique()))
    with new_figure(PAGE, 2.0) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, quantity in zip(axes, ("bias_score", "bias_d")):
            part = results[results["quantity"] == quantity]
            designs, views = list(part["design"].unique()), sorted(part["views"].unique())
            for i, (design, rows) in enumerate(part.groupby("design", sort=False)):
                place = [
                    views.index(k) + (i - (len(designs) - 1) / 2) * 0.7 / len(designs)
                    for k in rows["views"]
                ]
                axis.errorbar(
                    place,
                    rows["value"],
                    1.96 * rows["stderr"],
                    **looks[design] | {"linestyle": ""},
                    label=design,
                    capsize=1.5,
                )
            axis.set_xticks(range(len(views)), [str(k) for k in views])
            axis.axhline(0, color=INK, linewidth=0.7)
            axis.set(
                title=f"Bias of {'the score' if quantity == 'bias_score' else 'd'}, nats",
                xlabel="views",
            )
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure
