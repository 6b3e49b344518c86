"""Saved policies held still, so that masks, views, lambda and prompt can be moved freely: what is
dear is made once.

Shapes: B = prompts x group sequences (group-major), U distinct ones of them, S subsets of u tokens,
n redraws.  Nats, nats^2.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rspo_lab.config import TrainConfig
from rspo_lab.decoding import complete, rewards
from rspo_lab.masks.designs import DESIGNS
from rspo_lab.masks.designs import design as design_named
from rspo_lab.measure.score_noise import TABLED, table_anova, table_estimates
from rspo_lab.models.diffusion_lm import DiffusionLM
from rspo_lab.models.loading import load
from rspo_lab.oracle import subset_tables, table_elbo
from rspo_lab.policies import reference_of, saved_policy, trained_run
from rspo_lab.random_streams import generator
from rspo_lab.rollouts import Rollouts, held_still
from rspo_lab.runs.files import read_json
from rspo_lab.statistics import variance_se
from rspo_lab.tasks import task as task_named

VIEWS = (1, 2, 4, 8, 16, 32)
COLUMNS = {"sudoku": 4}  # of the token grid of a compact completion; of any other 16


@dataclass(frozen=True)
class Look:
    """What is looked at: the position of every slider."""

    runs: tuple[str, ...]  # names of training runs, below each other
    step: int  # of each run the last policy saved by then
    design: str
    views: int  # K, masks a sequence
    lam: float  # lambda of target and weight, nats^-1
    quantity: str = "d"  # of the variances: d or score
    problem: int = 0  # of 0..prompts-1
    sampled: bool = False  # its completion is drawn as in training, else greedy
    draw: int = 0  # which draw of the K masks


@dataclass(frozen=True)
class Held:
    """A saved policy with rollouts of it and every mask's log-probs under policy and reference: a
    redraw is a look-up.
    """

    run: str
    step: int
    config: TrainConfig
    policy: DiffusionLM
    rollouts: Rollouts
    valid: Bool[Tensor, "U L"]
    which: Int[Tensor, " B"]  # the distinct completion that a sequence is
    ours: list[Float[Tensor, "S u"]]  # subset tables, one a distinct completion
    theirs: list[Float[Tensor, "S u"]]

    def tables(self, quantity: str) -> list[Float[Tensor, "S u"]]:
        """Of the policy's score, or of d = policy - reference on shared masks."""
        return self.ours if quantity == "score" else [a - b for a, b in zip(self.ours, self.theirs)]


@dataclass(frozen=True)
class Decoding:
    """How one problem is decoded, one token a step: `cells` has a row a position, with token, step
    (-1: given) and confidence.
    """

    title: str
    prompt: str
    cells: pd.DataFrame
    columns: int
    reward: float

    @property
    def frames(self) -> int:
        """Pictures of it: before the first step, and after each."""
        return int(self.cells["step"].max()) + 2


def training_runs(root: Path | str) -> dict[str, Path]:
    """{name: folder} of the training runs under `root` that have saved policies, the latest first;
    {} if there are none.
    """
    root = Path(root)
    latest = {}
    for place in root.rglob("snapshots"):
        saved = [p.stat().st_mtime for p in place.iterdir() if p.suffix != ".partial"]
        if saved and (place.parent / "config.json").is_file():
            latest[place.parent] = max(saved)
    return {
        _name(folder, root): folder
        for folder in sorted(latest, key=lambda folder: latest[folder], reverse=True)
    }


def required_runs(root: Path | str) -> dict[str, Path]:
    """`training_runs`, or FileNotFoundError where there are none."""
    if runs := training_runs(root):
        return runs
    raise FileNotFoundError(
        f"no training run with saved policies under {root}: run notebook 02_train, or give the folder of one as runs"
    )


def _name(folder: Path, root: Path) -> str:
    config = read_json(folder / "config.json")
    place = folder.name if folder == root else str(folder.relative_to(root))
    return f"{place}: {config.get('task')}, λ {config.get('lam'):g}, {config.get('steps')} steps, seed {config.get('seed')}"


