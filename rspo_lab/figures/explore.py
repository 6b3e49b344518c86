"""What the explorer shows: variance, target and weight of policies held still, and a completion as
it is decoded.

Frames in; a matplotlib Figure or a piece of HTML out; no files, no widgets.  Nats, nats^2.
"""

from html import escape

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rspo_lab.figures.style import INK, OKABE_ITO, POLICY, TARGET, design_look, new_figure

WIDTH, ROW, TOP, FOOT = (
    7.0,
    2.2,
    0.55,
    0.4,
)  # inches: of all, of a row, of legend and titles, of the labels below


def panels_figure(
    labels: list[str], curves: list[pd.DataFrame], points: list[pd.DataFrame], look
) -> Figure:
    """A row a policy: variance against cost with the chosen K marked; target against d_hat; weight
    against advantage.

    `look` is an `explore.Look`.  Rings mark the chosen problem's completions.
    """
    height = TOP + FOOT + ROW * len(labels) - 0.35
    with new_figure(WIDTH, height) as figure:
        figure.set_layout_engine("none")  # fixed places: no panel jumps as numbers change
        places = {
            "left": 0.085,
            "right": 0.985,
            "bottom": FOOT / height,
            "top": 1 - TOP / height,
            "wspace": 0.27,
            "hspace": 0.25,
        }
        rows = figure.subplots(
            len(labels), 3, squeeze=False, sharex="col", sharey="col", gridspec_kw=places
        )
        for (variance, target, weight), label, curve, part in zip(rows, labels, curves, points):
            _variance(variance, curve, look)
            variance.set_ylabel(label)
            _points(target, part, "d_hat", "target", look.problem)
            target.axline((0, 0), slope=1, color=INK, linewidth=0.7, linestyle="--")
            r = (
                part["d_hat"].corr(part["target"])
                if part["d_hat"].std() > 0 and part["target"].std() > 0
                else np.nan
            )
            target.set_title("Target A/λ, nats" + (f" (r = {r:.2f})" if r == r else ""))
            _points(weight, part, "advantage", "weight", look.problem)
            weight.axline((0, 0), slope=1, color=INK, linewidth=0.7, linestyle="--")
            weight.axhline(0, color=INK, linewidth=0.5)
            told = part[part["advantage"] != 0]
            flips = f"{(told['weight'] * told['advantage'] < 0).sum()} of {len(told)} flip"
            weight.set_title(f"Weight A − λd̂ ({flips if len(told) else 'A = 0: rewards agree'})")
        for axis, name in zip(
            rows[-1], ("forwards a completion", "estimate d̂, nats", "advantage A")
        ):
            axis.set_xlabel(name)
        handles = dict(zip(*reversed(rows[0, 1].get_legend_handles_labels())))
        figure.legend(handles.values(), handles.keys(), loc="upper right", ncols=3)
    return figure


def _variance(axis, curve, look):
    """The curve of the chosen design with its K marked, and that of `count`, on log axes."""
    exact, chosen = curve[curve["stderr"] == 0], curve[curve["design"] == look.design]
    name = {"d": "d", "score": "the score"}[look.quantity]
    axis.set_title(f"Variance of {name}, nats²")
    if not (exact["value"] > 0).any():
        axis.text(
            0.5,
            0.5,
            "none: this is the reference",
            transform=axis.transAxes,
            ha="center",
            fontsize=7,
        )
        return
    style = design_look([look.design])[look.design]
    axis.plot(
        exact["cost"], exact["value"], color=OKABE_ITO["blue"], linestyle="--", label="count, exact"
    )
    seen = chosen[chosen["value"] > 0]
    axis.errorbar(
        seen["cost"], seen["value"], 1.96 * seen["stderr"], **style, label=look.design, capsize=1.5
    )
    here = seen[seen["views"] == look.views]
    axis.plot(
        here["cost"],
        here["value"],
        marker="o",
        markersize=10,
        markerfacecolor="none",
        color=TARGET,
        linestyle="",
    )
    if len(here):
        axis.set_title(f"Variance of {name}: {here['value'].iloc[0]:.3g} at K = {look.views}")
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(exact["cost"], [f"{cost:g}" for cost in exact["cost"]])
    axis.minorticks_off()
    axis.legend(loc="upper right")


def _points(axis, part, x, y, problem):
    """A point a sequence, solved and unsolved ones apart; rings around the problem's."""
    for won, colour, marker in ((True, POLICY, "o"), (False, TARGET, "^")):
        some = part[(part["reward"] == 1) == won]
        axis.scatter(
            some[x],
            some[y],
            s=12,
            color=colour,
            marker=marker,
            alpha=0.6,
            linewidths=0,
            label="solved" if won else "not solved",
        )
    own = part[part["problem"] == problem]
    axis.scatter(
        own[x],
        own[y],
        s=45,
        facecolors="none",
        edgecolors=INK,
        linewidths=0.8,
        label="chosen problem",
    )


def decoding_html(
    title: str, prompt: str, cells: pd.DataFrame, columns: int, reward: float, frame: int
) -> str:
    """The token grid after `frame` steps: what stands from the start in grey, what is written in
    blue, paler the less confident.

    Under a written token: the step that wrote it, from 1, and its probability in %.  What the last
    step wrote has a frame.
    """
    boxes, last = [], int(cells["step"].max()) + 1
    for token, step, confidence in cells[["token", "step", "confidence"]].itertuples(index=False):
        look, text, note = "background:#e4e4e4;color:#555", token, "given"
        if step >= frame:
            look, text, note = "background:#fff;color:#bbb", "·", ""
        elif step >= 0:
            look = f"background:rgba(0,114,178,{0.08 + 0.5 * confidence:.2f});color:#000"
            note = f"{step + 1} · {100 * confidence:.0f}%"
            if step == frame - 1:
                look += ";outline:3px solid #D55E00;outline-offset:-3px"
        boxes.append(
            f'<div style="{look};border-radius:3px;text-align:center;padding:5px 0;height:44px;box-sizing:border-box">'
            f'<div style="font:600 17px/20px monospace;white-space:pre">{escape(text)}</div>'
            f'<div style="font:10px/12px sans-serif">{note}</div></div>'
        )
    verdict = (
        ("solved" if reward == 1 else "not solved") if frame >= last else f"step {frame} of {last}"
    )
    return (
        f'<div style="display:inline-block;vertical-align:top;margin:0 24px 8px 0"><div style="font:12px/18px sans-serif">'
        f"<b>{escape(title)}</b>: {verdict}<br>prompt <code>{escape(prompt)}</code></div>"
        f'<div style="display:grid;grid-template-columns:repeat({columns},46px);gap:3px;margin-top:4px">{"".join(boxes)}</div></div>'
    )
