"""Verdicts: what a verifier says of one completion, and where a strict verifier looks for the
answer.

Rewards are in [0, 1].  Protocol "strict" pays 1 for a correct answer and 0 for anything else;
protocol "d1" reproduces the published evaluation scorer (github.com/dllm-reasoning/d1,
eval/parse_and_get_acc.py).  Style "compact": the whole completion is the answer; styles "d1" (the
published training message) and "d1-eval" (the evaluation message, with the first word of the reply
prefilled): the answer stands between <answer> and </answer>.
"""

from dataclasses import dataclass

PROTOCOLS = ("strict", "d1")
STYLES = ("compact", "d1", "d1-eval")
PREFILL = {
    "compact": "",
    "d1": "",
    "d1-eval": "<reasoning>",
}  # written after the chat template; not part of the completion
D1_FORMAT = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""  # d1, diffu-grpo/data_utils.py: training
D1_EVAL_FORMAT = r"""Respond in the following format:
<reasoning>
Your reasoning here
</reasoning>
<answer>
\boxed{...}
</answer>"""  # d1, eval/*.py
LONGEST_ANSWER = 200  # characters; the longest of MATH is 159


@dataclass(frozen=True)
class Verdict:
    """`failure` is None exactly when nothing is wrong; `components` are named numbers to log beside
    the reward.
    """

    reward: float
    failure: str | None
    components: dict[str, float]


def one_of(value: str, choices: tuple[str, ...], noun: str) -> str:
    """`value` if it is a choice, else ValueError naming the choices."""
    if value not in choices:
        raise ValueError(f"unknown {noun} {value!r}: choose from {', '.join(choices)}")
    return value


def in_words(style: str, task: str) -> str:
    """`style` if it is one of messages in words, else ValueError: the task has no compact style."""
    if one_of(style, STYLES, "style") == "compact":
        raise ValueError(
            f"{task} has no compact style: give style d1 or d1-eval, and a model that reads words"
        )
    return style


def strict_answer(
    completion: str, style: str, *, longest: int = LONGEST_ANSWER, ascii_only: bool = True
) -> tuple[str, str | None]:
    """(answer, None) or ("", failure): the one answer of a completion, at most `longest` characters
    and ASCII unless told otherwise.

    Unless the style is "compact", exactly one `<answer>` and one `</answer>` must occur; a single
    `\\boxed{...}` may wrap the answer.
    """
    if one_of(style, STYLES, "style") != "compact":
        opened, closed = completion.count("<answer>"), completion.count("</answer>")
        if opened > 1 or closed > 1:
            return "", "several_answers"
        head, _, tail = completion.partition("<answer>")
        if not opened or "</answer>" not in tail:
            return "", "no_answer"
        answer = tail.partition("</answer>")[0].strip()
        if answer.count("\\boxed") > 1:
            return "", "several_answers"
        if answer.startswith("\\boxed{") and answer.endswith("}"):
            answer = answer[len("\\boxed{") : -1].strip()
    else:
        answer = completion.strip()
    if not answer:
        return "", "no_answer"
    if len(answer) > longest:
        return "", "too_long"
    return ("", "not_ascii") if ascii_only and not answer.isascii() else (answer, None)
