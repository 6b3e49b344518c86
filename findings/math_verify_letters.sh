#!/usr/bin/env bash
# math-verify 0.9.0: a last letter is taken for a unit, and the base of a number for nothing.
#
# `1+2t` is read as 3 and so equals it, while `1+2x` does not; `2t+1` keeps its t.  `204_5` and
# `204_6`, numbers in base 5 and 6, are both read as 204 and so equal each other.
#
# Seen on Python 3.11:
#        3 and 1+2t   equal
#        3 and 1+2x   not equal
#        3 and 2t+1   not equal
#    204_5 and 204_6  equal
#    204_5 and 204    equal
#       54 and 204_5  not equal
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0
"$place/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

CASES = {  # (answer, other answer): whether they are equal to math-verify
    ("3", "1+2t"): True,
    ("3", "1+2x"): False,
    ("3", "2t+1"): False,
    ("204_5", "204_6"): True,
    ("204_5", "204"): True,
    ("54", "204_5"): False,  # 2 * 25 + 0 * 5 + 4: the number that it is
}
print("math-verify", version("math-verify"))
for (gold, answer), expected in CASES.items():
    equal = verify(parse(f"${gold}$"), parse(f"${answer}$"))
    print(f"{gold:>6} and {answer:<6} {'equal' if equal else 'not equal'}")
    assert equal == expected, "math-verify judges otherwise now"
PYTHON
