"""The command line: exit codes, one clear line for every error, and nothing heavy before the input
is good.
"""

import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from throwaway import make

from rspo_lab.cli import main
from rspo_lab.runs import run as runs_module
from rspo_lab.runs.files import read_json
from rspo_lab.runs.run import load_runs, open_run, release

HEAVY = (
    "torch",
    "papermill",
    "pandas",
    "matplotlib",
    "IPython",
    "nbformat",
    "transformers",
    "numpy",
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    (tmp_path / "notebooks").mkdir()
    yield
    for path in list(runs_module._HELD):
        release(path)


@dataclass(frozen=True, kw_only=True)
class Config:
    task: str
    steps: int = 3
    lr: float = 1e-3

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


@pytest.fixture
def training(monkeypatch):
    """A stand-in for rspo_lab.training; a negative lr makes it fail."""

    def train(config, run, *, on_step, world):
        assert run.params == vars(config) and world.size == 1
        for step in range(1, config.steps + 1):
            on_step({"step": step, "reward": 0.5})
        if config.lr < 0:
            raise RuntimeError("loss is\nnot finite")

    module = types.ModuleType("rspo_lab.training")
    module.TrainConfig, module.train = Config, train
    monkeypatch.setattr(Config, "device", "cpu", raising=False)
    monkeypatch.setitem(sys.modules, "rspo_lab.training", module)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "the following arguments are required: COMMAND (see rspo-lab --help)"),
        ("run", "the following arguments are required: notebook (see rspo-lab run --help)"),
        ("run x.ipynb", "no notebook at x.ipynb"),
        (
            "run notebooks/demo.ipynb -p stpes 3",
            "unknown parameter 'stpes': did you mean 'steps'? declared: steps, lam, data",
        ),
        ("run notebooks/demo.ipynb -p steps abc", "parameter steps: given 'abc', expected int"),
        ("run notebooks/demo.ipynb -p steps 1 -p steps 2", "parameter steps is given twice"),
        ("run notebooks/demo.ipynb -p steps", "write -p NAME VALUE"),
        ("run notebooks/demo.ipynb -p steps=3 -p lam 1", "write -p NAME VALUE"),
        ("run notebooks/demo.ipynb --runs file/x", None),
        (
            "run notebooks/demo.ipynb --timeout x",
            "argument --timeout: invalid float value: 'x' (see rspo-lab run --help)",
        ),
        ("runs nowhere", "no folder of runs at nowhere"),
        ("grade none.jsonl --task countdown", "No such file or directory: none.jsonl"),
        ("train -p task sudoku", "name the run's folder: --run DIR"),
        ("train --run r -p steps 4", "no value for task: give -p task VALUE"),
        (
            "train --run r -p task a -p stpes 4",
            "unknown parameter 'stpes': did you mean 'steps'? declared: task, steps, lr",
        ),
        ("train --run r -p task a -p steps 0", "steps must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, training, words, line):
    make(Path("notebooks"))
    Path("file").touch()
    before = sorted(Path().rglob("*"))
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rspo-lab: ") and err.count("\n") == 1
    assert line is None or err == f"rspo-lab: {line}\n"
    assert sorted(Path().rglob("*")) == before


def test_help_and_bad_parameters_import_nothing_heavy():
    make(Path("notebooks"))
    code = f"""
import sys
from rspo_lab.cli import main
codes = [main(["run", "notebooks/demo.ipynb", "-p", "stpes", "3"]), main(["run", "notebooks/demo.ipynb", "--list"])]
sweep = ["sweep", "notebooks/demo.ipynb", "--dry-run", "--grid"]
codes += [main([*sweep, "stpes=3"]), main([*sweep, "steps=3"])]
for words in (["--help"], ["run", "--help"], ["sweep", "--help"]):
    try:
        main(words)
    except SystemExit as end:
        codes.append(end.code)
print(codes, [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[2, 0, 2, 0, 0, 0, 0] []"
    assert done.stdout.startswith(
        "steps: int = 3  # how many; GPU: 2000\nlam: float = 0.1\ndata: str | None = None\n"
    )


def test_run_and_runs(capsys):
    make(Path("notebooks"), "assert lam < 0, 'too large'", "run.finish()")
    assert main(["run", "notebooks/demo.ipynb", "-p", "lam", "-1e-4"]) == 0
    assert main(["run", "notebooks/demo.ipynb", "-p", "lam", "-0.0001"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("done: ") and "already done: " in out
    assert main(["run", "notebooks/demo.ipynb", "-p", "lam", "0.5"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("rspo-lab: AssertionError: too large (see ") and err.count("\n") == 1
    assert main(["runs"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [
        "name",
        "key",
        "state",
        "progress",
        "lam",
        "error",
    ]  # steps and data are the same in all
    assert sorted([line[0], line[2], line[3]] for line in lines[1:]) == [
        ["demo", "done", "-0.0001"],
        ["demo", "failed", "0.5"],
    ]


def test_runs_of_an_empty_folder(capsys):
    Path("runs").mkdir()
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs in runs\n"


def test_train_opens_a_run_and_finishes_it(capsys, training):
    assert main(["train", "--run", "runs/x", "-p", "task", "sudoku", "-p", "lr", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "step 1/3  reward 0.50",
        f"done: {Path('runs/x').resolve()}",
    ]
    assert read_json(Path("runs/x/params.json")) == {"task": "sudoku", "steps": 3, "lr": 1.0}
    assert read_json(Path("runs/x/status.json"))["state"] == "done"
    assert main(["train", "--run", "runs/x", "-p", "task", "countdown"]) == 2
    assert "belongs to other parameters (task, lr differ)" in capsys.readouterr().err


def test_a_training_failure_is_one_line_and_on_record(capsys, training):
    assert main(["train", "--run", "runs/x", "-p", "task", "sudoku", "-p", "lr", "-1"]) == 1
    assert capsys.readouterr().err == "rspo-lab: RuntimeError: loss is not finite\n"
    (row,) = load_runs("runs").to_dict("records")
    assert (row["state"], row["error"]) == ("failed", "loss is\nnot finite")
    assert "Traceback" in Path("runs/x/traceback.txt").read_text()


def test_train_lists_its_options(capsys, training):
    assert main(["train", "--list"]) == 0
    assert capsys.readouterr().out == "task: str\nsteps: int = 3\nlr: float = 0.001\n"


def test_the_real_training_options_are_of_types_that_cross(capsys):
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "task: str" in lines and all(
        line.split()[1] in ("int", "float", "str", "bool") for line in lines
    )


def test_a_run_in_use_is_exit_2(capsys, training):
    code = "import pathlib, rspo_lab.runs.run as r; r.open_run(pathlib.Path('x'), {}); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"open\n"
        assert main(["train", "--run", "x", "-p", "task", "a"]) == 2
        assert f"in use by process {other.pid}" in capsys.readouterr().err
        other.kill()


def test_grade_prints_text_or_json(capsys):
    row = {"question": "", "completion": "<answer>1+2</answer>", "ground_truth": [[1, 2], 3]}
    Path("c.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["grade", "c.jsonl", "--task", "countdown"]) == 0
    assert "protocol strict" in capsys.readouterr().out
    assert main(["grade", "c.jsonl", "--task", "countdown", "--protocol", "d1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"] == "d1"
    assert main(["grade", "c.jsonl", "--task", "cuntdown"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_broken_run_directory_is_no_traceback(capsys):
    run = open_run(Path("runs/a/1"), {"lam": 0.1})
    (run.path / "status.json").write_text("{")
    assert main(["runs"]) == 0
    assert "running" in capsys.readouterr().out
