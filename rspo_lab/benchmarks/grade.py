"""Grades of completion files: how many a model got right, with a 95 % interval and the reasons for
the rest.

A file is jsonl with `question`, `completion` and `ground_truth` (countdown [numbers, target];
sudoku the 16-digit solution, its puzzle the 16 digits in `question`; gsm8k a number; math500
LaTeX).  Completions are in d1's style, the answer between <answer> tags, unless the row says
otherwise in `style`.  Rows of one `id` are samples for one problem.  Accuracies and bounds are
shares in [0, 1].
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rspo_lab.tasks import task as task_named
from rspo_lab.tasks.lines import field, objects
from rspo_lab.tasks.verdict import PROTOCOLS, Verdict, one_of

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal


@dataclass(frozen=True)
class Grade:
    """`correct` of `total` items (n of them), or of blank cells for sudoku under d1; `failures`
    counts items by kind.
    """

    task: str
    protocol: str
    n: int
    correct: int
    total: int
    accuracy: float
    low: float
    high: float
    failures: dict[str, int]
    verdicts: list[Verdict]

    def to_json(self) -> str:
        """One JSON object: everything but the verdicts."""
        return json.dumps({name: value for name, value in vars(self).items() if name != "verdicts"})

    def to_text(self) -> str:
        """A few lines to read."""
        unit = "blank cells" if (self.task, self.protocol) == ("sudoku", "d1") else "items"
        lines = [
            f"{self.task}, protocol {self.protocol}: {self.correct} of {self.total} {unit}",
            f"accuracy {100 * self.accuracy:.2f} %, 95 % interval {100 * self.low:.2f} to {100 * self.high:.2f} %",
        ]
        return "\n".join(lines + [f"  {count:5d}  {kind}" for kind, count in self.failures.items()])


def grade(path: str | Path, task: str, protocol: str = "strict") -> Grade:
    """Grades every row of a file; under d1 sudoku counts blank cells (the published figure), all
    else items.

    ValueError: unknown task or protocol, a malformed row (with file, line and mend), an empty file.
    """
    judge = task_named(task)
    one_of(protocol, PROTOCOLS, "protocol")
    verdicts, problems = [], []
    for where, row in objects(path):
        completion, example = field(row, "completion", str, where), judge.from_record(row, where)
        try:
            verdicts.append(
                judge.verdict(completion, example, protocol=protocol, style=row.get("style", "d1"))
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        problems.append(str(row.get("id", where)))
    if not verdicts:
        raise ValueError(f"{path} has no rows; write one JSON object a line")
    counts = [(v.components["solved"], 1.0) for v in verdicts]
    if task == "sudoku" and protocol == "d1":
        counts = [(v.components["correct"], v.components["cells"]) for v in verdicts]
    correct, total = (int(sum(column)) for column in zip(*counts, strict=True))
    if not total:
        raise ValueError(f"{path}: no puzzle has a blank cell; there is nothing to grade")
    clusters: dict[str, list[tuple[float, float]]] = {}
    for problem, count in zip(problems, counts, strict=True):
        clusters.setdefault(problem, []).append(count)
    low, high = wilson(
        correct / total,
        independent([(sum(a for a, _ in c), sum(b for _, b in c)) for c in clusters.values()]),
    )
    failures = dict(Counter(v.failure for v in verdicts if v.failure).most_common())
    return Grade(
        task,
        protocol,
        len(verdicts),
        correct,
        total,
        correct / total,
        low,
        high,
        failures,
        verdicts,
    )


def wilson(share: float, n: int | float) -> tuple[float, float]:
    """95 % score interval for a share seen in n independent trials (E. B. Wilson, JASA 22, 1927); n
    need not be whole.
    """
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return min(share, max(0.0, middle - half)), max(
        share, min(1.0, middle + half)
    )  # contains the share; rounding may not


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): the chance that k of n samples hold a correct one, unbiased.
    (arXiv:2107.03374, Eq. 1)
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def independent(counts: list[tuple[float, float]]) -> float:
    """How many independent trials clusters of (correct, trials) are worth: what `wilson` may take
    as n.

    Cells of one puzzle succeed together, so counting cells as independent makes the interval too
    short.  The variance of the share is that of a ratio of cluster sums, k/(k-1) sum (correct -
    share * trials)^2 / total^2, and the worth is share * (1 - share) over it (E. L. Korn, B. I.
    Graubard, Survey Methodology 24, 1998), never more than the trials there are.  Where the
    variance says nothing (one cluster, all right, all wrong) a cluster is worth one trial; clusters
    of one trial are independent already.
    """
    clusters, total = len(counts), sum(trials for _, trials in counts)
    share = sum(correct for correct, _ in counts) / total
    if max(trials for _, trials in counts) == 1:
        return total
    if clusters == 1 or share in (0.0, 1.0):
        return float(clusters)
    spread = (
        sum((correct - share * trials) ** 2 for correct, trials in counts)
        * clusters
        / (clusters - 1)
        / total**2
    )
    return min(total, share * (1 - share) / spread) if spread else total
