"""The explorer's widgets, a thin layer: a change makes a new `explore.Look`, and what that shows is
drawn again.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import ipywidgets
from IPython.display import display
from matplotlib.figure import Figure

from rspo_lab.figures.explore import WIDTH, decoding_html, panels_figure
from rspo_lab.interactive.live import PIXELS, png, watched
from rspo_lab.interactive.session import VIEWS, Look, Session, designs

FRAME_MS = 500  # of the decoding's play
QUANTITIES = {"d": "d", "the score": "score"}


def figure_of(session: Session, look: Look) -> Figure:
    """The panels of everything looked at."""
    labels = [
        f"{'/'.join(h.run.split(':')[0].split('/')[-2:])}, step {h.step}"
        for h in session.held(look)
    ]
    return panels_figure(labels, session.curves(look), session.points(look), look)


def html_of(session: Session, look: Look, frame: int) -> str:
    """The token grids of everything looked at, after `frame` steps."""
    return "".join(
        decoding_html(**vars(d), frame=min(frame, d.frames - 1)) for d in session.decodings(look)
    )


def show(session: Session, look: Look) -> "Explorer | Still":
    """The explorer, displayed where somebody watches; elsewhere (Papermill) only the look itself.
    Its `look` is where it stands.
    """
    return Explorer(session, look) if watched() else Still(look)


class Still:
    """A look that nobody moves."""

    def __init__(self, look: Look) -> None:
        self.look = look


class Explorer:
    """Controls, figure and token grid over one session; `look` is where they stand."""

    def __init__(self, session: Session, look: Look) -> None:
        self.session, self.look, self.lock, self.settling = session, look, threading.RLock(), False
        session.on_hold = self._say
        style, wide = {"description_width": "80px"}, ipywidgets.Layout(width="340px")
        common = {"style": style, "layout": wide}
        self.runs = ipywidgets.SelectMultiple(
            options=list(session.runs),
            value=look.runs,
            description="runs",
            rows=5,
            style=style,
            layout=ipywidgets.Layout(width="684px"),
            tooltip="Several with Ctrl or Shift, to compare",
        )
        steps = session.steps(look.runs)
        self.step = ipywidgets.SelectionSlider(
            options=steps, value=look.step, description="step", continuous_update=False, **common
        )
        self.design = ipywidgets.Dropdown(
            options=designs(look.design), value=look.design, description="masks", **common
        )
        self.views = ipywidgets.SelectionSlider(
            options=sorted({*VIEWS, look.views}), value=look.views, description="K", **common
        )
        low, high = (
            min(-3, math.floor(math.log10(look.lam))),
            max(1, math.ceil(math.log10(look.lam))),
        )
        self.lam = ipywidgets.FloatLogSlider(
            value=look.lam,
            min=low,
            max=high,
            step=0.1,
            readout_format=".3g",
            description="λ",
            **common,
        )
        self.quantity = ipywidgets.Dropdown(
            options=QUANTITIES, value=look.quantity, description="variance of", **common
        )
        beside = ipywidgets.Layout(width="252px", margin="2px 2px 2px 88px")
        self.again = ipywidgets.Button(description="draw the K masks again", layout=beside)
        self.line = ipywidgets.Label("")
        self.image = ipywidgets.Image(
            format="png",
            layout=ipywidgets.Layout(width=f"{PIXELS * WIDTH:.0f}px", max_width="100%"),
        )
        self.problem = ipywidgets.Dropdown(description="problem", **common)
        self.sampled = ipywidgets.ToggleButtons(
            options={"greedy": False, "sampled": True}, style={"button_width": "80px"}
        )
        self.play = ipywidgets.Play(min=0, max=1, interval=FRAME_MS, repeat=True)
        self.frame = ipywidgets.IntSlider(min=0, max=1, description="decoding", **common)
        self.grid = ipywidgets.HTML(layout=ipywidgets.Layout(min_height="260px"))
        ipywidgets.jslink((self.play, "value"), (self.frame, "value"))
        row, column = ipywidgets.HBox, ipywidgets.VBox
        display(
            column(
                [
                    self.runs,
                    row(
                        [
                            column([self.step, self.design, self.quantity]),
                            column([self.views, self.lam, self.again]),
                        ]
                    ),
                    self.line,
                    self.image,
                    row([self.problem, self.sampled]),
                    row([self.frame, self.play]),
                    self.grid,
                ]
            )
        )
        self._refresh()
        self.play.value = self.frame.value = self.frame.max
        self._decode()
        self.runs.observe(lambda change: self._move(runs=tuple(change["new"])), "value")
        for name in ("step", "design", "views", "lam", "quantity", "problem", "sampled"):
            getattr(self, name).observe(
                lambda change, name=name: self._move(**{name: change["new"]}), "value"
            )
        self.again.on_click(lambda _: self._move(draw=self.look.draw + 1))
        self.frame.observe(lambda change: self._decode(), "value")

    def _move(self, **changes) -> None:
        """Look elsewhere.  Other runs have other steps: stay at the step if it is one of them, else
        go to the last.
        """
        with self.lock:
            look = replace(self.look, **changes)
            if self.settling or not look.runs:
                # options being set have a value for an instant; with no run chosen what stands is
                # kept
                return
            if look.step not in (steps := self.session.steps(look.runs)):
                look = replace(look, step=steps[-1])
            self.look = look
            self._settle(self.step, steps, look.step)
            self._refresh()

    def _settle(self, widget, options, value) -> None:
        """New options and value for a widget, of which nobody hears in the kernel."""
        if list(widget.options) != list(options) or widget.value != value:
            self.settling = True
            widget.options, widget.value = options, value
            self.settling = False

    def _refresh(self) -> None:
        """Draw everything for the look in hand; what cannot be shown is said in the line and leaves
        the rest as it was.
        """
        with self._saying():
            self.image.value = png(figure_of(self.session, self.look))
            problems = self.session.problems(self.look)
            self._settle(
                self.problem, [(name, i) for i, name in enumerate(problems)], self.look.problem
            )
            self.play.max = self.frame.max = (
                max(d.frames for d in self.session.decodings(self.look)) - 1
            )
            self.grid.value = html_of(self.session, self.look, self.frame.value)
            self.line.value = ""

    def _decode(self) -> None:
        with self.lock, self._saying():
            self.grid.value = html_of(self.session, self.look, self.frame.value)

    @contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.line.value = f"{type(error).__name__}: {error}"

    def _say(self, text: str) -> None:
        self.line.value = text
