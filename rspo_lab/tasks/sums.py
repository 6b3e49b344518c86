"""Sums: copy and work out eight additions of digits, one after the other, in 56 tokens.

Prompt "7+8=  ;0+5=  ;...:", completion "7+8=15;0+5=05;..." (seven characters per sum).  The reward
is the share of right sums.  Splits are by the eight sums through a content hash, about 15 % test.
The task is ours: it has no published prompt or protocol.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from rspo_lab.tasks.lines import field, first, line_name, objects
from rspo_lab.tasks.verdict import STYLES, Verdict, one_of, strict_answer

SUMS = 8
LINE = 7  # characters of a sum that is worked out
COMPACT_LENGTH = LINE * SUMS
COMPACT_CHARS = "0123456789+:=; "
TEST_PROBLEMS = 256  # an evaluation
TRAIN_PROBLEMS = 4096  # a training run's pool; generated, so it could be larger
TEST_PERCENT = 15


@dataclass(frozen=True)
class Example:
    id: str
    pairs: tuple[tuple[int, int], ...]


def examples(split: str, n: int, *, seed: int) -> list[Example]:
    """n different problems of a split; a longer list starts with the shorter one.

    ValueError for another split than "train" or "test".
    """
    test = one_of(split, ("train", "test"), "split") == "test"
    rng = random.Random(seed)
    chosen: dict[tuple, Example] = {}
    while len(chosen) < n:
        pairs = tuple((rng.randrange(10), rng.randrange(10)) for _ in range(SUMS))
        if _in_test(pairs) == test:
            chosen[pairs] = Example(f"sums-{_listed(pairs)}", pairs)
    return list(chosen.values())


def _in_test(pairs: tuple[tuple[int, int], ...]) -> bool:
    digest = hashlib.sha256(_listed(pairs).encode()).digest()
    return int.from_bytes(digest[:8]) % 100 < TEST_PERCENT


def read(path: str | Path, n: int | None = None) -> list[Example]:
    """The first n problems, all if None, of a jsonl file.

    A row is `{"sums": "7+8,0+5,1+1,9+9,2+3,4+4,6+0,3+8"}`.  FileNotFoundError if there is no such
    file; ValueError naming file and line on a malformed row, or if there are fewer than n.
    """
    rows = [
        Example(line_name(where), _pairs(field(row, "sums", str, where), where))
        for where, row in objects(path)
    ]
    return first(rows, n, path)


def record(example: Example) -> dict:
    """What a file of completions says of the problem: the sums, which are the ground truth too."""
    return {"question": _listed(example.pairs), "ground_truth": _listed(example.pairs)}


def from_record(row: dict, where: str) -> Example:
    """The problem of such a row; ValueError that begins with `where` on a malformed one."""
    return Example(where, _pairs(field(row, "ground_truth", str, where), where))


def _pairs(text: str, where: str) -> tuple[tuple[int, int], ...]:
    if not re.fullmatch(rf"([0-9]\+[0-9],){{{SUMS - 1}}}[0-9]\+[0-9]", text):
        raise ValueError(
            f'{where}: sums {text[:60]!r}; write {SUMS} of two digits each, as "7+8,0+5,..."'
        )
    return tuple((int(sum_[0]), int(sum_[2])) for sum_ in text.split(","))


def prompt(example: Example, style: str) -> str:
    """Compact: "7+8=  ;0+5=  ;...:".  d1, d1-eval: asks for the same between <answer> tags."""
    if one_of(style, STYLES, "style") == "compact":
        return "".join(f"{a}+{b}=  ;" for a, b in example.pairs) + ":"
    return (
        f"Work out {_listed(example.pairs)}. Respond with all of them, in order, "
        "sums in two digits: <answer>7+8=15;0+5=05;</answer>"
    )


def split_key(example: Example) -> tuple:
    """What no two splits may share."""
    return example.pairs


def canvas(example: Example) -> str:
    """The compact completion before any is written: all of it open."""
    return "?" * COMPACT_LENGTH


def solutions(example: Example) -> list[str]:
    """The one completion that solves it."""
    return ["".join(_line(a, b) for a, b in example.pairs)]


def reward(
    completion: str, example: Example, *, protocol: str = "strict", style: str = "compact"
) -> float:
    """`verdict(...).reward`: the share of right sums."""
    return verdict(completion, example, protocol=protocol, style=style).reward


def verdict(completion: str, example: Example, *, protocol: str, style: str) -> Verdict:
    """Components: `solved`, all of them right; `correct`, how many are right in their places."""
    one_of(protocol, ("strict",), "protocol of sums")
    answer, failure = strict_answer(completion, style)
    answer = "".join(answer.split())
    correct = 0
    if failure is None:
        lines = [answer[i : i + LINE] for i in range(0, len(answer), LINE)]
        correct = sum(line == _line(a, b) for line, (a, b) in zip(lines, example.pairs))
        if len(answer) != COMPACT_LENGTH:
            failure = "wrong_length"
        elif correct < SUMS:
            failure = "wrong_sums"
    share = 0.0 if failure == "wrong_length" else correct / SUMS
    return Verdict(share, failure, {"solved": float(failure is None), "correct": float(correct)})


def _line(a: int, b: int) -> str:
    return f"{a}+{b}={a + b:02d};"


def _listed(pairs: tuple[tuple[int, int], ...]) -> str:
    return ",".join(f"{a}+{b}" for a, b in pairs)
