"""House style of the figures: sizes of a paper column, fonts that print, one colour and marker a
thing everywhere.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLUMN = 3.25  # inches: one column of ICML; NeurIPS and ICLR set 5.5 across
PAGE = 5.5
INK = "#444444"
OKABE_ITO = {
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
}
DESIGN_STYLE = {  # colour and marker, so that a figure also reads in grey
    "count": (OKABE_ITO["blue"], "o"),
    "systematic": (OKABE_ITO["green"], "s"),
    "coupled": (OKABE_ITO["orange"], "^"),
    "t_redraw": (OKABE_ITO["vermillion"], "D"),
    "t_iid": (OKABE_ITO["vermillion"], "d"),
    "bsc": (OKABE_ITO["purple"], "P"),
    "cycle": (OKABE_ITO["sky"], "X"),
    "cyck": (OKABE_ITO["sky"], "x"),
    "nested": (INK, "v"),
    "gauss": (INK, "p"),
    "one_step": (INK, "<"),
    "left_to_right": (INK, ">"),
    "spg_block": (INK, "h"),
    "auto": ("black", "8"),
}
AGAIN = (
    (None, "-"),
    ("*", ":"),
    ("$2$", "-."),
    ("$3$", "--"),
)  # marker and line of further parametrisations of one design
POLICY, TARGET, REFERENCE = OKABE_ITO["blue"], OKABE_ITO["vermillion"], INK

_RC: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "mathtext.fontset": "stix",
}


def design_look(names: list[str]) -> dict[str, dict]:
    """Colour, marker and line of every design or scheme of a figure; "bsc(0, 0)" and "bsc(1, 1)"
    share only the colour.
    """
    looks, seen = {}, {}
    for name in names:
        base = re.match(r"\w+", name)[0]
        colour, marker = DESIGN_STYLE[base]
        other, line = AGAIN[seen.get(base, 0) % len(AGAIN)]
        looks[name] = {"color": colour, "marker": other or marker, "linestyle": line}
        seen[base] = seen.get(base, 0) + 1
    return looks


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A Figure (no pyplot, so safe in threads) to fill inside the `with`; everything drawn there is
    in house style.
    """
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.draw_without_rendering()  # ticks are made when first drawn: here, in house style
