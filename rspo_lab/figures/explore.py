"""What the explorer shows: noise, target and weight of saved policies, and a completion's decoding.

Frames in; a Figure or a piece of HTML out; no files, no widgets.  Nats, nats².
"""

from html import escape
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from rspo_lab.figures.style import (
    INK,
    OKABE_ITO,
    TARGET,
    design_styles,
    identity_line,
    log_y,
    new_figure,
    scatter_by_reward,
)
from rspo_lab.statistics import correlation

# inches: of the figure, per row, for legend and titles above, for the labels below
WIDTH = 7.0
ROW = 2.2
TOP = 0.55
FOOT = 0.4

CELL = (
    '<div style="{style};border-radius:3px;text-align:center;padding:5px 0;height:44px;'
    'box-sizing:border-box"><div style="font:600 17px/20px monospace;white-space:pre">{text}</div>'
    '<div style="font:10px/12px sans-serif">{note}</div></div>'
)
GRID = (
    '<div style="display:inline-block;vertical-align:top;margin:0 24px 8px 0">'
    '<div style="font:12px/18px sans-serif"><b>{title}</b>: {verdict}<br>'
    "prompt <code>{prompt}</code></div>"
    '<div style="display:grid;grid-template-columns:repeat({columns},46px);gap:3px;margin-top:4px">'
    "{cells}</div></div>"
)


def panels_figure(
    labels: list[str], curves: list[pd.DataFrame], points: list[pd.DataFrame], selection
) -> Figure:
    """Per policy one row: variance against cost, target against d_hat, weight against advantage.

    curves, points: `session.variance_curve` and `session.gap_points` of each; selection: a
    `session.Selection`.  Rings mark the chosen K and the chosen problem's completions.
    """
    height = TOP + FOOT + ROW * len(labels) - 0.35
    with new_figure(WIDTH, height) as figure:
        figure.set_layout_engine("none")  # fixed places: no panel jumps as numbers change
        places = {"left": 0.1, "right": 0.985, "wspace": 0.27, "hspace": 0.25}
        places |= {"bottom": FOOT / height, "top": 1 - TOP / height}
        shape = {"squeeze": False, "sharex": "col", "sharey": "col", "gridspec_kw": places}
        rows = figure.subplots(len(labels), 3, **shape)
        for (variance, target, weight), label, curve, part in zip(rows, labels, curves, points):
            _draw_variance(variance, curve, selection)
            variance.set_ylabel(label)
            _draw_targets(target, part, selection.problem)
            _draw_weights(weight, part, selection.problem)
        names = ("forwards per completion", "centred ELBO log-ratio d̂, nats", "advantage A")
        for axis, name in zip(rows[-1], names):
            axis.set_xlabel(name)
        figure.legend(*rows[0, 1].get_legend_handles_labels(), loc="upper right", ncols=3)
    return figure


def _draw_variance(axis: Axes, curve: pd.DataFrame, selection) -> None:
    """The curve of the chosen design with its K marked, and that of `count`, on log axes."""
    exact = curve[curve["stderr"] == 0]
    name = {"d": "d", "score": "the score"}[selection.quantity]
    axis.set_title(f"Variance of {name}, nats²")
    if not (exact["value"] > 0).any():
        place = {"transform": axis.transAxes, "ha": "center", "fontsize": 7}
        axis.text(0.5, 0.5, "none: this is the reference", **place)
        return
    style: dict[str, Any] = {"color": OKABE_ITO["blue"], "linestyle": "--", "label": "count, exact"}
    axis.plot(exact["cost"], exact["value"], **style)
    drawn = curve[(curve["design"] == selection.design) & (curve["value"] > 0)]
    style = design_styles([selection.design])[selection.design] | {"label": selection.design}
    axis.errorbar(drawn["cost"], drawn["value"], 1.96 * drawn["stderr"], **style, capsize=1.5)
    chosen = drawn[drawn["views"] == selection.views]
    ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "color": TARGET}
    axis.plot(chosen["cost"], chosen["value"], **ring, linestyle="")
    if len(chosen):
        value = f"{chosen['value'].iloc[0]:.3g}"
        axis.set_title(f"Variance of {name}: {value} at K = {selection.views}")
    axis.set_xscale("log")
    log_y(axis)
    axis.set_xticks(exact["cost"], [f"{cost:g}" for cost in exact["cost"]])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.legend(loc="upper right")


