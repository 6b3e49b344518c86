"""The live figure's three duties: show the run, stop it between steps, and never get in its way.

Training is a stand-in that keeps `training.train`'s contract; the page itself is test_browser's.
"""

import asyncio
import io
import json
import threading
import time
import types

import pytest
from ipywidgets import Button
from matplotlib.figure import Figure
from matplotlib.image import imread

from rspo_lab.config import TrainConfig
from rspo_lab.figures.train import pairs_figure
from rspo_lab.interactive import live
from rspo_lab.journal import completions_table

CONFIG = TrainConfig(model="base-sudoku", task="sudoku", steps=20)


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """A fake training of `pace` seconds per step, which fails at step `fail_at`.

    With what was drawn and displayed, and a run folder.
    """
    stage = types.SimpleNamespace(
        pace=0.02,
        fail_at=None,
        thread=None,
        drawn=[],
        box=None,
        run=types.SimpleNamespace(path=tmp_path, stopped=False),
    )

    def train(config, run, *, on_step=lambda record: None, should_stop=lambda: False):
        stage.thread = threading.current_thread()
        metrics = run.path / "metrics.jsonl"
        history = (
            [json.loads(line) for line in metrics.read_text().splitlines()]
            if metrics.exists()
            else [{"step": 0}]
        )
        metrics.write_text("".join(json.dumps(record) + "\n" for record in history))
        on_step(history[-1])
        for step in range(history[-1]["step"] + 1, config.steps + 1):
            if step == stage.fail_at:
                raise ZeroDivisionError("the loss")
            time.sleep(stage.pace)
            history.append({"step": step, "reward": step / config.steps})
            with metrics.open("a") as file:
                file.write(json.dumps(history[-1]) + "\n")
            stopping = should_stop()
            on_step(history[-1])
            if stopping and step < config.steps:
                run.stopped = True
                break
        return history

    def training_figure(history):
        stage.drawn.append([record["step"] for record in history])
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([record["step"] for record in history])
        return figure

    monkeypatch.setattr(live.training, "train", train)
    monkeypatch.setattr(live, "training_figure", training_figure)
    monkeypatch.setattr(live, "watched", lambda: True)
    monkeypatch.setattr(live, "display", lambda box: setattr(stage, "box", box))
    monkeypatch.setattr(live, "REDRAW", 0.05)
    return stage


def play(stage, *acts):
    """Trains, with each act (a function of the task) after a further 0.15 s."""

    async def both():
        task = asyncio.ensure_future(live.train(CONFIG, stage.run))
        for act in acts:
            await asyncio.sleep(0.15)
            act(task)
        return await task

    return asyncio.run(both())


def line(stage):
    return stage.box.children[0].children[-1].value


def buttons(stage):
    return [w for w in stage.box.children[0].children if isinstance(w, Button)]


def test_headless_trains_in_the_calling_thread_and_shows_nothing(stage, monkeypatch):
    monkeypatch.setattr(live, "watched", lambda: False)
    history = play(stage)
    assert [record["step"] for record in history] == list(range(21))
    assert stage.thread is threading.main_thread() and stage.box is None and stage.drawn == []


@pytest.mark.parametrize(
    ("allow_stdin", "headless", "expected"),
    [(True, "", True), (True, "1", False), (False, "", False), (None, "", False)],
)
def test_a_person_watches_only_where_a_frontend_takes_input(
    monkeypatch, allow_stdin, headless, expected
):
    content = {} if allow_stdin is None else {"allow_stdin": allow_stdin}
    kernel = types.SimpleNamespace(get_parent=lambda channel: {"content": content})
    monkeypatch.setattr(live, "get_ipython", lambda: types.SimpleNamespace(kernel=kernel))
    monkeypatch.setenv("RSPO_LAB_HEADLESS", headless)
    assert live.watched() is expected


def test_nobody_watches_outside_a_kernel():
    assert live.watched() is False


def test_watched_training_shows_every_stage_in_one_image(stage):
    pictures = []
    history = play(stage, lambda task: pictures.append(bytes(stage.box.children[1].value)))
    pictures.append(bytes(stage.box.children[1].value))
    assert [record["step"] for record in history] == list(range(21)) and not stage.run.stopped
    assert stage.thread is not threading.main_thread()
    assert len(set(pictures)) == 2 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert stage.drawn[-1] == list(range(21))
    assert line(stage) == "done: 20 steps" and not buttons(stage)


def test_drawings_keep_their_distance(stage, monkeypatch):
    monkeypatch.setattr(live, "REDRAW", 60.0)
    play(stage)
    assert len(stage.drawn) == 2  # the first records, and the end


def test_picture_is_the_figure_at_twice_the_pixels_it_takes_on_the_page():
    figure = Figure(figsize=(2, 1), facecolor="#0072b2")
    picture = imread(io.BytesIO(live.png(figure)))
    assert picture.shape == (2 * live.PIXELS, 4 * live.PIXELS, 4)
    assert (picture[5, 5, :3] * 255).round().tolist() == [0, 0x72, 0xB2] and (
        picture[..., 3] == 1
    ).all()


def test_stop_ends_after_the_step_in_hand_and_the_next_call_goes_on(stage):
    first = play(stage, lambda task: buttons(stage)[0].click())
    stopped = len(first) - 1
    assert 0 < stopped < 20 and stage.run.stopped and stage.drawn[-1] == list(range(stopped + 1))
    assert line(stage).startswith(
        f"stopped after step {stopped}: run this cell again"
    ) and not buttons(stage)
    second = play(stage)
    assert [record["step"] for record in second] == list(range(21)) and not stage.run.stopped
    assert stage.drawn[-1] == list(range(21))  # with the records of the first call


def test_interrupts_stop_it_however_often_they_come(stage):
    stage.pace = 0.3
    history = play(stage, lambda task: task.cancel(), lambda task: task.cancel())
    assert (
        stage.run.stopped and 1 < len(history) < 21
    )  # early; after which step is a matter of load


def test_a_keyboard_interrupt_while_drawing_stops_it(stage, monkeypatch):
    drawings = iter([KeyboardInterrupt, None])

    def training_figure(history):
        if error := next(drawings):
            raise error
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(live, "training_figure", training_figure)
    assert 1 < len(play(stage)) < 20 and stage.run.stopped


def test_a_closed_coroutine_leaves_no_training_behind(stage):
    async def abandon():
        coroutine = live.train(CONFIG, stage.run)
        coroutine.send(None)
        await asyncio.sleep(0.1)
        coroutine.close()

    asyncio.run(abandon())  # waits for the worker thread
    assert stage.run.stopped and not stage.thread.is_alive()


def test_errors_of_training_keep_their_type(stage):
    stage.fail_at = 5
    with pytest.raises(ZeroDivisionError, match="the loss"):
        play(stage)
    assert line(stage) == "failed after step 4: ZeroDivisionError: the loss" and not buttons(stage)


def test_errors_of_drawing_are_said_and_do_not_end_it(stage, monkeypatch):
    monkeypatch.setattr(live, "training_figure", lambda history: Figure(figsize=(0, 1)))
    assert len(play(stage)) == 21
    assert line(stage).startswith("done: 20 steps (no figure: ")


def test_a_run_stopped_before_its_first_evaluation_has_figures_to_show(tmp_path):
    """The cells below the training must run to `run.finish()`, or the run would not be known as
    stopped.
    """
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_solve_rate": 0.5}\n')
    recorded = completions_table(tmp_path)
    assert recorded.empty
    (axis,) = pairs_figure(recorded).axes
    assert "no step is evaluated yet" in axis.get_title()
