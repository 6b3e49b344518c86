"""One function a figure: records or frames in, a matplotlib Figure out; no files, no global state.

Log-ratios in nats, in the unit that the run's lam was chosen for.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rspo_lab.figures.style import (
    COLUMN,
    INK,
    OKABE_ITO,
    PAGE,
    POLICY,
    REFERENCE,
    TARGET,
    new_figure,
)
from rspo_lab.statistics import mean_interval, wilson

PARAMETERS = {"lam": "λ, per nat", "lr": "learning rate", "views": "masks a sequence, K"}


def training_figure(history: list[dict], lam: float) -> Figure:
    """Six panels of one run: reward and held-out solve rate, d, gap to the target, mask noise,
    correction, gradient.
    """
    frame = pd.DataFrame(history)
    with new_figure(PAGE, 3.4) as figure:
        (reward, mean_d, gap), (noise, correction, gradient) = figure.subplots(2, 3)
        _line(reward, frame, "reward", POLICY, "sampled", smooth=True)
        _line(reward, frame, "eval_solve_rate", TARGET, "held out, greedy", marker="o")
        reward.set(title="Reward, solve rate", ylim=(0, 1))
        _line(mean_d, frame, "d_mean", POLICY, "d", smooth=True)
        mean_d.axhline(0, color=REFERENCE, linewidth=0.8, linestyle=":")
        mean_d.set(title="Mean of d on policy, nats")
        if lam > 0:
            _line(
                gap,
                frame.replace({"target_rms": {0: np.nan}}),
                "target_rms",
                TARGET,
                "target A/λ",
                smooth=True,
            )
            _line(
                gap,
                frame.replace({"gap_rms": {0: np.nan}}),
                "gap_rms",
                POLICY,
                "gap A/λ − d̂",
                smooth=True,
            )
        _line(gap, frame[frame["step"] > 1], "d_sd", INK, "estimate d̂", smooth=True)
        gap.set(title="Target, gap, d̂: rms, nats", yscale="log")
        _line(noise, frame, "mask_sd", POLICY, "mask noise", smooth=True)
        noise.set(title="Mask noise: sd of one d", xlabel="step", ylim=(0, None))
        _line(correction, frame, "calibration_ratio", POLICY, "λ sd(d̂) / sd(A)", smooth=True)
        _line(correction, frame, "sign_flips", TARGET, "share of sign flips", smooth=True)
        correction.set(title="How much λ corrects", xlabel="step", ylim=(0, None))
        _line(gradient, frame, "gradient_norm", POLICY, "gradient", smooth=True)
        gradient.set(title="Gradient norm", xlabel="step", yscale="log")
        for axis in figure.axes:
            axis.set_xlim(0, max(1, frame["step"].max()))
            axis.minorticks_off()
            if len(axis.get_legend_handles_labels()[0]) > 1:
                axis.legend(loc="best").set_in_layout(False)
    return figure


def learning_figure(arms: dict[str, list[pd.DataFrame]], problems: dict[str, int]) -> Figure:
    """Held-out solve rate against the step and the mean of d on policy, a line an arm: means over
    the histories of its seeds.

    Bars: 95 % Student over seeds; of a single seed Wilson over the `problems` of its arm.
    """
    with new_figure(PAGE, 1.9 + 0.2 * _rows_of_legend(arms)) as figure:
        left, right = figure.subplots(1, 2)
        for (label, seeds), look in zip(arms.items(), _looks(len(arms))):
            rates = pd.concat(
                [seed.set_index("step")["eval_solve_rate"] for seed in seeds], axis=1
            ).dropna()
            mean, low, high = np.array(
                [_rate(list(row), problems[label]) for row in rates.to_numpy()]
            ).T
            left.errorbar(
                rates.index,
                mean,
                [mean - low, high - mean],
                **look,
                label=label,
                elinewidth=0.5,
                capsize=1.5,
            )
            means = [
                seed.set_index("step").get("d_mean", pd.Series(dtype=float)) for seed in seeds
            ]  # none if all groups were skipped
            d = pd.concat(means, axis=1).mean(axis=1).rename("d_mean").reset_index()
            _line(
                right, d, "d_mean", look["color"], label, smooth=True, linestyle=look["linestyle"]
            )
        left.set(xlabel="step", title="Held-out solve rate, greedy", ylim=_within(left))
        right.axhline(0, color=REFERENCE, linewidth=0.8, linestyle=":")
        right.set(xlabel="step", title="Mean ELBO log-ratio on policy, nats")
        if max(map(abs, right.get_ylim())) > 5:  # one of them came apart
            right.set_yscale("symlog")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def arms_figure(arms: dict[str, list[pd.DataFrame]]) -> Figure:
    """Held-out solve rate against step, scoring forwards and seconds, a line an arm: mean over its
    seeds, bars 95 % Student.

    An arm is shown at the steps at which all its seeds were evaluated.
    """
    with new_figure(PAGE, 1.9 + 0.2 * _rows_of_legend(arms)) as figure:
        axes = figure.subplots(1, 3, sharey=True)
        for (label, seeds), look in zip(arms.items(), _looks(len(arms))):
            shared = set.intersection(*(set(seed["step"]) for seed in seeds))
            seeds = [seed[seed["step"].isin(shared)] for seed in seeds]
            total: Any = sum(seed[["step", "forwards", "seconds"]].to_numpy() for seed in seeds)
            spent = total / len(seeds)
            rates = [
                mean_interval(row) if len(row) > 1 else row * 3
                for row in map(list, zip(*(seed["rate"] for seed in seeds)))
            ]
            mean, low, high = np.array(rates).T
            for axis, column in zip(axes, range(3)):
                axis.errorbar(
                    spent[:, column],
                    mean,
                    [mean - low, high - mean],
                    **look,
                    label=label,
                    elinewidth=0.5,
                    capsize=1.5,
                )
        for axis, label in zip(
            axes, ("step", "scoring forwards a completion", "seconds of updates")
        ):
            axis.set_xlabel(label)
        axes[0].set(title="Held-out solve rate, greedy", ylim=_within(axes[0]))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def response_figure(parameter: str, rates: pd.DataFrame) -> Figure:
    """Final held-out solve rate in % against one parameter; rows with value, rate, low and high."""
    values = rates["value"].to_numpy(float)
    with new_figure(COLUMN, 2.0) as figure:
        axis = figure.subplots()
        whiskers = [rates["rate"] - rates["low"], rates["high"] - rates["rate"]]
        axis.errorbar(
            values, rates["rate"], whiskers, color=POLICY, marker="o", elinewidth=0.7, capsize=2
        )
        positive = values[values > 0]
        if len(positive) and positive.max() / positive.min() > 20:
            axis.set_xscale(
                "symlog" if values.min() <= 0 else "log",
                **({"linthresh": positive.min()} if values.min() <= 0 else {}),
            )
            axis.set_xticks(values, [f"{v:g}" for v in values])
            axis.minorticks_off()
        axis.set(
            xlabel=PARAMETERS.get(parameter, parameter),
            ylabel="solve rate, %",
            title="Final held-out solve rate, greedy",
        )
    return figure


def gap_figure(samples: pd.DataFrame) -> Figure:
    """Target against estimate, a panel a saved policy with its regression line, and the
    distribution of the gap.
    """
    steps = sorted(samples["step"].unique())
    with new_figure(PAGE, 1.9) as figure:
        axes = figure.subplots(1, len(steps) + 1)
        for axis, step in zip(axes, steps):
            part = samples[samples["step"] == step]
            _scatter(axis, part, "d_hat", "target")
            if part["d_hat"].std() > 0:
                span = np.array([part["d_hat"].min(), part["d_hat"].max()])
                axis.plot(
                    span, np.polyval(np.polyfit(part["d_hat"], part["target"], 1), span), color=INK
                )
            axis.axline((0, 0), slope=1, color=INK, linewidth=0.7, linestyle="--")
            axis.set(title=f"step {step}", xlabel="d̂, nats")
            axis.locator_params(axis="x", nbins=3)
        axes[0].set_ylabel("target A/λ, nats")
        gaps = [samples[samples["step"] == step]["gap"] for step in steps]
        axes[-1].boxplot(
            gaps,
            tick_labels=[str(step) for step in steps],
            whis=(5, 95),
            sym="",
            medianprops={"color": TARGET},
        )
        axes[-1].set(title="gap, nats", xlabel="step")
        axes[-1].tick_params(axis="x", labelsize=5.5)
    return figure


def exact_figure(samples: pd.DataFrame) -> Figure:
    """Above: estimate against exact ELBO ratio (mask noise).  Below: that against the exact
    log-ratio (bias of the ELBO).
    """
    steps = sorted(samples["step"].unique())
    with new_figure(PAGE, 3.2) as figure:
        rows = figure.subplots(2, len(steps), squeeze=False)
        for row, (x, y, x_label, y_label) in zip(
            rows,
            (
                ("d", "d_exact", "estimate d", "exact ELBO ratio"),
                ("d_exact", "log_ratio", "exact ELBO ratio", "exact log π/π_ref"),
            ),
        ):
            for axis, step in zip(row, steps):
                part = samples[samples["step"] == step]
                _scatter(axis, part, x, y)
                axis.axline((0, 0), slope=1, color=INK, linewidth=0.7, linestyle="--")
                r = part[x].corr(part[y]) if part[x].std() > 0 and part[y].std() > 0 else np.nan
                axis.set(title=f"step {step}: r = {r:.2f}", xlabel=f"{x_label}, nats")
                axis.locator_params(nbins=4)
            row[0].set_ylabel(f"{y_label}, nats")
        figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def pretraining_figure(records: list[dict]) -> Figure:
    """Cross-entropy and solve rate of a base model against the step."""
    frame = pd.DataFrame(records)
    with new_figure(PAGE, 1.9) as figure:
        left, right = figure.subplots(1, 2)
        _line(left, frame, "loss", POLICY, "loss", marker="o")
        left.set(title="Cross-entropy of a hidden token, nats", xlabel="step", yscale="log")
        _line(right, frame, "solve_rate", TARGET, "solve rate", marker="o")
        right.set(title="Solve rate on unseen problems (greedy)", xlabel="step", ylim=(0, 1))
    return figure


def decoding_figure(decoding: pd.DataFrame, title: str) -> Figure:
    """One completion as it was decoded: a row a step, what stands by then; bold where written,
    darker the more confident.
    """
    steps = decoding["step"].max() + 1
    shade = np.full((steps, len(decoding)), np.nan)
    with new_figure(PAGE, 0.8 + 0.16 * steps) as figure:
        axis = figure.subplots()
        for place, (token, at, sure) in enumerate(
            decoding[["token", "step", "confidence"]].itertuples(index=False)
        ):
            shade[max(at, 0) :, place] = sure if at >= 0 else np.nan
            for step in range(max(at, 0), steps):
                axis.text(
                    place,
                    step,
                    token,
                    ha="center",
                    va="center",
                    fontsize=7,
                    fontweight="bold" if step == at else "normal",
                    color="black" if at >= 0 else "#999999",
                )
        image = axis.imshow(shade, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
        axis.set(
            title=title,
            xlabel="position",
            ylabel="denoising step",
            xticks=range(len(decoding)),
            yticks=range(0, steps, 2),
        )
        axis.grid(False)
        bar = figure.colorbar(image, ax=axis, fraction=0.04, boundaries=np.linspace(0, 1, 51))
        bar.set_label("confidence")
        bar.set_ticks([0, 0.5, 1])
    return figure


def gap_summary_figure(summary: pd.DataFrame) -> Figure:
    """Through training: ELBO gaps, mean exact log-ratios, and what of the estimate is signal; 95 %
    bootstrap over problems.
    """
    with new_figure(PAGE, 2.0) as figure:
        gaps, means, correlations = figure.subplots(1, 3)
        _line(gaps, summary, "elbo_gap_solved", POLICY, "solved", marker="o")
        _line(gaps, summary, "elbo_gap_not_solved", TARGET, "not solved", marker="^")
        gaps.set(title="log π − ELBO, nats", xlabel="step", ylim=(0, None))
        _bars(means, summary, "mean_d_exact", POLICY, "o", "ELBO ratio")
        _bars(means, summary, "mean_log_ratio", TARGET, "^", "log-ratio")
        means.axhline(0, color=REFERENCE, linewidth=0.8, linestyle=":")
        means.set(title="Mean exact value, nats", xlabel="step")
        _bars(correlations, summary, "r_estimate", POLICY, "o", "estimate, ELBO ratio")
        _bars(correlations, summary, "r_log_ratio", TARGET, "^", "ELBO ratio, log-ratio")
        correlations.set(title="Correlation", xlabel="step", ylim=(None, 1.05))
        for axis in figure.axes:
            axis.legend().set_in_layout(False)
    return figure


def pairs_figure(pairs: pd.DataFrame, lam: float) -> Figure:
    """Estimate against advantage at the first and the last evaluated step; the line is the target
    A/lam.
    """
    steps = sorted(pairs["step"].unique())
    if not steps:  # stopped before the first evaluation
        with new_figure(PAGE, 2.2) as figure:
            figure.subplots().set(
                title="no step is evaluated yet", xlabel="advantage A", ylabel="estimate d̂, nats"
            )
        return figure
    steps = [steps[0], steps[-1]]
    with new_figure(PAGE, 2.2) as figure:
        for axis, step in zip(figure.subplots(1, 2, sharex=True, sharey=True), steps):
            part = pairs[pairs["step"] == step]
            d_hat = part["d"] - part["d"].mean()
            for won, colour in ((False, TARGET), (True, POLICY)):
                some = (part["reward"] == 1) == won
                axis.scatter(
                    part["advantage"][some],
                    d_hat[some],
                    s=6,
                    alpha=0.5,
                    linewidths=0,
                    color=colour,
                    label="solved" if won else "not solved",
                )
            low, high = axis.get_ylim()
            if lam > 0:
                span = np.array([part["advantage"].min(), part["advantage"].max()])
                axis.plot(
                    span, span / lam, color=INK, linewidth=0.8, linestyle="--", label="target A/λ"
                )
                axis.set_ylim(low, high)
            axis.set(title=f"step {step}", xlabel="advantage A", ylabel="estimate d̂, nats")
        figure.axes[0].legend()
    return figure


def _looks(n: int) -> list[dict]:
    """Colour, marker and line of n arms; no two of 144 have all three in common."""
    colours = [
        OKABE_ITO[name] for name in ("blue", "vermillion", "green", "orange", "purple", "sky")
    ]
    markers, lines = "os^DPX", ("-", "--", ":", "-.")
    return [
        {
            "color": colours[i % 6],
            "marker": markers[(i + i // 24) % 6],
            "linestyle": lines[i // 6 % 4],
        }
        for i in range(n)
    ]


def _rows_of_legend(arms) -> int:
    return (len(arms) + 1) // 2


def _within(axis) -> tuple[float, float]:
    """The axis' limits, within those of a rate: few seeds make whiskers beyond."""
    low, high = axis.get_ylim()
    return max(low, 0.0), min(high, 1.0)


