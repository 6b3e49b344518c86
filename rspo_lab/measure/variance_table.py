"""Measured noise as tables: all rows of a study, and a design's noise at equal cost.

Shapes: frames of `score_noise.score_rows` and `gradient_noise.gradient_rows`.  Nats^2.
"""

import pandas as pd

INFINITE = {"t_iid", "t_redraw", "mirror"}  # the 1/t forms: designs whose variance does not exist
KEYS = ("task", "policy", "quantity", "views")  # what designs are compared at, where there


def tidy(*frames: pd.DataFrame, task: str, policy: str) -> pd.DataFrame:
    """All rows of a study, with what they were measured on in front."""
    frame = pd.concat(frames, ignore_index=True)
    frame.insert(0, "task", task)
    frame.insert(1, "policy", policy)
    return frame


def efficiency(results: pd.DataFrame, baseline: str = "count") -> pd.DataFrame:
    """How many times lower than the baseline's each variance is at equal cost.

    Columns: KEYS, design, cost, ratio, and half of its 95 % interval.  The ratio is (variance x
    cost) of the baseline over that of the design at as many views, its error to first order in
    those of both variances.  The 1/t forms are left out unless they are the baseline: their
    variance is infinite, so a ratio grows with the redraws.
    """
    masks = results["quantity"].str.startswith("var_") & (results["quantity"] != "var_rollouts")
    finite = ~results["design"].str.split("(").str[0].isin(INFINITE - {baseline})
    part = results[masks & finite]
    part = part[part["value"] > 0]  # a design without noise has no ratio
    part = part.assign(work=part["value"] * part["cost"], relative=part["stderr"] / part["value"])
    keys = [name for name in KEYS if name in part]
    base = part.loc[part["design"] == baseline, [*keys, "work", "relative"]]
    part = part.merge(base, on=keys, suffixes=("", "_baseline"))
    ratio = part["work_baseline"] / part["work"]
    half = 1.96 * ratio * (part["relative"] ** 2 + part["relative_baseline"] ** 2) ** 0.5
    return part[[*keys, "design", "cost"]].assign(ratio=ratio, half=half)


def factors(results: pd.DataFrame, baseline: str = "count") -> pd.DataFrame:
    """`efficiency` as "ratio ± half": one row per quantity and views, one column per design."""
    rows = efficiency(results, baseline)
    rows = rows[rows["design"] != baseline]
    text = [f"{ratio:.2f} ± {half:.2f}" for ratio, half in zip(rows["ratio"], rows["half"])]
    keys = [name for name in KEYS if name in rows]
    table = rows.assign(text=text).pivot(index=keys, columns="design", values="text")
    table = table[list(rows["design"].unique())]  # in the order measured, which pivot sorts
    order = rows[keys].drop_duplicates().apply(tuple, axis=1)
    return table.reindex(order).fillna("")
