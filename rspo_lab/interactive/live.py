"""Training in a notebook: a live figure and a Stop button over a worker thread.

Where nobody watches it is plain training.
"""

import asyncio
import io
import os
import threading
import time

import ipywidgets
from IPython import get_ipython
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from rspo_lab import training
from rspo_lab.config import TrainConfig
from rspo_lab.figures.style import house_style
from rspo_lab.figures.train import training_figure
from rspo_lab.runs.files import read_jsonl

POLL = 0.1  # seconds
# seconds, or five times what a drawing takes if that is longer: Python draws and trains by turns
REDRAW = 2.0
PIXELS = 120  # per inch of figure on the page, in CSS pixels; drawn at twice that


async def train(config: TrainConfig, run) -> list[dict]:
    """`training.train(config, run)` to its end, to the Stop button or to the kernel's interrupt.

    In a cell: `history = await live.train(config, run)`.  Both stops let the step in progress end,
    which is saved, and set `run.stopped`.  Where nobody can press a button it trains in the calling
    thread, so that SIGTERM saves a checkpoint, and shows nothing.
    """
    run.stopped = False  # the Stop of an earlier call is over
    if not watched():
        return training.train(config, run)
    stop = threading.Event()
    history: list[dict] = []

    def on_step(record: dict) -> None:  # in the worker thread
        if history:
            history.append(record)
        else:  # with what earlier calls recorded
            history.extend(read_jsonl(run.path / "metrics.jsonl"))

    panel = Panel(config, stop)
    worker = asyncio.ensure_future(
        asyncio.to_thread(training.train, config, run, on_step=on_step, should_stop=stop.is_set)
    )
    try:
        while not worker.done():
            try:
                # by polls: a single wait would not hear the interrupt
                await asyncio.wait({worker}, timeout=POLL)
                panel.show(list(history))
            except (KeyboardInterrupt, asyncio.CancelledError):
                panel.stop()
    finally:
        # a kernel that shuts down closes this coroutine: the thread then ends with a checkpoint
        stop.set()
    panel.close(list(history), run.stopped, worker.exception())
    return worker.result()


def watched() -> bool:
    """Whether a person may be at the page: a kernel whose frontend takes input.

    Those of Papermill and nbconvert do not.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None or os.environ.get("RSPO_LAB_HEADLESS") == "1":
        return False
    return bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin"))


def png(figure: Figure) -> bytes:
    """A finished figure as a picture for the page.

    `savefig` would lay it out and draw it once more, in more than twice the time.
    """
    figure.set_layout_engine("none")
    figure.set_dpi(2 * PIXELS)
    canvas = FigureCanvasAgg(figure)
    file = io.BytesIO()
    with house_style():
        canvas.draw()
        imsave(file, canvas.buffer_rgba(), format="png")
    return file.getvalue()


class Panel:
    """Stop button, progress line and figure of one training.

    Every method belongs to the kernel's main thread.
    """

    def __init__(self, config: TrainConfig, stop: threading.Event) -> None:
        self.config = config
        self.event = stop
        self.button = ipywidgets.Button(
            description="Stop", icon="stop", tooltip="End after the step in progress and save it"
        )
        self.button.on_click(lambda button: self.stop())
        self.line = ipywidgets.Label("loading the model")
        hidden = ipywidgets.Layout(display="none", max_width="100%")
        self.image = ipywidgets.Image(format="png", layout=hidden)
        self.trouble = ""  # of the last drawing
        self.first = (0.0, -1)  # when and at which step this call began; -1: not yet
        self.shown = -1  # the step that the line shows
        self.drawn = -1  # the step that the figure shows
        self.due = 0.0  # when the figure may be drawn again
        self.row = ipywidgets.HBox([self.button, self.line])
        display(ipywidgets.VBox([self.row, self.image]))

    def stop(self) -> None:
        """Ask the training to end."""
        self.event.set()
        self.button.disabled = True
        self.button.description = "Stopping"

    def show(self, history: list[dict]) -> None:
        """Bring the line up to date, and the figure if it is due."""
        if not history:
            return
        now = time.monotonic()
        step = history[-1]["step"]
        if self.first[1] < 0:
            self.first = (now, step)
        if step != self.shown:
            self.shown = step
            self.line.value = self._progress(history[-1], now) + self.trouble
        if step != self.drawn and now >= self.due:
            self.draw(history)

    def _progress(self, record: dict, now: float) -> str:
        """Step, reward, and from this call's second step on its pace."""
        step = record["step"]
        line = f"step {step} of {self.config.steps}"
        began, first = self.first
        if step > first:
            pace = (now - began) / (step - first)
            left = pace * (self.config.steps - step) / 60
            line += f", reward {record['reward']:.2f}, {pace:.2g} s per step, {left:.1f} min left"
        return line

    def draw(self, history: list[dict]) -> None:
        """Redraw the figure; what goes wrong is said in the line and does not end the training."""
        began = time.thread_time()
        try:
            figure = training_figure(history)
            self.image.value = png(figure)
            self.image.layout.width = f"{PIXELS * figure.get_figwidth():.0f}px"
            self.image.layout.display = ""
            self.trouble = ""
        except Exception as error:
            self.trouble = f" (no figure: {type(error).__name__}: {error})"
        self.drawn = history[-1]["step"]
        self.due = time.monotonic() + max(REDRAW, 5 * (time.thread_time() - began))

    def close(self, history: list[dict], stopped: bool, error: BaseException | None) -> None:
        """The last figure and how it ended."""
        if history:
            self.draw(history)
        step = history[-1]["step"] if history else 0
        end = f"done: {step} steps"
        if stopped:
            end = f"stopped after step {step}: run this cell again to go on, then those below"
        if error:
            end = f"failed after step {step}: {type(error).__name__}: {error}"
        self.line.value = end + self.trouble
        self.row.children = [self.line]
        self.button.close()
