"""The mask designs by name, with their parameters if they have any."""

import re
from collections.abc import Callable
from functools import partial
from inspect import signature

from rspo_lab.masks.base import Masks
from rspo_lab.masks.ours import bsc, cyck, cycle
from rspo_lab.masks.published import (
    count,
    coupled,
    gauss,
    left_to_right,
    nested,
    one_step,
    spg_block,
    systematic,
    t_iid,
    t_redraw,
)


def design(name: str) -> Callable[..., Masks]:
    """The design of that name, with its parameters if it has any: "count", "bsc", "bsc(1, 0.5)",
    "cyck(3)".
    """
    found = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", name)
    if not found or (made := DESIGNS.get(found[1])) is None:
        raise ValueError(f"design must be one of {', '.join(DESIGNS)}, not {name!r}")
    if found[2] is None:
        return made
    takes = [
        p
        for p in signature(made).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name != "generator"
    ]
    words, names = found[2].split(",") if found[2].strip() else [], [p.name for p in takes]
    try:
        values = {p.name: type(p.default)(word) for p, word in zip(takes, words, strict=True)}
    except ValueError:
        raise ValueError(
            f"design {name!r}: {found[1]} takes {len(names)} numbers ({', '.join(names) or 'none'})"
        ) from None
    return partial(made, **values)


DESIGNS: dict[str, Callable[..., Masks]] = {
    "count": count,
    "systematic": systematic,
    "coupled": coupled,
    "nested": nested,
    "bsc": bsc,
    "cycle": cycle,
    "cyck": cyck,
    "gauss": gauss,
    "t_iid": t_iid,
    "t_redraw": t_redraw,
    "one_step": one_step,
    "left_to_right": left_to_right,
    "spg_block": spg_block,
}
