"""Training runs against each other: what each learned and what that cost, over the seeds of an arm.

An arm is all runs that differ in nothing but the seed (and the task, which then is a stratum).
Rates are greedy and held out.
"""

import json
from pathlib import Path

import pandas as pd

from rspo_lab.random_streams import generator
from rspo_lab.runs.files import read_json
from rspo_lab.statistics import mean_interval, stratified_bootstrap, wilson


def history(path: Path) -> list[dict]:
    """The records of a training run's metrics.jsonl; a last line that is still being written is
    left out.
    """
    text = (path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def arm_curve(path: Path) -> pd.DataFrame:
    """A run's evaluations: step, rate, and what scoring had cost by then (forwards a completion,
    seconds of updates).
    """
    timing = [json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()]
    if not (records := history(path)):
        raise ValueError(
            f"{path / 'metrics.jsonl'} is empty though its run is done: delete that folder and run it again"
        )
    frame = pd.DataFrame(records).set_index("step")
    spent = pd.DataFrame(timing).set_index("step")["update_s"].cumsum()
    forwards = frame["forwards"].fillna(0).cumsum()
    rate = frame["eval_solve_rate"].dropna()
    return pd.DataFrame(
        {
            "step": rate.index,
            "rate": rate.values,
            "forwards": forwards[rate.index].values,
            "seconds": spent.reindex(rate.index, fill_value=0).values,
        }
    )


def arms_table(arms: dict[str, list[Path]]) -> pd.DataFrame:
    """A row a (arm, task): held-out solve rates in % and what scoring cost; with several tasks also
    a row of all, "all".

    final and mean over evaluations (all but the first): mean over seeds with its 95 % Student
    interval; a single seed's final rate has its Wilson interval over the problems.  bootstrap: 95 %
    percentiles of the final mean over seeds redrawn within each task, too narrow for few seeds, and
    none where a task has a single one.  "over the first": points above the first arm on that task,
    paired by seed (equal seeds start from equal rollouts), Student.
    """
    rows, first = [], {}
    for name, paths in arms.items():
        runs: dict[str, dict[int, Path]] = {}
        for path in paths:
            config = read_json(path / "config.json")
            runs.setdefault(config["task"], {})[config["seed"]] = path
        finals = []
        for task, seeds in runs.items():
            curves = {seed: arm_curve(path) for seed, path in sorted(seeds.items())}
            found = {
                seed: (100 * c["rate"].iloc[-1], 100 * c["rate"].iloc[1:].mean())
                for seed, c in curves.items()
            }
            compared = first.setdefault(task, found)
            final, mean = ([pair[i] for pair in found.values()] for i in (0, 1))
            finals.append(final)
            before = [100 * c["rate"].iloc[0] for c in curves.values()]
            row = {
                "arm": name,
                "task": task,
                "seeds": len(found),
                "each seed": " ".join(f"{v:.1f}" for v in final),
            }
            row["before, %"] = f"{sum(before) / len(before):.1f}"
            row["final, %"] = _interval(
                final, read_json(next(iter(seeds.values())) / "config.json")["eval_problems"]
            )
            if len(final) > 1:
                row["final, bootstrap"] = "[{1:.1f}, {2:.1f}]".format(
                    *stratified_bootstrap([final], generator=generator(0, name, task))
                )
            row["mean over evaluations, %"] = _interval(mean)
            shared = [seed for seed in found if seed in compared]
            if len(shared) > 1 and found is not compared:
                for i, label in enumerate(("final", "mean")):
                    value = mean_interval([found[seed][i] - compared[seed][i] for seed in shared])
                    row[f"{label} over the first, points"] = "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                        *value
                    )
                    if len(shared) < len(found):
                        row[f"{label} over the first, points"] += f" (n = {len(shared)})"
            row["forwards a completion"] = (
                f"{sum(c['forwards'].iloc[-1] for c in curves.values()) / len(curves):.0f}"
            )
            rows.append(
                row
                | {
                    "update s": f"{sum(c['seconds'].iloc[-1] for c in curves.values()) / len(curves):.0f}"
                }
            )
        if len(finals) > 1:
            value = stratified_bootstrap(finals, generator=generator(0, name, "all"))
            row = {
                "arm": name,
                "task": "all",
                "seeds": sum(map(len, finals)),
                "final, %": f"{value[0]:.1f}",
            }
            if min(map(len, finals)) > 1:
                row["final, bootstrap"] = "[{1:.1f}, {2:.1f}]".format(*value)
            rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _interval(values: list[float], problems: int = 0) -> str:
    """The mean in % with its Student interval over seeds; of one seed, with Wilson's over the
    problems if they are counted.
    """
    if len(values) > 1:
        return "{:.1f} [{:.1f}, {:.1f}]".format(*mean_interval(values))
    if not problems:
        return f"{values[0]:.1f}"
    low, high = wilson(round(values[0] * problems / 100), problems)
    return f"{values[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}] (Wilson)"


def response(arms: dict[str, list[Path]]) -> tuple[str, pd.DataFrame] | None:
    """(parameter, a row an arm: its value, mean final rate in %, low, high) if the arms differ in
    just one number, else None.
    """
    configs = [read_json(paths[0] / "config.json") for paths in arms.values()]
    varies = (
        [
            k
            for k in configs[0]
            if len({repr(config.get(k)) for config in configs}) > 1 and k != "seed"
        ]
        if configs
        else []
    )
    if (
        len(varies) != 1
        or len(arms) < 3
        or not all(isinstance(config[varies[0]], int | float) for config in configs)
    ):
        return None
    rows = []
    for config, paths in zip(configs, arms.values()):
        finals = [100 * arm_curve(path)["rate"].iloc[-1] for path in paths]
        rate, problems = finals[0] / 100, config["eval_problems"]
        interval = (
            mean_interval(finals)
            if len(finals) > 1
            else (100 * x for x in (rate, *wilson(round(rate * problems), problems)))
        )
        rows.append((config[varies[0]], *interval, len(finals)))
    return varies[0], pd.DataFrame(
        rows, columns=["value", "rate", "low", "high", "seeds"]
    ).sort_values("value")
