"""What the study found, on one page and in one table: reads run folders, writes HTML, PNG, PDF and CSV."""

import html
import json
from collections import Counter
from pathlib import Path

import pandas as pd

from rspo_lab import noise_plots, plots
from rspo_lab.diagnostics import mean_interval, wilson
from rspo_lab.files import read_json, replacing
from rspo_lab.score_noise import efficiency, factors
from rspo_lab.style import POLICY, TARGET

RESULTS = ["task", "policy", "design", "views", "cost", "quantity", "value", "stderr"]
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100%; height: auto } table { border-collapse: collapse; margin: 1rem 0 } figcaption { color: #555 }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd } td:first-child, th:first-child { text-align: left }
figure { margin: 2rem 0 } @media print { figure { break-inside: avoid } }
"""
CAPTIONS = {
    "training": "Training. Left to right: reward and held-out solve rate; mean of d on policy; target, gap and estimate; mask noise; "
    "how much λ corrects; gradient norm. Pale: every step; line: running mean of 9.",
    "pairs": "Estimate against advantage, a point a sequence; the dashed line is the target.",
    "variance": "Variance of score, d and RSPO gradient by mask design and cost; whiskers 95 % Monte-Carlo; dashed: 1/K from count.",
    "profile": "Noise of one view of d by how many tokens it hides.",
    "arms": "Held-out solve rate against steps, scoring forwards a completion (all models; a backward is two) and seconds of updates; "
    "mean over seeds, 95 % Student.",
    "efficiency": "How many times lower than that of `count` each variance is at equal cost; 95 % Monte-Carlo of the redraws.",
    "bias": "Bias against the exact ELBO, 95 % Monte-Carlo whiskers.",
    "gap": "Target against estimate at each saved policy with its regression line; box: 25-75 %, whiskers 5-95 % of the gap.",
    "exact": "Estimate against exact ELBO ratio (mask noise), and exact ELBO ratio against exact log-ratio (bias of the ELBO).",
    "summary": "ELBO gap, mean log-ratio on policy, and correlations through training.",
}


def study_page(root: Path, trained: dict[str, Path], variance: Path, gap: Path) -> Path:
    """index.html over two training runs and what was measured on the first, with the figure of the pair."""
    histories = {label: history(path) for label, path in trained.items()}
    curves = pd.concat([pd.DataFrame(h).assign(run=label) for label, h in histories.items()])
    problems = read_json(next(iter(trained.values())) / "config.json")["eval_problems"]
    figure = plots.learning_figure(histories, dict(zip(histories, (POLICY, TARGET))), problems)
    folder = root / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "learning.png", dpi=300)
    figure.savefig(folder / "learning.pdf", metadata={"CreationDate": None})
    curves.to_csv(folder / "learning.csv", index=False)
    rows = pd.DataFrame([solve_rates(label, trained[label], records) for label, records in histories.items()])
    parts = [
        "<h1>RSPO on the tiny model</h1>",
        "<p>Everything here was computed by this checkout; each section names its run folder, which holds the executed notebook.</p>",
        _figure(root, folder / "learning.png", "Held-out solve rate (95 % Wilson intervals over problems, one seed) and mean of d."),
        rows.to_html(index=False, border=0),
    ]
    for title, path in [*((f"Training: {label}", path) for label, path in trained.items()), ("Variance", variance), ("Gap", gap)]:
        parts += [f"<h2>{html.escape(title)}</h2>", _provenance(root, path)]
        parts += [_figure(root, png, CAPTIONS[png.stem]) for png in sorted((path / "figures").glob("*.png"))]
    return _write_page(root, "rspo-lab study", parts)


def sheet_page(root: Path, title: str, runs: list[tuple[str, Path]]) -> Path:
    """index.html over the runs of a study's file: the arms of training against each other, measurements against `count`, all figures.

    Writes results.parquet, a tidy row a (task, policy, design, views, quantity) with `policy` the name of its run, arms.csv and
    efficiency.csv, as far as there are such runs.
    """
    parts, folder = [f"<h1>{html.escape(title)}</h1>"], root / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    arms: dict[str, list[Path]] = {}
    for name, path in runs:
        if (path / "metrics.jsonl").is_file() and "old_views" in read_json(path / "config.json"):
            arms.setdefault(name, []).append(path)
    arms = {name: paths for name, paths in arms.items() if len(paths) > 1}
    if arms:
        table = arms_table(arms)
        parts += [_saved(root, "arms", plots.arms_figure({name: [arm_curve(p) for p in paths] for name, paths in arms.items()}), table)]
        parts += [table.to_html(index=False, border=0)]
    times, frames = Counter(name for name, _ in runs), []
    for name, path in runs:
        if (path / "results.parquet").is_file():
            label = name if times[name] == 1 else f"{name} (seed {read_json(path / 'params.json')['seed']})"
            frames.append(pd.read_parquet(path / "results.parquet").assign(policy=label))
    frames = [frame[RESULTS] for frame in frames if set(RESULTS) <= set(frame)]
    if frames:
        results = pd.concat(frames, ignore_index=True)
        with replacing(root / "results.parquet") as path:
            results.to_parquet(path)
        found = efficiency(results)
        views = {name: _shared_views(found, name) for name in ("var_d_shared", "var_gradient")}
        if views := {name: k for name, k in views.items() if k}:
            parts += [_saved(root, "efficiency", noise_plots.efficiency_figure(found, views), found)]
        for baseline in ("count", "t_redraw"):
            if baseline in set(results["design"]):
                parts += [f"<p>Times less variance than {baseline} at equal cost:</p>"]
                parts += [factors(results, baseline).reset_index().to_html(index=False, border=0)]
        for quantity in ("share", "correlation", "var_rollouts"):
            some = results[results["quantity"].str.startswith(quantity)]
            parts += [some[["policy", "quantity", "value", "stderr"]].round(3).to_html(index=False, border=0)] if len(some) else []
    for name, path in runs:
        parts += [f"<h2>{html.escape(name)}</h2>", _provenance(root, path)]
        parts += [_figure(root, png, CAPTIONS[png.stem]) for png in sorted((path / "figures").glob("*.png"))]
    return _write_page(root, title, parts)


def arm_curve(path: Path) -> pd.DataFrame:
    """A run's evaluations: step, rate, and what scoring had cost by then (forwards a completion, seconds of updates)."""
    timing = [json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()]
    frame = pd.DataFrame(history(path)).set_index("step")
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
    """A row an arm: final and mean held-out solve rate in % over its seeds with 95 % Student intervals, and what scoring cost.

    "over the first": points above the first arm, final and mean, paired by seed (equal seeds start from equal rollouts).
    """
    rows, first = [], None
    for name, paths in arms.items():
        curves = [arm_curve(path) for path in paths]
        final, area = ([100 * f(c["rate"]) for c in curves] for f in (lambda r: r.iloc[-1], lambda r: r.iloc[1:].mean()))
        by_seed = {read_json(path / "config.json")["seed"]: pair for path, pair in zip(paths, zip(final, area))}
        first = first or by_seed
        row = {"arm": name, "seeds": len(paths), "each seed": " ".join(f"{v:.1f}" for v in final)}
        for label, values in (("final, %", final), ("mean over evaluations, %", area)):
            mean, low, high = mean_interval(values)
            row[label] = f"{mean:.1f} [{low:.1f}, {high:.1f}]"
        shared = [seed for seed in by_seed if seed in first]
        if len(shared) > 1 and first is not by_seed:
            for i, label in enumerate(("final", "mean")):
                mean, low, high = mean_interval([by_seed[seed][i] - first[seed][i] for seed in shared])
                row[f"{label} over the first, points"] = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        row["forwards a completion"] = f"{sum(c['forwards'].iloc[-1] for c in curves) / len(curves):.0f}"
        rows.append(row | {"update s": f"{sum(c['seconds'].iloc[-1] for c in curves) / len(curves):.0f}"})
    return pd.DataFrame(rows).fillna("")


def _shared_views(found: pd.DataFrame, quantity: str) -> int:
    """The most views that every policy was measured at; 0 if there is no such number."""
    views = [set(part["views"]) for _, part in found[found["quantity"] == quantity].groupby("policy")]
    return max(set.intersection(*views), default=0) if views else 0


def _saved(root: Path, name: str, figure, data: pd.DataFrame) -> str:
    """A figure of the whole study as png, pdf and csv, and its place on the page."""
    figure.savefig(root / "figures" / f"{name}.png", dpi=300)
    figure.savefig(root / "figures" / f"{name}.pdf", metadata={"CreationDate": None})
    data.to_csv(root / "figures" / f"{name}.csv", index=False)
    return _figure(root, root / "figures" / f"{name}.png", CAPTIONS[name])


def _write_page(root: Path, title: str, parts: list[str]) -> Path:
    page = root / "index.html"
    with replacing(page) as new:
        head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        new.write_text(head + "\n".join(parts) + "</html>\n", encoding="utf-8")
    return page


def history(path: Path) -> list[dict]:
    """The records of a training run's metrics.jsonl."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def solve_rates(label: str, path: Path, records: list[dict]) -> dict:
    """Base and final greedy held-out solve rate in %, with Wilson intervals, and the CPU-free cost of getting there."""
    n = read_json(path / "config.json")["eval_problems"]
    evaluated = [r["eval_solve_rate"] for r in records if "eval_solve_rate" in r]
    seconds = sum(t["rollout_s"] + t["update_s"] for t in map(json.loads, (path / "timing.jsonl").read_text().splitlines()))
    row = {"run": label}
    for name, rate in (("before", evaluated[0]), ("after", evaluated[-1])):
        low, high = wilson(round(rate * n), n)
        row[f"{name}, %"] = f"{100 * rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return row | {"lowest, %": f"{100 * min(evaluated):.1f}", "problems": n, "steps": records[-1]["step"], "training s": f"{seconds:.0f}"}


def grid_table(runs: list[Path]) -> pd.DataFrame:
    """A row a (task, lam, lr): solve rates of its seeds and 95 % Student intervals of the final one and of the gain, in points."""
    rows = []
    for path in runs:
        config, records = read_json(path / "config.json"), history(path)
        evaluated = [100 * r["eval_solve_rate"] for r in records if "eval_solve_rate" in r]
        timing = [json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()]
        minutes = sum(t["rollout_s"] + t["update_s"] for t in timing) / 60
        rows.append(
            {k: config[k] for k in ("task", "lam", "lr", "seed")} | {"before": evaluated[0], "after": evaluated[-1], "min": minutes}
        )
    table = []
    for (task, lam, lr), part in pd.DataFrame(rows).groupby(["task", "lam", "lr"], sort=False):
        after, gain = mean_interval(list(part["after"])), mean_interval(list(part["after"] - part["before"]))
        table.append(
            {
                "task": task, "lam": lam, "lr": lr, "seeds": len(part), "before": round(part["before"].mean(), 1),
                "each seed": " ".join(f"{v:.1f}" for v in part["after"]), "after": round(after[0], 1),
                "after_low": round(after[1], 1), "after_high": round(after[2], 1), "gain": round(gain[0], 1),
                "gain_low": round(gain[1], 1), "gain_high": round(gain[2], 1), "minutes_a_seed": round(part["min"].mean(), 1),
            }
        )  # fmt: skip
    return pd.DataFrame(table)


def _figure(root: Path, image: Path, caption: str) -> str:
    place = image.relative_to(root).as_posix()
    return f'<figure><img src="{place}" alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _provenance(root: Path, path: Path) -> str:
    made, place = read_json(path / "provenance.json"), path.relative_to(root).as_posix()
    versions = ", ".join(f"{k} {v}" for k, v in made.get("versions", {}).items())
    return (
        f'<p><a href="{place}/executed.ipynb">{place}/executed.ipynb</a> · commit {str(made.get("git"))[:10]} · {html.escape(versions)}</p>'
    )
