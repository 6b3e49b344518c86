"""The tracker: off without its variable, one run by the folder's name with it (trackio's interface,
as accelerate calls it).
"""

import sys
import types

import pytest

from rspo_lab.config import TrainConfig
from rspo_lab.runs.tracking import VARIABLE, tracking

CONFIG = TrainConfig(model="base-sudoku", task="sudoku")


def test_off_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", None)  # importing it would fail
    with tracking(CONFIG, tmp_path) as track:
        assert track({"step": 1, "reward": 0.5}) is None


def test_records_go_to_the_named_project(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )

    def init(project, **options):
        calls.append((project, options["name"], options["resume"], options["config"]["task"]))
        return run

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    monkeypatch.setenv(VARIABLE, "mine")
    with tracking(CONFIG, tmp_path / "rspo/abc") as track:
        track({"step": 3, "reward": 0.5, "mask_sd": None})
    assert calls == [("mine", "rspo/abc", "allow", "sudoku"), (3, {"reward": 0.5}), "finish"]
    monkeypatch.setenv("RANK", "1")
    with tracking(CONFIG, tmp_path) as track:
        track({"step": 1})
    assert len(calls) == 3


def test_a_missing_tracker_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "mine")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with (
        pytest.raises(RuntimeError, match=r"pip install -e .\[track\]"),
        tracking(CONFIG, tmp_path),
    ):
        pass