def _draw_targets(axis: Axes, part: pd.DataFrame, problem: int) -> None:
    """Target against estimate: on the line the update would stop."""
    _draw_points(axis, part, "d_hat", "target", problem)
    identity_line(axis)
    r = correlation(*torch.tensor(np.ascontiguousarray(part[["d_hat", "target"]])).T)
    axis.set_title("Target A/λ, nats" + ("" if r is None else f" (r = {r:.2f})"))
    elbo, sampler = part["d_exact"].mean(), part["sampler_log_ratio"].mean()
    note = f"mean exact ELBO ratio {elbo:.2f}\nsampler's log-ratio {sampler:.2f} nats"
    place = {"transform": axis.transAxes, "va": "bottom", "fontsize": 5.5, "color": INK}
    axis.text(0.03, 0.03, note if pd.notna(sampler) else note.splitlines()[0] + " nats", **place)


def _draw_weights(axis: Axes, part: pd.DataFrame, problem: int) -> None:
    """Weight against advantage: on the line lam corrects nothing."""
    _draw_points(axis, part, "advantage", "weight", problem)
    identity_line(axis)
    axis.axhline(0, color=INK, linewidth=0.5)
    informed = part[part["advantage"] != 0]
    note = "A = 0: rewards agree"
    if len(informed):
        note = f"{informed['flipped'].sum()} of {len(informed)} flip"
    axis.set_title(f"Weight A − λd̂ ({note})")


def _draw_points(axis: Axes, part: pd.DataFrame, x: str, y: str, problem: int) -> None:
    """One point per completion; rings around those of the chosen problem."""
    scatter_by_reward(axis, part, x, y, size=12.0, alpha=0.6)
    chosen = part[part["problem"] == problem]
    ring = {"s": 45, "facecolors": "none", "edgecolors": INK, "linewidths": 0.8}
    axis.scatter(chosen[x], chosen[y], **ring, label="chosen problem")


def decoding_html(
    title: str, prompt: str, cells: pd.DataFrame, columns: int, reward: float, frame: int
) -> str:
    """The token grid after `frame` denoising steps.

    Given tokens are grey, written ones blue, paler the less confident; under a written token stand
    the step that wrote it, from 1, and its probability.  What the last step wrote has a frame.
    cells: one row per position, with token, step (-1: given) and confidence.
    """
    last = int(cells["step"].max()) + 1
    verdict = f"step {frame} of {last}"
    if frame >= last:
        verdict = "solved" if reward == 1 else "not solved"
    boxes = [
        _cell_html(token, step, confidence, frame)
        for token, step, confidence in cells[["token", "step", "confidence"]].itertuples(
            index=False
        )
    ]
    return GRID.format(
        title=escape(title),
        verdict=verdict,
        prompt=escape(prompt),
        columns=columns,
        cells="".join(boxes),
    )


def _cell_html(token: str, step: int, confidence: float, frame: int) -> str:
    """One token's box after `frame` steps."""
    if step >= frame:
        return CELL.format(style="background:#fff;color:#bbb", text="·", note="")
    if step < 0:
        return CELL.format(style="background:#e4e4e4;color:#555", text=escape(token), note="given")
    style = f"background:rgba(0,114,178,{0.08 + 0.5 * confidence:.2f});color:#000"
    if step == frame - 1:
        style += ";outline:3px solid #D55E00;outline-offset:-3px"
    note = f"{step + 1} · {100 * confidence:.0f}%"
    return CELL.format(style=style, text=escape(token), note=note)
