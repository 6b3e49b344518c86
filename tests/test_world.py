"""Several processes: the same rollouts, losses and weights as one, with whole weights and with sharded ones, and through a preemption."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import Folder

from rspo_lab.config import TrainConfig
from rspo_lab.training import train

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
WAYS = {"DDP": ["--multi_gpu"], "FSDP2": ["--use_fsdp", "--fsdp_version", "2"]}  # what accelerate calls them, on a CPU too


def config(**changes):
    """Five prompts, so that two processes do not have equally many rows; three masked sequences a forward, so that there are slices."""
    small = dict(model="base-sudoku", task="sudoku", steps=3, prompts=5, group=3, views=2, eval_every=3, eval_problems=5, warmup=0)
    return TrainConfig(**small | dict(threshold=0.9, checkpoint_every=1, snapshots=1, slice_size=3, device="cpu", lr=3e-4) | changes)


def launch(way, folder, config):
    """`train` in two processes, as a user starts it."""
    values = {name: str(value) for name, value in dataclasses.asdict(config).items() if value != ""}
    given = [word for name, value in values.items() for word in ("-p", name, value)]
    command = [*LAUNCH, *WAYS[way], "-m", "rspo_lab.cli", "train", "--run", str(folder), *given]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder, alone):
    """Same records and final weights, up to rounding."""
    ours, theirs = records(folder), records(alone)
    assert len(ours) == len(theirs)
    for mine, one in zip(ours, theirs):
        assert mine.keys() == one.keys()
        for name in mine:
            assert mine[name] == (None if one[name] is None else pytest.approx(one[name], rel=2e-4, abs=2e-5)), name
    (weights,) = (folder / "snapshots").glob("*/*.safetensors")
    (expected,) = (alone / "snapshots").glob("*/*.safetensors")
    found, wanted = load_file(weights), load_file(expected)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)  # Adam's first steps have the sign of a gradient, rounded or not


@pytest.mark.parametrize("way, changes", [("DDP", {}), ("FSDP2", {}), ("FSDP2", {"lora": "all-linear", "inner_steps": 2, "old_views": 3})])
def test_two_processes_train_as_one_does(way, changes, tmp_path):
    """Losses, rollouts, evaluations and saved weights; the moved weights make later steps agree only if all of the first does."""
    train(config(**changes), Folder(tmp_path / "alone"))
    process = launch(way, tmp_path / "two", config(**changes))
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert said.count("done: ") == 1 and json.loads((tmp_path / "two/status.json").read_text())["state"] == "done"
    assert_same_run(tmp_path / "two", tmp_path / "alone")
    assert min(r["gradient_norm"] for r in records(tmp_path / "alone")[1:]) > 1e-2


def test_a_preempted_run_of_two_goes_on_in_one(tmp_path):
    """SIGTERM to the launcher: both processes end after the step in hand, and its checkpoint is whole weights again."""
    longer = config(steps=40, eval_every=40, eval_problems=1, lora="all-linear")
    folder = tmp_path / "run"
    process = launch("FSDP2", folder, longer)
    for _ in range(1200):
        if process.poll() is not None or ((folder / "metrics.jsonl").exists() and len(records(folder)) > 3):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and status["error"]["kind"] == "Preempted", said
    train(longer, Folder(folder))
    train(longer, Folder(tmp_path / "alone"))
    assert_same_run(folder, tmp_path / "alone")