def hold(run: str, folder: Path, step: int, *, prompts: int, group: int, seed: int) -> Held:
    """The policy of a training run at a saved step (0: its base), with `group` completions of each
    of `prompts` problems.

    ValueError for completions of more than 12 tokens, whose masks are too many to tabulate.
    """
    config, policies = trained_run(folder)
    placed = {"device": config.device, "dtype": getattr(torch, config.dtype)}
    policy, reference = load(policies[step], **placed), reference_of(load(config.model, **placed))
    rollouts = held_still(config, policy, prompts=prompts, group=group, seed=seed)
    batch, which = rollouts.batch.distinct()
    if (longest := int(batch.valid.sum(1).max())) > TABLED:
        raise ValueError(
            f"{run}: {longest} tokens are too many to tabulate all masks of (at most {TABLED}): notebook 03 measures them"
        )
    with torch.no_grad():
        ours, theirs = (
            [t.cpu() for t in subset_tables(model, batch)] for model in (policy, reference)
        )
    return Held(
        run,
        step,
        replace(config, group=group),
        policy,
        rollouts,
        batch.valid.cpu(),
        which.cpu(),
        ours,
        theirs,
    )


def variance_curve(
    held: Held, design: str, quantity: str, *, redraws: int, seed: int
) -> pd.DataFrame:
    """Variance over masks against K: columns design, views, cost, value, stderr; mean over the
    distinct completions.

    Of the design by `redraws` (a K that it cannot make is left out), and of `count` summed over all
    masks: stderr 0.
    cost: non-empty views a sequence.
    """
    tables, made, rows = held.tables(quantity), design_named(design), []
    for k in VIEWS:
        try:
            masks = made(
                held.valid.repeat_interleave(redraws, 0),
                k,
                generator=generator(seed, "explore variance", design, k),
            )
        except ValueError:  # an odd number of paired views
            continue
        variance, error = variance_se(table_estimates(tables, held.valid, masks))
        rows.append(
            (
                design,
                k,
                masks.forward_passes,
                variance.mean().item(),
                error.norm().item() / len(tables),
            )
        )
    one = torch.stack([table_anova(table).sum() for table in tables]).mean().item()
    rows += [("count, exact", k, float(k), one / k, 0.0) for k in VIEWS]
    return pd.DataFrame(rows, columns=["design", "views", "cost", "value", "stderr"])


def gap_points(
    held: Held, design: str, views: int, lam: float, *, seed: int, draw: int = 0
) -> pd.DataFrame:
    """A row a sequence: problem, reward, advantage A, d on `views` masks, d_exact = E d, d_hat
    (centred over all rows), and what
    RSPO makes of it: target A/lam, gap A/lam - d_hat, weight A - lam d_hat.  Rows of equal
    completions share their masks.

    ValueError for lam <= 0 and for a number of views that the design cannot make.
    """
    if lam <= 0:
        raise ValueError(f"the target A/lam needs lam > 0, not {lam}")
    tables = held.tables("d")
    masks = design_named(design)(held.valid, views, generator=generator(seed, "explore gap", draw))
    d = table_estimates(tables, held.valid, masks)[0][held.which].double()
    advantage, d_hat = held.rollouts.advantage.double().cpu(), d - d.mean()
    columns = {
        "reward": held.rollouts.reward,
        "advantage": advantage,
        "d": d,
        "d_exact": torch.stack([table_elbo(table) for table in tables])[held.which],
        "d_hat": d_hat,
        "target": advantage / lam,
        "gap": advantage / lam - d_hat,
        "weight": advantage - lam * d_hat,
    }
    problem = torch.arange(len(d)) // held.config.group
    return pd.DataFrame(
        {"problem": problem.numpy()} | {name: values.numpy() for name, values in columns.items()}
    )


def decode(held: Held, problem: int, *, sampled: bool, seed: int) -> Decoding:
    """One completion of a problem of `held`, one token a step: greedy, or drawn at the temperature
    of the run's rollouts.
    """
    config, task = held.config, task_named(held.config.task)
    example = held.rollouts.examples[problem * config.group]
    batch, rollout = complete(
        held.policy,
        task,
        [example],
        style=config.style,
        length=config.length,
        block=config.block,
        steps=0,
        temperature=config.temperature if sampled else 0.0,
        threshold=1.0,
        generator=generator(seed, "explore decoding", problem),
    )
    tokens = held.policy.tokenizer.convert_ids_to_tokens(batch.completion[0].tolist())
    cells = pd.DataFrame(
        {
            "token": tokens,
            "step": rollout.step[0].tolist(),
            "confidence": rollout.confidence[0].tolist(),
        }
    )
    (reward,) = rewards(held.policy, task, [example], batch.completion, style=config.style)
    columns = COLUMNS.get(config.task, 16) if config.style == "compact" else 16
    return Decoding(
        f"{held.run.split(':')[0]}, step {held.step}",
        task.prompt(example, config.style),
        cells,
        columns,
        reward,
    )


