"""Bad days: a full disk, a folder that cannot be written, a hundred notebooks at once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from throwaway import make

from rspo_lab.runs.files import read_json

ROOT = Path(__file__).parents[1]
TRAIN = [
    sys.executable,
    "-m",
    "rspo_lab.cli",
    "train",
    "-p",
    "model",
    "base-sudoku",
    "-p",
    "task",
    "sudoku",
    "-p",
    "steps",
    "6",
    "-p",
    "prompts",
    "2",
    "-p",
    "group",
    "4",
    "-p",
    "checkpoint_every",
    "2",
    "-p",
    "eval_problems",
    "4",
    "-p",
    "snapshots",
    "1",
    "-p",
    "device",
    "cpu",
    "--run",
]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# In a mount namespace of its own: a disk of 7 MB takes one checkpoint (4 MB) but not a second
# beside it, then a larger one.
FULL = """
set -u
mount -t tmpfs -o size=7m tmpfs "$1"
"${@:2}" "$1/run"; echo "first: $?"
cp -r "$1/run" "$1/../after_first"
mount -o remount,size=40m "$1"
"${@:2}" "$1/run"; echo "second: $?"
cp -r "$1/run" "$1/../after_second"
"""


def may_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return (
        bool(shutil.which("unshare"))
        and subprocess.run(command, capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="no unprivileged mounts here, so no small disk to fill")
def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(tmp_path):
    """Training says so; with room it goes on from its checkpoint to the undisturbed records."""
    (tmp_path / "disk").mkdir()
    command = ["unshare", "-rm", "bash", "-c", FULL, "bash", str(tmp_path / "disk"), *TRAIN]
    said = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    complaints = [line for line in said.stderr.splitlines() if line.startswith("rspo-lab:")]
    assert "first: 1" in said.stdout and "second: 0" in said.stdout, said
    assert (
        len(complaints) == 1
        and "No space left on device" in complaints[0]
        and "Traceback" not in said.stderr
    )
    first = tmp_path / "after_first"
    assert (
        read_json(first / "status.json")["state"] in ("failed", "running")
        and (first / "checkpoint.pt").stat().st_size > 1e6
    )
    assert not [
        path for path in first.rglob(".*") if path.name != ".lock"
    ]  # nothing half-written is left
    subprocess.run(
        [*TRAIN, str(tmp_path / "undisturbed")], env=ENVIRONMENT, check=True, capture_output=True
    )
    metrics = [
        (tmp_path / name / "metrics.jsonl").read_text() for name in ("after_second", "undisturbed")
    ]
    assert metrics[0] == metrics[1] and metrics[0].count("\n") == 7


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="no unprivileged mounts here, so no small disk to fill")
def test_a_notebook_on_a_full_disk_is_one_error_and_runs_when_there_is_room(tmp_path):
    for name in ("disk", "notebooks"):
        (tmp_path / name).mkdir()
    fill = "(run.path / 'big').write_bytes(b'0' * 10_000_000)"
    notebook = make(tmp_path / "notebooks", fill, "run.finish()")
    command = [
        sys.executable,
        "-m",
        "rspo_lab.cli",
        "run",
        str(notebook),
        "--name",
        "full",
        "--runs",
    ]
    said = subprocess.run(
        ["unshare", "-rm", "bash", "-c", FULL, "bash", str(tmp_path / "disk"), *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    complaints = [line for line in said.stderr.splitlines() if line.startswith("rspo-lab:")]
    assert "first: 1" in said.stdout and "second: 0" in said.stdout, said
    assert (
        len(complaints) == 1
        and "No space left on device" in complaints[0]
        and "Traceback" not in said.stderr
    )
    (first,) = (tmp_path / "after_first/full").iterdir()
    assert (
        read_json(first / "status.json")["state"] != "done"
        and read_json(first / "params.json")["steps"] == 3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["run", "{}/notebooks/demo.ipynb", "--runs", "{}/locked/runs"],
        ["sweep", "{}/notebooks/demo.ipynb", "--grid", "lam=1,2", "--runs", "{}/locked/runs"],
        [*TRAIN[3:], "{}/locked/run"],
    ],
    ids=["run", "sweep", "train"],
)
def test_a_folder_that_cannot_be_written_is_one_error(words, tmp_path):
    (tmp_path / "notebooks").mkdir()
    make(tmp_path / "notebooks", "run.finish()")
    (tmp_path / "locked").mkdir(mode=0o555)
    command = [sys.executable, "-m", "rspo_lab.cli", *(word.format(tmp_path) for word in words)]
    if os.getuid() == 0:  # whom permissions stop only without this capability
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    said = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert said.returncode == 2 and len(said.stderr.splitlines()) == 1, said
    assert "Permission denied" in said.stderr and str(tmp_path / "locked") in said.stderr


HUNDRED = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from rspo_lab.runs.notebook import run_notebook
notebook, runs = map(Path, sys.argv[1:])
def one(i):
    return run_notebook(notebook, {"steps": i}, runs=runs, report=lambda line: None)
with ThreadPoolExecutor(100) as pool:
    print([outcome.message for outcome in pool.map(one, range(100)) if outcome.code])
"""


@pytest.mark.heavy
def test_a_hundred_notebooks_start_at_once(tmp_path):
    (tmp_path / "notebooks").mkdir()
    notebook = make(tmp_path / "notebooks", "run.finish()")
    command = [sys.executable, "-c", HUNDRED, str(notebook), str(tmp_path / "runs")]
    said = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert said.stdout.splitlines() == ["[]"], said
    states = [read_json(path)["state"] for path in (tmp_path / "runs").rglob("status.json")]
    assert states == ["done"] * 100
