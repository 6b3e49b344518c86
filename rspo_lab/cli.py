"""The command line: `rspo-lab run | sweep | report | runs | train | eval | grade`.

Exit codes: 0 done; 1 a failure at run time; 2 bad input, with one line that says so; `run` has more
(notebook.Outcome). Nothing heavy is imported before the input is known to be good.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rspo_lab.runs.parameters import (
    Parameter,
    ParameterError,
    coerce,
    complete,
    declared,
    fields,
    unknown,
)
from rspo_lab.runs.run import RunError, load_runs, open_run, runs_root


class UsageError(ValueError):
    """The command line is not one of ours."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    try:
        args = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
        return args.command(args)
    except OSError as error:
        return _complain(f"{error.strerror}: {error.filename}" if error.filename else str(error), 2)
    except (ParameterError, RunError, ValueError) as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt as error:
        return _complain("interrupted", 143 if error.args else 130)  # SIGTERM has an argument


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rspo-lab",
        description="Reinforcement learning for diffusion language models, by notebook.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run a notebook headless, once for given parameters")
    run.set_defaults(command=_run)
    run.add_argument("notebook", type=Path)
    _add_parameters(run)
    run.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help="where runs go (default: runs, beside the notebooks folder)",
    )
    run.add_argument("--name", help="folder of the run in DIR (default: the notebook's name)")
    run.add_argument("--timeout", type=float, metavar="S", help="end the run after S seconds")

    train = commands.add_parser(
        "train",
        help="train without a notebook; under accelerate launch too, or torchrun -m rspo_lab.cli -- train",
    )
    train.set_defaults(command=_train)
    train.add_argument("--run", type=Path, metavar="DIR", help="the run's folder")
    train.add_argument(
        "--study",
        nargs=2,
        metavar=("FILE", "RUN"),
        help="parameters of a study's run, at its GPU scale; -p wins",
    )
    _add_parameters(train)

    grade = commands.add_parser("grade", help="score a file of completions")
    grade.set_defaults(command=_grade)
    grade.add_argument("file", type=Path)
    grade.add_argument("--task", required=True)
    grade.add_argument("--protocol", default="strict", help="d1 (as published) or strict (default)")
    grade.add_argument("--json", action="store_true", help="print JSON")

    evaluate = commands.add_parser(
        "eval",
        help="complete a benchmark with a model, and score it; a second call goes on where one ended",
    )
    evaluate.set_defaults(command=_eval)
    evaluate.add_argument(
        "--model", required=True, help="a folder, one of data/base-*, or a hub name"
    )
    evaluate.add_argument("--task", required=True)
    evaluate.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where completions and results.json go",
    )
    for option, kind, text in (
        ("lengths", str, "completion tokens: 128,256,512"),
        ("k", str, "report pass@k of the samples: 1,4"),
        ("data", str, "a file of problems (default: the task's test split)"),
        ("problems", int, "how many (default: all)"),
        ("style", str, "d1-eval (default), d1 or compact"),
        ("block", int, "tokens a block (default: 32)"),
        ("steps", int, "denoising steps (default: half the length)"),
        ("temperature", float, "default: 0"),
        ("samples", int, "completions a problem (default: 1)"),
        ("batch", int, "completions at a time (default: 8)"),
        ("seed", int, "default: 0"),
        ("dtype", str, "float32 (default) or bfloat16"),
        ("device", str, "default: cuda where there is one"),
    ):
        evaluate.add_argument(f"--{option}", type=kind, help=text)
    evaluate.add_argument("--protocol", default="d1", help="d1 (default, as published) or strict")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    runs = commands.add_parser("runs", help="what ran, and how it ended")
    runs.set_defaults(command=_runs)
    runs.add_argument("folder", type=Path, nargs="?", default=Path("runs"))

    sweep = commands.add_parser(
        "sweep", help="run a study, or a grid over one notebook, and write its report"
    )
    sweep.set_defaults(command=_sweep)
    sweep.add_argument(
        "target",
        type=Path,
        metavar="STUDY.yaml|NOTEBOOK",
        help="one of notebooks/studies/*.yaml, or a notebook",
    )
    sweep.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=A,B",
        help="values of a notebook's parameter",
    )
    sweep.add_argument(
        "-p",
        dest="given",
        action="append",
        default=[],
        metavar="NAME VALUE",
        help="set a parameter for all points",
    )
    sweep.add_argument(
        "--scale",
        choices=("cpu", "gpu"),
        default="cpu",
        help="which parameters of a study (default: cpu)",
    )
    sweep.add_argument(
        "--cluster",
        default="local",
        help="local (default), slurm, or debug: in this process, one after the other",
    )
    sweep.add_argument(
        "--jobs", type=int, metavar="N", help="points side by side (default: one a core)"
    )
    sweep.add_argument(
        "--gpus", type=int, metavar="N", help="points side by side, each on a GPU of its own"
    )
    sweep.add_argument(
        "--timeout",
        type=float,
        metavar="MIN",
        help="end a point after MIN minutes; on Slurm: requeue it, three times",
    )
    sweep.add_argument(
        "--slurm",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="sbatch options: partition=gpu",
    )
    sweep.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help="where runs go (default: runs, beside the notebooks folder)",
    )
    sweep.add_argument("--name", help="folder of the sweep in DIR (default: the file's name)")
    sweep.add_argument(
        "--dry-run",
        action="store_true",
        help="list the points, how they stand and what is left to pay; run nothing",
    )

    report = commands.add_parser(
        "report", help="one HTML page over all runs in a folder, and results.parquet"
    )
    report.set_defaults(command=_report)
    report.add_argument("folder", type=Path, help="of a sweep, such as runs/variance")
    return parser


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-p",
        dest="given",
        action="append",
        default=[],
        metavar="NAME VALUE",
        help="set a parameter",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the parameters, their defaults and meanings"
    )