class Session:
    """Training runs to look at; policies with their tables, variances and decodings are kept once
    made.

    `on_hold(text)` is told what takes seconds before it begins.
    """

    def __init__(
        self, runs: dict[str, Path], *, prompts: int, group: int, redraws: int, seed: int
    ) -> None:
        self.runs, self.prompts, self.group, self.redraws, self.seed = (
            runs,
            prompts,
            group,
            redraws,
            seed,
        )
        self.on_hold: Callable[[str], None] = lambda text: None
        self._held: dict[tuple[str, int], Held] = {}
        self._curves: dict[tuple, pd.DataFrame] = {}
        self._decodings: dict[tuple, Decoding] = {}

    def first_look(
        self, *, step: int, design: str, views: int, lam: float, problem: int = 0
    ) -> Look:
        """At the latest run; step 0 is its last policy.  ValueError for what cannot be looked at."""
        name = next(iter(self.runs))
        step, _ = saved_policy(trained_run(self.runs[name])[1], step)
        design_named(design)(
            torch.ones(1, 4, dtype=torch.bool), views, generator=torch.Generator()
        )  # refuses views it cannot make
        if lam <= 0:
            raise ValueError(f"the target A/lam needs lam > 0, not {lam}")
        if not 0 <= problem < self.prompts:
            raise ValueError(
                f"problem must be one of 0 to {self.prompts - 1} (prompts = {self.prompts}), not {problem}"
            )
        return Look((name,), step, design, views, lam, problem=problem)

    def steps(self, names: tuple[str, ...]) -> list[int]:
        """The steps at which any of these runs saved a policy; 0 is the base."""
        return sorted({step for name in names for step in trained_run(self.runs[name])[1]})

    def held(self, look: Look) -> list[Held]:
        """Of every run looked at the last policy saved by the step."""
        found = []
        for name in look.runs:
            step = max(step for step in self.steps((name,)) if step <= look.step)
            if (name, step) not in self._held:
                self.on_hold(
                    f"{name.split(':')[0]}, step {step}: rolling out, and scoring every mask of every completion"
                )
                held = hold(
                    name,
                    self.runs[name],
                    step,
                    prompts=self.prompts,
                    group=self.group,
                    seed=self.seed,
                )
                self._held[name, step] = held
            found.append(self._held[name, step])
        return found

    def curves(self, look: Look) -> list[pd.DataFrame]:
        """`variance_curve` of every policy looked at."""
        found = []
        for held in self.held(look):
            key = (held.run, held.step, look.design, look.quantity)
            if key not in self._curves:
                self._curves[key] = variance_curve(
                    held, look.design, look.quantity, redraws=self.redraws, seed=self.seed
                )
            found.append(self._curves[key])
        return found

    def points(self, look: Look) -> list[pd.DataFrame]:
        """`gap_points` of every policy looked at."""
        return [
            gap_points(h, look.design, look.views, look.lam, seed=self.seed, draw=look.draw)
            for h in self.held(look)
        ]

    def decodings(self, look: Look) -> list[Decoding]:
        """`decode` of the problem under every policy looked at."""
        found = []
        for held in self.held(look):
            key = (held.run, held.step, look.problem, look.sampled)
            if key not in self._decodings:
                self._decodings[key] = decode(
                    held, look.problem, sampled=look.sampled, seed=self.seed
                )
            found.append(self._decodings[key])
        return found

    def problems(self, look: Look) -> list[str]:
        """The names of the problems, of the first run looked at."""
        return [e.id for e in self.held(look)[0].rollouts.examples[:: self.group]]

    def table(self, look: Look) -> pd.DataFrame:
        """The numbers behind all panels: the variance curves and the points, told apart by `panel`,
        with run and step.
        """
        parts = []
        for held, curve, points in zip(self.held(look), self.curves(look), self.points(look)):
            both = pd.concat(
                [curve.assign(panel="variance"), points.assign(panel="gap")], ignore_index=True
            )
            parts.append(both.assign(run=held.run, step=held.step, quantity=look.quantity))
        return pd.concat(parts, ignore_index=True)


def designs(first: str) -> list[str]:
    """Names to choose from: the one in hand, then all of `masks.DESIGNS`."""
    return [first, *(name for name in DESIGNS if name != first)]
