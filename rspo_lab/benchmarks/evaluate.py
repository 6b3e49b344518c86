"""A model on a benchmark: completions by the published protocol, kept on disk as they come, and
their grades.

A folder holds params.json and, for every length, completions_<length>.jsonl in the format that
`grade` reads, problem after problem, `samples` rows each.  A killed run goes on from its whole
lines and ends in the rows of one that was not killed. Torch is imported once the parameters are
known to be good.
"""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rspo_lab.benchmarks.grade import Grade, grade, pass_at_k
from rspo_lab.runs.files import replacing, write_json
from rspo_lab.runs.run import Run, open_run
from rspo_lab.tasks import task as task_named
from rspo_lab.tasks.verdict import PROTOCOLS, STYLES, in_words, one_of

if TYPE_CHECKING:
    from rspo_lab.models.diffusion_lm import DiffusionLM

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """All that the completions depend on; the defaults are d1's evaluation."""

    model: str  # local folder or hub name
    task: str
    data: str = ""  # a local file in the task's public format; "" is the task's own test split
    problems: int = 0  # 0: all of the file, or the task's TEST_PROBLEMS
    style: str = "d1-eval"  # or d1 (the training message), or compact (tiny models)
    block: int = 32  # tokens a decoding block; the compact style has one block
    steps: int = 0  # denoising steps a completion; 0: half its length
    temperature: float = 0.0
    samples: int = 1  # completions a problem
    batch: int = 8  # completions decoded at a time; part of what is drawn
    seed: int = 0
    dtype: str = "float32"  # LLaDA-8B's published numbers are of bfloat16

    def __post_init__(self):
        one_of(self.style, STYLES, "style")
        one_of(self.dtype, DTYPES, "dtype")
        if not hasattr(task_named(self.task), "COMPACT_LENGTH"):
            in_words(self.style, self.task)
        for name in ("block", "samples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.problems < 0 or self.steps < 0 or not 0 <= self.temperature < math.inf:
            raise ValueError("problems, steps and temperature must be at least 0")
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples at temperature 0 are all alike: give a temperature")
        if self.data and not Path(self.data).is_file():
            raise FileNotFoundError(f"no file of problems at data = {self.data}")

    def schedule(self, length: int) -> tuple[int, int]:
        """(block, steps) of a completion of `length` tokens; ValueError if it does not come out
        even.
        """
        block = length if self.style == "compact" else self.block
        steps = self.steps or length // 2
        if length < 1 or length % block:
            raise ValueError(f"length {length} is not a multiple of block {block}")
        if steps % (length // block) or not length // block <= steps <= length:
            raise ValueError(
                f"{steps} steps do not come out even for the {length // block} blocks of length {length}"
            )
        return block, steps


@dataclass(frozen=True)
class Result:
    """What a model reaches at one length.  `pass_at`: k -> (share, low, high), 95 % bootstrap over
    problems.
    """

    length: int
    problems: int
    grade: Grade
    pass_at: dict[int, tuple[float, float, float]]

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        pass_at = {
            str(k): dict(zip(("share", "low", "high"), values))
            for k, values in self.pass_at.items()
        }
        return {
            "length": self.length,
            "problems": self.problems,
            **json.loads(self.grade.to_json()),
            "pass_at": pass_at,
        }

    def to_text(self) -> str:
        """A few lines to read."""
        shares = [
            f"  pass@{k} {100 * s:.2f} %, 95 % bootstrap {100 * a:.2f} to {100 * b:.2f} %"
            for k, (s, a, b) in self.pass_at.items()
        ]
        return "\n".join(
            [f"length {self.length}, {self.problems} problems: {self.grade.to_text()}", *shares]
        )


def counts(text: str) -> list[int]:
    """The numbers of "128,256", none of ""; ValueError on anything else."""
    if not re.fullmatch("([1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*)?", text):
        raise ValueError(f"write whole numbers with commas between them, not {text!r}")
    return [int(word) for word in text.split(",")] if text else []


def benchmark(
    config: BenchmarkConfig,
    folder: Path,
    lengths: Sequence[int],
    *,
    protocol: str = "d1",
    ks: Sequence[int] = (),
    device: str = "auto",
    report: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Completes what is missing in `folder`, grades it and writes results.json; one result a
    length.

    `lengths` in tokens, none for the compact style, where the task says.  `report` gets a line at
    most every 5 s.
    ValueError on parameters that do not fit; RunError if the folder belongs to others or is in use.
    """
    task = task_named(config.task)
    one_of(protocol, PROTOCOLS, "protocol")
    if (config.style == "compact") == bool(lengths):
        raise ValueError(
            "the compact style has the task's own length: give no lengths"
            if lengths
            else "give lengths, such as 128,256,512"
        )
    lengths = list(lengths) or [task.COMPACT_LENGTH]  # pyright: ignore[reportAttributeAccessIssue]
    for length in lengths:
        config.schedule(length)
    if wrong := [k for k in ks if not 1 <= k <= config.samples]:
        raise ValueError(f"pass@{wrong[0]} needs k from 1 to the {config.samples} samples")
    from rspo_lab.models.loading import find
    from rspo_lab.random_streams import generator
    from rspo_lab.statistics import stratified_bootstrap

    find(config.model)
    if config.data:
        examples = task.read(config.data, config.problems or None)
    else:
        examples = task.examples("test", config.problems or task.TEST_PROBLEMS, seed=0)
    task.verdict(
        "<answer>1</answer>", examples[0], protocol=protocol, style=config.style
    )  # what cannot be judged is not completed
    run, results, model = open_run(folder, asdict(config)), [], None
    try:
        for length in lengths:
            path = run.path / f"completions_{length}.jsonl"
            model = _complete(config, run, path, length, examples, model, device, report)
            found = grade(path, config.task, protocol)
            solved = [v.components["solved"] for v in found.verdicts]
            correct = [
                round(sum(solved[i : i + config.samples]))
                for i in range(0, len(solved), config.samples)
            ]
            pass_at = {}
            for k in ks:
                values = [pass_at_k(config.samples, c, k) for c in correct]
                pass_at[k] = stratified_bootstrap(
                    [values], generator=generator(config.seed, "pass_at", length, k)
                )
            results.append(Result(length, len(examples), found, pass_at))
    except (Exception, KeyboardInterrupt) as error:
        run.fail(type(error).__name__, str(error))
        raise
    write_json(
        run.path / "results.json", {"protocol": protocol, "results": [r.to_dict() for r in results]}
    )
    run.finish()
    return results


def _complete(
    config: BenchmarkConfig,
    run: Run,
    path: Path,
    length: int,
    examples: list,
    model: "DiffusionLM | None",
    device: str,
    report: Callable[[str], None],
) -> "DiffusionLM | None":
    """Appends the missing completions, a batch at a time; the model, loaded if anything was
    missing.

    The batches are those of a run without a break, each with its own generator, so a batch that was
    cut short is decoded whole again.
    """
    task = task_named(config.task)
    items = [
        _row(task.record(e), e.id, sample, config.style)
        for e in examples
        for sample in range(config.samples)
    ]
    problems = [e for e in examples for _ in range(config.samples)]
    done = _whole_rows(path)
    for i, row in enumerate(done):
        if i >= len(items) or {name: row.get(name) for name in items[i]} != items[i]:
            raise ValueError(
                f"{path}:{i + 1} is not of these problems; has the data changed? choose another folder"
            )
    (block, steps), said = config.schedule(length), time.monotonic()
    for start in range(0, len(items), config.batch):
        have = max(0, len(done) - start)
        rows = items[start : start + config.batch]
        if have < len(rows):
            import torch

            from rspo_lab.decoding import complete, texts
            from rspo_lab.models.loading import load
            from rspo_lab.random_streams import generator

            model = model or load(config.model, device=device, dtype=getattr(torch, config.dtype))
            batch, _ = complete(
                model,
                task,
                problems[start : start + config.batch],
                style=config.style,
                length=length,
                block=block,
                steps=steps,
                temperature=config.temperature,
                threshold=1.0,
                generator=generator(config.seed, "benchmark", length, start),
            )
            lines = [
                json.dumps(row | {"completion": text})
                for row, text in zip(rows, texts(model, batch.completion, config.style))
            ]
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines[have:]))
            run.progress(start + len(rows), len(items), f"length {length}")
            if time.monotonic() - said >= 5:
                said = time.monotonic()
                report(f"length {length}: {start + len(rows)}/{len(items)} completions")
    return model


def _row(record: dict, name: str, sample: int, style: str) -> dict:
    """What a row says beside its completion, as JSON gives it back."""
    return json.loads(json.dumps({"id": name, "sample": sample, "style": style} | record))


def _whole_rows(path: Path) -> list[dict]:
    """The rows written so far; a last line that has no end is cut off the file."""
    if not path.exists():
        return []
    written = path.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:
        with replacing(path) as new:
            new.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]
