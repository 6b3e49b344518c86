"""One self-contained HTML page over the runs of a folder, and their numbers in one table: failures
first, then what was found.

Reads run folders as they are, so it also tells of a sweep that is under way.
"""

import base64
import html
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from rspo_lab.figures import estimator_variance as noise_plots
from rspo_lab.figures import train as plots
from rspo_lab.measure.score_noise import efficiency, factors
from rspo_lab.runs.files import read_json, replacing
from rspo_lab.runs.run import load_runs
from rspo_lab.sweeps.comparison import arm_curve, arms_table, history, response

RESULTS = ["task", "policy", "design", "views", "cost", "quantity", "value", "stderr"]
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
img { max-width: min(100%, 56rem); height: auto } figcaption { color: #555 } figure { margin: 1.5rem 0 } nav { columns: 2; margin: 1rem 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0; font-size: .8rem }
td, th { padding: .15rem .4rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
td { white-space: nowrap } td.text { white-space: normal }
td:first-child, th:first-child, td.text, .text th { text-align: left } .failed { color: #b00020 } section { break-inside: avoid-page }
@media print { body { font-size: 10pt; max-width: none; margin: 0 } table { font-size: 7pt }
  td, th { padding: .1rem .2rem; white-space: normal }
  .wide { overflow: visible } figure, table { break-inside: avoid } a { color: inherit; text-decoration: none } }
"""
CAPTIONS = {
    "training": "Training. Left to right: reward and held-out solve rate; mean of d on policy; target, gap and estimate; mask noise; "
    "how much λ corrects; gradient norm. Pale: every step; line: running mean of 9.",
    "pairs": "Estimate against advantage, a point a sequence; the dashed line is the target.",
    "variance": "Variance of score, d and RSPO gradient by mask design and cost; whiskers 95 % Monte-Carlo; dashed: 1/K from count.",
    "profile": "Noise of one view of d by how many tokens it hides.",
    "learning": "Left: greedy held-out solve rate, mean over seeds; bars: 95 % Student over seeds, of a single seed Wilson over the "
    "problems. Right: mean of d on policy.",
    "arms": "Held-out solve rate against steps, scoring forwards a completion (all models; a backward is two) and seconds of updates; "
    "mean over seeds, 95 % Student.",
    "response": "Final held-out solve rate; bars: 95 % Student over seeds, of a single seed Wilson over the problems.",
    "efficiency": "How many times lower than that of `count` each variance is at equal cost; 95 % Monte-Carlo of the redraws.",
    "bias": "Bias against the exact ELBO, 95 % Monte-Carlo whiskers.",
    "gap": "Target against estimate at each saved policy with its regression line; box: 25-75 %, whiskers 5-95 % of the gap.",
    "exact": "Estimate against exact ELBO ratio (mask noise), and exact ELBO ratio against exact log-ratio (bias of the ELBO).",
    "summary": "ELBO gap, mean log-ratio on policy, and correlations through training.",
}
NOTE = """Greedy held-out solve rates in %; n is in <i>seeds</i>, intervals are 95 %. <i>mean</i>: of all evaluations but the first.
Δ: points above the first arm, paired by seed. <i>bootstrap</i>: percentiles over seeds redrawn within a task, too narrow for few of
them; all others are Student's, or Wilson's over the problems where there is one seed. <i>forwards</i>: of scoring, a completion, all
models, a backward is two."""


@dataclass(frozen=True)
class Entry:
    """A run, or a point of a sweep that has not begun; `shown` are the parameters by which it
    differs from others of its kind.
    """

    name: str
    path: Path
    state: str
    params: dict[str, Any]
    progress: str = ""
    error: str = ""
    shown: tuple[str, ...] = ()

    def label(self, *without: str) -> str:
        return ", ".join(
            [
                self.name.replace("_", " "),
                *(f"{k} = {self.params.get(k)}" for k in self.shown if k not in without),
            ]
        )


def report(root: Path) -> Path:
    """index.html and results.parquet in `root`, figures and their numbers in its `figures`; the
    page.

    results.parquet: of measurements a tidy row a (task, policy, design, views, quantity), `policy`
    the run's label; if there are none, every run's own results with its name, key and the
    parameters that differ.  Where there are both, the latter are in training.parquet.
    FileNotFoundError, ValueError: there is no such folder, or no run in it.
    """
    root = root.resolve()
    entries = listing(root)
    if not entries:
        raise ValueError(f"there are no runs in {root}")
    (root / "figures").mkdir(exist_ok=True)
    counts = Counter(entry.state for entry in entries)
    parts = [
        f"<p>{len(entries)} runs: {', '.join(f'{n} {state}' for state, n in counts.items())}.</p>"
    ]
    parts += _failures([entry for entry in entries if entry.state in ("failed", "dead", "stopped")])
    parts += ["<h2>What was run</h2>", _wide(_what_ran(entries))]
    finished = [entry for entry in entries if entry.state == "done"]
    parts += _learning(root, finished) + _noise(root, finished)
    for entry in entries:
        images = sorted((entry.path / "figures").glob("*.png"))
        if images:
            parts += [
                f"<section><h2 id='{entry.path.name}'>{html.escape(entry.label())}</h2>",
                _provenance(root, entry.path),
            ]
            parts += [_figure(image) for image in images] + ["</section>"]
    title = read_json(root / "sweep.json").get("title", root.name)
    page = root / "index.html"
    with replacing(page) as new:
        head = (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        )
        head += "<meta name=viewport content='width=device-width'><link rel=icon href='data:,'>"
        body = "\n".join([f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>", *parts])
        new.write_text(f"{head}{body}</html>\n", encoding="utf-8")
    return page


def listing(root: Path) -> list[Entry]:
    """All runs under `root`, those of its sweep in its order first, with points that have not
    begun.
    """
    frame = load_runs(root)
    found = {row["path"]: row for _, row in frame.iterrows()} if len(frame) else {}
    entries = []
    for point in read_json(root / "sweep.json").get("points", ()):
        path = root / point["name"] / point["key"]
        if str(path) not in found:
            error = point.get("error", "")
            entries.append(
                Entry(
                    point["name"],
                    path,
                    "failed" if error else "waiting",
                    point["params"],
                    error=error,
                )
            )
        else:
            entries.append(_entry(root, found.pop(str(path))))
    entries += [_entry(root, row) for row in found.values()]
    named = {
        entry.name: [other for other in entries if other.name == entry.name] for entry in entries
    }
    shown = {name: tuple(_varying(runs)) for name, runs in named.items()}
    for name, runs in named.items():  # runs that differ in nothing but what they measure
        if len({replace(entry, shown=shown[name]).label() for entry in runs}) < len(runs):
            shown[name] += ("trained",) if any("trained" in entry.params for entry in runs) else ()
    return [replace(entry, shown=shown[entry.name]) for entry in entries]


def _varying(entries: Sequence[Entry]) -> list[str]:
    """The parameters in which runs of one kind differ, but for the folder that they measure."""
    names = dict.fromkeys(k for entry in entries for k in entry.params)
    return [
        k
        for k in names
        if k != "trained" and len({repr(entry.params.get(k)) for entry in entries}) > 1
    ]


def _entry(root: Path, row) -> Entry:
    """Of a row of `load_runs`; in a folder of several sweeps its name has the sweep's in front."""
    path = Path(row["path"])
    name = path.parent.relative_to(root).as_posix() if root in path.parents[1:] else row["name"]
    return Entry(
        name, path, row["state"], read_json(path / "params.json"), row["progress"], row["error"]
    )


def _failures(entries: Sequence[Entry]) -> list[str]:
    if not entries:
        return []
    rows = "".join(
        f"<tr><td class=text>{html.escape(e.label())}</td><td class=text>{e.state} {e.progress}</td>"
        f"<td class=text>{html.escape(e.error or 'its process is gone; run the sweep again to resume')}</td>"
        f"<td class=text>{html.escape(e.path.name)}</td></tr>"
        for e in entries
    )
    return [
        f"<h2 class=failed>Not done</h2><div class='wide text'><table><tr><th>run<th>state<th>why<th>key</tr>{rows}</table></div>"
    ]


def _what_ran(entries: Sequence[Entry]) -> pd.DataFrame:
    """A row a run: the parameters in which runs of one notebook differ are columns."""
    kinds, rows = {}, []
    for entry in entries:
        kinds.setdefault(tuple(entry.params), []).append(entry)
    columns = list(dict.fromkeys(k for kind in kinds.values() for k in _varying(kind)))
    for entry in entries:
        made = read_json(entry.path / "provenance.json")
        row = {"run": entry.name} | {k: _text(entry.params.get(k, "")) for k in columns}
        row |= {
            "state": entry.state,
            "progress": re.match(r"[\d/]*", entry.progress)[0],
            "minutes": _minutes(entry.path),
        }
        rows.append(
            row
            | {
                "commit": str(made.get("git") or "")[:8] + ("+" if made.get("dirty") else ""),
                "key": entry.path.name,
            }
        )
    return pd.DataFrame(rows)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _minutes(path: Path) -> str:
    status = read_json(path / "status.json")
    if "started" not in status or "ended" not in status:
        return ""
    return f"{(pd.Timestamp(status['ended']) - pd.Timestamp(status['started'])).total_seconds() / 60:.1f}"


def _learning(root: Path, entries: Sequence[Entry]) -> list[str]:
    """Table and figures of the training runs, an arm of seeds (and tasks) each."""
    arms: dict[str, list[Path]] = {}
    for entry in entries:
        if (entry.path / "metrics.jsonl").is_file() and (entry.path / "config.json").is_file():
            arms.setdefault(entry.label("seed", "task"), []).append(entry.path)
    if not arms:
        return []
    table = arms_table(arms)
    short = {
        "mean over evaluations, %": "mean, %",
        "final over the first, points": "Δ final",
        "mean over the first, points": "Δ mean",
    }
    parts = [
        "<h2>Learning</h2>",
        f"<p>{NOTE}</p>",
        _wide(table.rename(columns=short | {"forwards a completion": "forwards"})),
    ]
    problems = {
        name: read_json(paths[0] / "config.json")["eval_problems"] for name, paths in arms.items()
    }
    curves = {name: [pd.DataFrame(history(path)) for path in paths] for name, paths in arms.items()}
    seeds = {
        name: [read_json(path / "config.json")["seed"] for path in paths]
        for name, paths in arms.items()
    }
    data = pd.concat(
        [c.assign(arm=name, seed=s) for name in arms for s, c in zip(seeds[name], curves[name])]
    )
    one_task = len(set(table["task"])) == 1
    if one_task:
        parts += [_saved(root, "learning", plots.learning_figure(curves, problems), data)]
    if one_task and len(arms) > 1:
        parts += [
            _saved(
                root,
                "arms",
                plots.arms_figure(
                    {name: [arm_curve(p) for p in paths] for name, paths in arms.items()}
                ),
                table,
            )
        ]
    if one_task and (found := response(arms)):
        parts += [_saved(root, "response", plots.response_figure(*found), found[1])]
    return parts


def _noise(root: Path, entries: Sequence[Entry]) -> list[str]:
    """results.parquet, and tables and figure of the measurements of noise."""
    tidy, other = [], []
    for entry in entries:
        if (entry.path / "results.parquet").is_file():
            frame = pd.read_parquet(entry.path / "results.parquet")
            if set(RESULTS) <= set(frame):
                tidy.append(frame.assign(policy=entry.label())[RESULTS])
            else:
                for i, k in enumerate(("name", "key", *entry.shown)):
                    value = {"name": entry.name, "key": entry.path.name}.get(k, entry.params.get(k))
                    frame.insert(
                        i,
                        k if k not in frame else f"{k} (parameter)",
                        _text(value) if isinstance(value, list | dict) else value,
                    )
                other.append(frame)
    for frames, name in ((tidy or other, "results"), (other if tidy else [], "training")):
        if frames:
            with replacing(root / f"{name}.parquet") as path:
                pd.concat(frames, ignore_index=True).to_parquet(path)
    if not tidy:
        return []
    results = pd.concat(tidy, ignore_index=True)
    found, parts = efficiency(results), ["<h2>Noise of the estimates</h2>"]
    views = {name: _shared_views(found, name) for name in ("var_d_shared", "var_gradient")}
    if views := {name: k for name, k in views.items() if k}:
        parts += [_saved(root, "efficiency", noise_plots.efficiency_figure(found, views), found)]
    for baseline in ("count", "t_redraw"):
        if baseline in set(results["design"]) and len(table := factors(results, baseline)):
            parts += [
                f"<p>Times less variance than {baseline} at equal cost, with half a 95 % interval:</p>",
                _wide(table.reset_index()),
            ]
    for quantity in ("share", "correlation", "var_rollouts"):
        some = results[results["quantity"].str.startswith(quantity)]
        parts += (
            [_wide(some[["policy", "quantity", "value", "stderr"]].round(3))] if len(some) else []
        )
    return parts


def _shared_views(found: pd.DataFrame, quantity: str) -> int:
    """The most views that every policy was measured at; 0 if there is no such number."""
    views = [
        set(part["views"]) for _, part in found[found["quantity"] == quantity].groupby("policy")
    ]
    return max(set.intersection(*views), default=0) if views else 0


def _saved(root: Path, name: str, figure, data: pd.DataFrame) -> str:
    """A figure of the whole folder as png, pdf and csv, and its place on the page."""
    figure.savefig(root / "figures" / f"{name}.png", dpi=300)
    figure.savefig(root / "figures" / f"{name}.pdf", metadata={"CreationDate": None})
    data.to_csv(root / "figures" / f"{name}.csv", index=False)
    return _figure(root / "figures" / f"{name}.png")


def _figure(image: Path) -> str:
    caption = html.escape(CAPTIONS.get(image.stem, image.stem))
    data = base64.b64encode(image.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _wide(frame: pd.DataFrame) -> str:
    return f"<div class=wide>{frame.to_html(index=False, border=0)}</div>"


def _provenance(root: Path, path: Path) -> str:
    made, place = read_json(path / "provenance.json"), path.relative_to(root).as_posix()
    versions = ", ".join(f"{k} {v}" for k, v in made.get("versions", {}).items() if v)
    link = f'<a href="{quote(place)}/executed.ipynb">{html.escape(place)}/executed.ipynb</a>'
    return f"<p>{link} · commit {str(made.get('git'))[:10]} · {html.escape(str(made.get('device')))} · {html.escape(versions)}</p>"
