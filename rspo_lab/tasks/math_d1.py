"""d1's GSM8K and MATH scorers as published: what they take for the answer, and when it is right.

Facts from github.com/dllm-reasoning/d1, eval/parse_and_get_acc.py (`parse_gsm_answers`,
`parse_math_answers`) and eval/parser_helper.py (`last_boxed_only_string`, `remove_boxed`,
`is_equiv`: the string normaliser of Hendrycks et al., arXiv:2103.03874), read in public copies.
What they get wrong is kept; what would take quadratic time is not.
"""

import re

NUMBER = re.compile(r"-?\d+\.?\d*")
FIRST_REPLACED = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)


def number(completion: str) -> float | None:
    """GSM8K: the first \\boxed that holds a number, else the first <answer> block's last number.

    Of several numbers in a box it is the first.
    """
    for box in re.findall(r"\\boxed{(.*?)}", completion):
        if box.strip().strip(".") and (value := _number(box.strip(), 0)) is not None:
            return value
    inside, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
    return _number(inside.strip(), -1) if closed else None


def _number(text: str, which: int) -> float | None:
    """The whole text as a number, else one of the numbers in it."""
    try:
        return float(text)
    except ValueError:
        numbers = NUMBER.findall(text)
        return float(numbers[which]) if numbers else None


def expression(completion: str) -> str | None:
    """MATH: what `boxed` gives, so the whole text if nothing is boxed.

    The first <answer> block counts only if that is empty or None.
    """
    inside, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
    box = boxed(completion)
    return inside.strip() if closed and not box else box


def boxed(text: str) -> str | None:
    """What d1 takes from a box: all the text if there is none, None if the last is not closed."""
    if "\\boxed " in text:  # TeX's short form: up to the next dollar sign
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return text
    depth = 0
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0 and brace[0] == "}":
            whole = text[start : start + brace.end()]
            return whole[len("\\boxed{") : -1] if whole.startswith("\\boxed{") else whole
    return None


def equivalent(answer: str, truth: str) -> bool:
    """Whether the two are one string, normalised unless d1's normaliser fails on either."""
    try:
        return _normal(answer) == _normal(truth)
    except ValueError:
        return answer == truth


def _normal(text: str) -> str:
    """Hendrycks' normal form of a LaTeX answer; ValueError where the published code raises."""
    for old, new in FIRST_REPLACED:
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ValueError("two units")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    name, _, value = text.partition("=")
    if text.count("=") == 1 and len(name) <= 2:
        text = value
    if re.search(r"\\sqrt(?=\\sqrt|\Z)", text):
        raise ValueError("a root of nothing")
    text = re.sub(r"(?s)\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = _fractions(text)
    return _slash("\\frac{1}{2}" if text == "0.5" else text)


def _fractions(text: str) -> str:
    r"""\frac12 as \frac{1}{2}; unchanged if a \frac is followed by one character only."""
    done, *pieces = text.split("\\frac")
    for piece in pieces:
        if not piece:
            raise ValueError("a fraction of nothing")
        if piece[0] != "{" and len(piece) == 1:
            return text
        if piece[0] != "{":
            rest = piece[1:] if piece[1] == "{" else f"{{{piece[1]}}}{piece[2:]}"
            piece = f"{{{piece[0]}}}" + rest
        done += "\\frac" + piece
    return done


def _slash(text: str) -> str:
    r"""a/b of two integers as \frac{a}{b}; ValueError if either is no integer."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    a, b = map(int, sides)
    return f"\\frac{{{a}}}{{{b}}}" if text == f"{a}/{b}" else text
