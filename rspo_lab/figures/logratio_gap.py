"""Figures of notebook 04: the estimated log-ratio against its target and against exact values.

Frames in, a Figure out; no files.  Nats.  Of two exact values each label says which it is: the ELBO
ratio, or the log-ratio of the decoder that unmasks in uniformly random order.
"""

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rspo_lab.figures.style import (
    INK,
    PAGE,
    POLICY,
    REFERENCE,
    TARGET,
    draw_column,
    identity_line,
    new_figure,
    scatter_by_reward,
)
from rspo_lab.statistics import correlation


def gap_figure(samples: pd.DataFrame) -> Figure:
    """Target against estimate per saved policy, with its regression line, and the gap's spread."""
    steps = sorted(samples["step"].unique())
    parts = [samples[samples["step"] == step] for step in steps]
    with new_figure(PAGE, 1.9) as figure:
        *axes, last = figure.subplots(1, len(steps) + 1)
        for axis, step, part in zip(axes, steps, parts):
            scatter_by_reward(axis, part, "d_hat", "target")
            if part["d_hat"].std() > 0:
                span = np.array([part["d_hat"].min(), part["d_hat"].max()])
                line = np.polyfit(part["d_hat"], part["target"], 1)
                axis.plot(span, np.polyval(line, span), color=INK)
            identity_line(axis)
            axis.set(title=f"step {step}", xlabel="d̂, nats")
            axis.locator_params(axis="x", nbins=3 if len(steps) < 4 else 1)
        axes[0].set_ylabel("target A/λ, nats")
        last.boxplot(
            [part["gap"] for part in parts],
            tick_labels=[str(step) for step in steps],
            whis=(5, 95),
            sym="",
            medianprops={"color": TARGET},
        )
        last.set(title="gap, nats", xlabel="step")
        last.tick_params(axis="x", labelsize=5.5)
    return figure


def exact_figure(samples: pd.DataFrame) -> Figure:
    """Above: estimate against exact ELBO ratio.  Below: that against the random-order log-ratio.

    The scatter above is mask noise; that below is what the ELBO leaves out.
    """
    steps = sorted(samples["step"].unique())
    estimate = ("d", "estimate d")
    elbo = ("d_exact", "exact ELBO ratio")
    log_ratio = ("random_order_log_ratio", "exact random-order\nlog-ratio")
    with new_figure(PAGE, 3.4) as figure:
        rows = figure.subplots(2, len(steps), squeeze=False)
        for row, (x, x_label), (y, y_label) in zip(rows, (estimate, elbo), (elbo, log_ratio)):
            for axis, step in zip(row, steps):
                part = samples[samples["step"] == step]
                scatter_by_reward(axis, part, x, y)
                identity_line(axis)
                r = correlation(*torch.tensor(part[[x, y]].to_numpy()).T)
                axis.set(title=f"step {step}" + ("" if r is None else f": r = {r:.2f}"))
                axis.set_xlabel(x_label)
                axis.locator_params(nbins=4)
            row[0].set_ylabel(f"{y_label}, nats")
        figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def gap_summary_figure(summary: pd.DataFrame) -> Figure:
    """Through training: ELBO gaps, means of the exact values, and correlations.

    Whiskers: 95 % bootstrap over problems.
    """
    with new_figure(PAGE, 2.2) as figure:
        gaps, means, correlations = figure.subplots(1, 3)
        draw_column(gaps, summary, "elbo_gap_solved", POLICY, "solved", marker="o")
        draw_column(gaps, summary, "elbo_gap_not_solved", TARGET, "not solved", marker="^")
        gaps.set(title="Random-order log π\n− ELBO, nats", xlabel="step", ylim=(0, None))
        _draw_interval(means, summary, "mean_d_exact", POLICY, "o", "ELBO ratio")
        _draw_interval(means, summary, "mean_random_order", TARGET, "^", "random-order log-ratio")
        means.axhline(0, color=REFERENCE, linewidth=0.8, linestyle=":")
        means.set(title="Mean exact value\non policy, nats", xlabel="step")
        _draw_interval(correlations, summary, "r_estimate", POLICY, "o", "estimate d")
        _draw_interval(
            correlations, summary, "r_random_order", TARGET, "^", "random-order log-ratio"
        )
        correlations.set(
            title="Correlation with the\nexact ELBO ratio", xlabel="step", ylim=(None, 1.05)
        )
        for axis in figure.axes:
            axis.legend().set_in_layout(False)
    return figure


def _draw_interval(
    axis: Axes, frame: pd.DataFrame, column: str, color: str, marker: str, label: str
) -> None:
    """A column against the step with its interval, the columns <column>_low and <column>_high."""
    part = frame.dropna(subset=column)
    low = part[f"{column}_low"].fillna(part[column])
    high = part[f"{column}_high"].fillna(part[column])
    axis.errorbar(
        part["step"],
        part[column],
        [(part[column] - low).clip(lower=0), (high - part[column]).clip(lower=0)],
        color=color,
        marker=marker,
        label=label,
        capsize=1.5,
        elinewidth=0.6,
    )