def _joined(argv: Sequence[str]) -> list[str]:
    """`-p NAME VALUE` as one argument, -pNAME=VALUE, for argparse takes a VALUE such as -1e-4 for
    an option.
    """
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "-p":
            if len(rest) < 2 or "=" in rest[0]:
                raise UsageError("write -p NAME VALUE")
            word = f"-p{rest.pop(0)}={rest.pop(0)}"
        words.append(word)
    return words


def _values(parameters: Mapping[str, Parameter], given: Sequence[str]) -> dict[str, Any]:
    """The values of NAME=VALUE words, typed as declared."""
    values: dict[str, Any] = {}
    for name, text in (word.split("=", 1) for word in given):
        if name not in parameters:
            raise unknown(name, parameters)
        if name in values:
            raise ParameterError(f"parameter {name} is given twice")
        values[name] = coerce(parameters[name], text)
    return values


def _list(parameters: Mapping[str, Parameter]) -> int:
    for p in parameters.values():
        default = "" if p.required else f" = {p.default!r}"
        print(f"{p.name}: {p.annotation}{default}" + (f"  # {p.comment}" if p.comment else ""))
    return 0


def _run(args: argparse.Namespace) -> int:
    parameters = declared(args.notebook)
    if args.list:
        return _list(parameters)
    given = _values(parameters, args.given)
    from rspo_lab.runs.notebook import run_notebook

    runs = args.runs or runs_root(args.notebook)
    try:
        outcome = run_notebook(
            args.notebook,
            given,
            runs=runs,
            name=args.name,
            timeout=args.timeout,
            report=partial(print, flush=True),
        )
    except (OSError, RuntimeError) as error:
        return _complain(f"{type(error).__name__}: {error}", 1)
    if outcome.code:
        return _complain(outcome.message, outcome.code)
    print(outcome.message)
    return 0


def _train(args: argparse.Namespace) -> int:
    from rspo_lab.config import TrainConfig
    from rspo_lab.distributed import joined
    from rspo_lab.training import train

    parameters = fields(TrainConfig)
    if args.list:
        return _list(parameters)
    if args.run is None:
        raise UsageError("name the run's folder: --run DIR")
    given = _values(parameters, args.given)
    params = complete(parameters, _run_of_study(*args.study) | given if args.study else given)
    config = TrainConfig(**params)
    run = open_run(args.run, params)
    rank, said = os.environ.get("RANK", "0"), 0.0

    def on_step(record: dict[str, Any]) -> None:
        nonlocal said
        if "reward" in record and rank == "0" and time.monotonic() - said >= 5:
            said = time.monotonic()
            print(
                f"step {record['step']}/{config.steps}  reward {record['reward']:.2f}", flush=True
            )

    try:
        with joined(config.device) as world:
            train(config, run, on_step=on_step, world=world)
    except (Exception, KeyboardInterrupt) as error:
        message = f"{type(error).__name__}: {error}"
        try:
            run.fail(type(error).__name__, str(error))
            (run.path / f"traceback{'' if rank == '0' else '-' + rank}.txt").write_text(
                traceback.format_exc(), encoding="utf-8"
            )
        except OSError as other:
            message += f"; {run.path} cannot be written ({other.strerror}): mend that and run this again, it goes on from its checkpoint"
        return _complain(message, 130 if isinstance(error, KeyboardInterrupt) else 1)
    run.finish()
    if rank == "0":
        print(f"done: {run.path}")
    return 0


