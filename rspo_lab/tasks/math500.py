"""MATH: competition problems whose answer is a LaTeX expression.  (arXiv:2103.03874; MATH-500 of
arXiv:2305.20050 to test)

Rows have `problem` and `answer`, or a `solution` whose last \\boxed is the answer.  Protocol
"strict" asks for one answer block that math-verify finds equal; "d1" reproduces d1's evaluation.
There is no compact style: a character model cannot read the problems.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rspo_lab.tasks import equality, math_d1
from rspo_lab.tasks.hub import download, rows
from rspo_lab.tasks.lines import field, first
from rspo_lab.tasks.verdict import (
    D1_EVAL_FORMAT,
    D1_FORMAT,
    PROTOCOLS,
    Verdict,
    in_words,
    one_of,
    strict_answer,
)

HUB = {"train": ("ankner/math-500", None), "test": ("HuggingFaceH4/MATH-500", None)}  # d1's choice
TRAIN_PROBLEMS = 4096  # a training run's pool; the data set has more
TEST_PROBLEMS = 500
EXPERT = "You are a math expert. You will be given a question to solve. Solve it step by step. Wrap the final answer in a \\boxed{}."
D1_PROMPT = D1_FORMAT + "\n\n" + EXPERT + " \n\n"  # d1, diffu-grpo/data_utils.py
D1_EVAL_PROMPT = (
    EXPERT + "\n" + D1_EVAL_FORMAT + '" \n' + "\n\n"
)  # d1, eval/math500.py, with its stray quotation mark


@dataclass(frozen=True)
class Example:
    id: str
    question: str
    answer: str  # LaTeX


def examples(split: str, n: int, *, seed: int) -> list[Example]:
    """n problems of HuggingFaceH4/MATH-500 (test) or ankner/math-500 (train), from the hub or its
    cache, in the order of the seed.

    Problems whose box is empty (two of MATH) are left out.  ValueError for another split, or if it
    has fewer than n; ConnectionError if the hub is out of reach.
    """
    name, config = HUB[one_of(split, ("train", "test"), "split")]
    return _examples(
        download(
            name, config, split, n, seed=seed, keep=lambda row: bool(_answer(row, name).strip())
        )
    )


def read(path: str | Path, n: int | None = None) -> list[Example]:
    """The first n problems (all if None) of a csv, jsonl or parquet file with the columns `problem`
    and `answer` or `solution`.

    FileNotFoundError if there is no such file; ValueError naming file and line on a malformed row,
    or if there are fewer than n.
    """
    return first(
        _examples(
            (f"{Path(path).name}:{where.rpartition(':')[2]}", row) for where, row in rows(path)
        ),
        n,
        path,
    )


def _examples(table: Iterable[tuple[str, dict]]) -> list[Example]:
    found = [
        Example(where, field(row, "problem", str, where), _answer(row, where))
        for where, row in table
    ]
    for e in found:
        if not e.answer.strip():
            raise ValueError(
                f"{e.id}: no answer; write it in `answer`, or in the last \\boxed of `solution`, or drop the row"
            )
    return found


def _answer(row: dict, where: str) -> str:
    if row.get("answer") is not None or "solution" not in row:
        return field(row, "answer", str, where)
    solution = field(row, "solution", str, where)
    return (math_d1.boxed(solution) or "") if "\\boxed" in solution else ""


def prompt(example: Example, style: str) -> str:
    """The published message of training (d1) or evaluation (d1-eval): one user turn, no system
    turn.
    """
    return (
        D1_EVAL_PROMPT if in_words(style, "math500") == "d1-eval" else D1_PROMPT
    ) + example.question


def record(example: Example) -> dict:
    """What a file of completions says of the problem: d1's `question` and `ground_truth`."""
    return {"question": example.question, "ground_truth": example.answer}


def from_record(row: dict, where: str) -> Example:
    """The problem of such a row; ValueError that begins with `where` on a malformed one."""
    return Example(
        where, field(row, "question", str, where), field(row, "ground_truth", str, where)
    )


def split_key(example: Example) -> str:
    """What no two splits may share: the problem."""
    return example.question


def canvas(example: Example) -> str:
    """ValueError: only compact completions have a canvas."""
    return in_words("compact", "math500")


def solutions(example: Example) -> list[str]:
    """The shortest completion that both protocols accept."""
    return [f"<answer>\n\\boxed{{{example.answer}}}\n</answer>"]


def reward(
    completion: str, example: Example, *, protocol: str = "strict", style: str = "d1"
) -> float:
    """`verdict(...).reward`: 1 if solved, else 0."""
    return verdict(completion, example, protocol=protocol, style=style).reward


def verdict(completion: str, example: Example, *, protocol: str, style: str) -> Verdict:
    """Components: `solved`."""
    in_words(style, "math500")
    if one_of(protocol, PROTOCOLS, "protocol") == "d1":
        found = math_d1.expression(completion)
        right = found is not None and math_d1.equivalent(found, example.answer)
        failure = None if right else "no_answer" if found is None else "wrong_answer"
    else:
        answer, failure = strict_answer(completion, style)
        if failure is None:
            failure = equality.fault(example.answer, answer)
    return Verdict(float(failure is None), failure, {"solved": float(failure is None)})
