"""d1's Countdown scorer as published, without `eval`: what it takes for the equation, and faults.

Facts from github.com/dllm-reasoning/d1, eval/parse_and_get_acc.py (`parse_countdown_answers`), read
in public copies.  The rules are Python's, so `**`, `//`, unary signs and decimals count.  What
would run for long is bounded: an equation over 300 characters or a power over 100,000 bits is
wrong.
"""

import ast
import operator
import re
from itertools import islice

from rspo_lab.tasks.math_d1 import boxed

LONGEST = 300  # characters of an equation
LARGEST = 100_000  # bits of a power
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def fault(completion: str, numbers: tuple[int, ...], target: int, *, compact: bool) -> str | None:
    """What d1 holds against a completion, or None where it counts it right.

    Compact completions are the equation themselves; their two-digit numbers ("03", which Python
    refuses) are read as plain ones.
    """
    text = re.sub(r"(?<!\d)0+(?=\d)", "", completion) if compact else equation(completion)
    if _numbers(text, len(numbers)) != sorted(numbers):
        return "wrong_numbers"
    text = text.strip()
    if len(text) > LONGEST:
        return "too_long"
    if not re.fullmatch(r"[\d+\-*/().\s]+", text):
        return "unparsable"
    try:
        close = abs(_value(ast.parse(text, mode="eval").body) - target) < 1e-5
    except ZeroDivisionError:
        return "division_by_zero"
    except OverflowError:
        return "wrong_value"
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return "unparsable"
    return None if close else "wrong_value"


def equation(completion: str) -> str:
    """The last \\boxed; the whole text if nothing is boxed; the first <answer>, else the whole
    text, if the last box never closes.

    So <answer> is looked at only beside a broken box.  Then LaTeX signs are replaced and the first
    "expression=number" cut.
    """
    text = boxed(completion)
    if text is None:
        inside, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
        text = inside.strip() if closed else completion
    text = text.replace(r"\div", "/").replace(r"\times", "*").replace(r"\cdot", "*")
    return _left_side(text)


def _left_side(text: str) -> str:
    """The left side of the first `([0-9+\\-*/() ]+)=[0-9. ]+`, in linear time; else the text."""
    equal = re.search(r"[0-9+\-*/() ]=[0-9. ]", text)
    if not equal:
        return text
    side = text[: equal.start() + 1]
    return side[len(side.rstrip("0123456789+-*/() ")) :].strip()


def _numbers(text: str, most: int) -> list[int] | None:
    """The runs of digits, sorted, as d1 reads them: "1.5" is a 1 and a 5.

    None if there are more than `most`, or if one is beyond int's limit.
    """
    runs = [run[0] for run in islice(re.finditer(r"\d+", text), most + 1)]
    if len(runs) > most or any(len(run) > LONGEST for run in runs):
        return None
    return sorted(map(int, runs))


def _value(node: ast.expr) -> int | float | complex:
    """Python's own value of a tree of numbers and signs; TypeError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.operand))
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATIONS:
        raise TypeError(f"no arithmetic: {type(node).__name__}")
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
        if abs(left) > 1 and left.bit_length() * right > LARGEST:
            raise OverflowError("power out of bounds")
    return OPERATIONS[type(node.op)](left, right)