def _run_of_study(file: str, name: str) -> dict[str, Any]:
    """The parameters of one run of a study, as its notebook would have them on a GPU."""
    from rspo_lab.sweeps.study import read_study

    points = read_study(Path(file), Path("runs"), "gpu").points
    found = [
        point for point in points if point.name == name and point.notebook.name == "02_train.ipynb"
    ]
    if len(found) != 1:
        trains = sorted({point.name for point in points if point.notebook.name == "02_train.ipynb"})
        raise UsageError(
            f"{file} has {len(found)} points {name!r} of notebook 02_train, not one; it trains {', '.join(trains)}"
        )
    return complete(declared(found[0].notebook), found[0].given)


def _grade(args: argparse.Namespace) -> int:
    from rspo_lab.benchmarks.grade import grade

    found = grade(args.file, args.task, args.protocol)
    print(found.to_json() if args.json else found.to_text())
    return 0


def _eval(args: argparse.Namespace) -> int:
    from rspo_lab.benchmarks.evaluate import BenchmarkConfig, benchmark, counts

    config = BenchmarkConfig(
        **{
            name: value
            for name in fields(BenchmarkConfig)
            if (value := getattr(args, name)) is not None
        }
    )
    lengths, ks, said = (
        counts(args.lengths or ""),
        counts(args.k or ""),
        partial(print, file=sys.stderr, flush=True),
    )
    found = benchmark(
        config,
        args.out,
        lengths,
        protocol=args.protocol,
        ks=ks,
        device=args.device or "auto",
        report=said,
    )
    print(
        json.dumps([result.to_dict() for result in found])
        if args.json
        else "\n".join(result.to_text() for result in found)
    )
    return 0


def _runs(args: argparse.Namespace) -> int:
    from rspo_lab.sweeps.progress import table

    frame = load_runs(args.folder)
    print(table(frame) if len(frame) else f"no runs in {args.folder}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from rspo_lab.sweeps.study import NOTEBOOKS, grid_study, grid_values, read_study

    is_study = args.target.suffix in (".yaml", ".yml")
    if is_study and (args.grid or args.given):
        raise UsageError(
            "a study says its own parameters: write them in the file, or sweep a notebook with --grid and -p"
        )
    if not is_study and not args.grid:
        raise UsageError(
            f"which points? --grid NAME=A,B, or run one with `rspo-lab run {args.target}`"
        )
    if not args.target.is_file():
        raise FileNotFoundError(f"there is no file {args.target}")
    folder = args.name or args.target.stem + ("" if is_study else "_sweep")
    if Path(folder).name != folder:
        raise UsageError(f"--name {folder!r} must be one folder name")
    root = (
        args.runs or runs_root(NOTEBOOKS / "any" if is_study else args.target)
    ).resolve() / folder
    if is_study:
        study = read_study(args.target, root, args.scale)
    else:
        values = _values(declared(args.target), args.given)
        study = grid_study(args.target.resolve(), values, grid_values(args.target, args.grid), root)
    from rspo_lab.sweeps.sweep import plan, resources, summary, sweep

    on = resources(
        args.cluster,
        jobs=args.jobs,
        gpus=args.gpus,
        timeout_min=args.timeout,
        slurm=tuple(args.slurm),
    )
    if args.dry_run:
        print(plan(study, root, on))
        return 0
    asked = args.scale == "gpu" or any(
        str(point.given.get("device")).startswith("cuda") for point in study.points
    )
    if asked and not (on.gpus or on.slurm):
        raise UsageError(
            f"{args.target.name} asks for GPUs: say how many points side by side, --gpus N"
        )
    try:
        states = sweep(study, root, on)
    except RuntimeError as error:  # of sbatch or squeue
        return _complain(str(error), 1)
    from rspo_lab.sweeps.report import report

    print(f"report: {report(root)}\n{summary(states)}", flush=True)
    return 0 if set(states.values()) == {"done"} else 1


def _report(args: argparse.Namespace) -> int:
    from rspo_lab.sweeps.report import report

    print(report(args.folder))
    return 0


def _complain(message: str, code: int) -> int:
    """One line on stderr."""
    print(f"rspo-lab: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