def _rate(rates: list[float], problems: int) -> tuple[float, float, float]:
    """(mean, low, high) over seeds, or of a single one over its problems."""
    return (
        mean_interval(rates)
        if len(rates) > 1
        else (rates[0], *wilson(round(rates[0] * problems), problems))
    )


def _bars(axis, frame, column, colour, marker, label):
    """A column over the step with its bootstrap interval."""
    part = frame.dropna(subset=column)
    low, high = (
        part[f"{column}_low"].fillna(part[column]),
        part[f"{column}_high"].fillna(part[column]),
    )
    whiskers = [(part[column] - low).clip(lower=0), (high - part[column]).clip(lower=0)]
    axis.errorbar(
        part["step"],
        part[column],
        whiskers,
        color=colour,
        marker=marker,
        label=label,
        capsize=1.5,
        elinewidth=0.6,
    )


def _scatter(axis, part, x, y):
    """A point a sequence, solved and unsolved ones apart."""
    for won, colour, marker in ((True, POLICY, "o"), (False, TARGET, "^")):
        some = part[(part["reward"] == 1) == won]
        axis.scatter(
            some[x],
            some[y],
            s=7,
            color=colour,
            marker=marker,
            alpha=0.5,
            linewidths=0,
            label="solved" if won else "not solved",
        )


def _line(axis, frame, column, colour, label, *, marker=None, smooth=False, linestyle="-"):
    """A column over the step; `smooth` draws its running mean over 9 steps on the pale raw values."""
    if column not in frame or frame[column].isna().all():
        return
    part = frame[["step", column]].dropna()
    if smooth and len(part) > 20:
        axis.plot(part["step"], part[column], color=colour, alpha=0.25, linewidth=0.6)
        part = part.assign(**{column: part[column].rolling(9, center=True, min_periods=1).mean()})
    axis.plot(
        part["step"], part[column], color=colour, label=label, marker=marker, linestyle=linestyle
    )
