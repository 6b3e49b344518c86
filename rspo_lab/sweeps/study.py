"""What is to be run: the points of a study's file or of a grid over one notebook, each with its
folder and its cost.

A point is one notebook run.  A minute is one of a slot: a CPU core, or a GPU.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rspo_lab.runs.parameters import (
    Parameter,
    ParameterError,
    check,
    coerce,
    complete,
    declared,
    unknown,
)
from rspo_lab.runs.run import run_path

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SCALES = ("cpu", "gpu")
_KEYS = {"notebook", "parameters", "grid", "minutes", "gpu"}


class _Sheet(yaml.SafeLoader):
    """YAML in which a name given twice is an error, where plain YAML drops the first."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.MarkedYAMLError(
                problem=f"{twice[0]} is there twice", problem_mark=node.start_mark
            )
        return node


@dataclass(frozen=True)
class Point:
    """One run: its folder, the notebook, and the parameters that differ from the notebook's
    defaults.
    """

    name: str
    notebook: Path
    given: dict[str, Any]
    path: Path
    needs: tuple[Path, ...] = ()  # folders of the runs whose results it takes up
    wave: int = 0  # 0 needs no other run, 1 needs some of 0, and so on
    minutes: float | int | None = None  # what it is thought to take


@dataclass(frozen=True)
class Study:
    """All points, those of lower waves first."""

    title: str
    points: list[Point] = field(default_factory=list)

    @property
    def waves(self) -> list[list[Point]]:
        return [
            list(part) for _, part in itertools.groupby(self.points, key=lambda point: point.wave)
        ]

    def cost(self, slots: int, left: Sequence[Point]) -> tuple[float, float] | None:
        """(minutes of slots, minutes on the clock with so many slots) of the points left; None if
        one has no estimate.
        """
        if any(point.minutes is None for point in left):
            return None
        total = clock = 0.0
        for wave in self.waves:
            free = [0.0] * slots
            for point in wave:
                if point in left:
                    total += point.minutes
                    free[free.index(min(free))] += point.minutes
            clock += max(free)
        return total, clock


def read_study(file: Path, root: Path, scale: str = "cpu") -> Study:
    """The points of a YAML file, whose folders are in `root`.

    `title: text` and `runs: {name: {notebook: file.ipynb, parameters: {...}, grid: {seed: [0, 1]},
    minutes: {cpu: 3, gpu: 9},
    gpu: {...}}}`: a point a combination of the grid's values; `gpu` holds what changes at that
    scale; a parameter "@name" is the folder of the first point of the run of that name.
    ValueError, naming the run, for anything else and for parameters that the notebook does not
    take.
    """
    try:
        sheet = yaml.load(file.read_text(encoding="utf-8"), _Sheet)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a study in YAML: {error}") from None
    if (
        not isinstance(sheet, dict)
        or set(sheet) != {"title", "runs"}
        or not isinstance(sheet["runs"], dict)
        or not sheet["runs"]
    ):
        raise ValueError(f"{file}: a study is `title: text` and `runs:` with a name for every run")
    points: list[Point] = []
    for name, run in sheet["runs"].items():
        try:
            points += _points(
                str(name), run, {point.name: point for point in reversed(points)}, root, scale
            )
        except ValueError as error:
            raise ValueError(f"{file}: run {name!r}: {error}") from None
    return Study(str(sheet["title"]), sorted(points, key=lambda point: point.wave))


def grid_study(
    notebook: Path, fixed: Mapping[str, Any], grid: Mapping[str, list], root: Path
) -> Study:
    """A point a combination of the grid's values, for one notebook."""
    return Study(
        f"{notebook.stem} over {', '.join(grid)}",
        _combine(notebook.stem, notebook, fixed, grid, root),
    )


def grid_values(notebook: Path, words: Sequence[str]) -> dict[str, list]:
    """{parameter: values} of NAME=VALUE,VALUE words, typed as the notebook declares; commas inside
    brackets or quotes do not part.
    """
    parameters, grid = declared(notebook), {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not text:
            raise ParameterError(f"--grid takes NAME=VALUE,VALUE, not {word!r}")
        if name not in parameters:
            raise unknown(name, parameters)
        if name in grid:
            raise ParameterError(
                f"the grid names {name} twice: write --grid {name}=VALUE,VALUE once"
            )
        grid[name] = [_value(parameters[name], part.strip()) for part in _parted(text)]
    return grid


def _value(parameter: Parameter, text: str) -> Any:
    """`coerce`, but of a text in quotes what is inside."""
    quoted = (
        len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]
    )
    return check(parameter, text[1:-1]) if quoted else coerce(parameter, text)


def _points(name: str, run: Any, above: Mapping[str, Point], root: Path, scale: str) -> list[Point]:
    """The points of one entry of a study's file; `above` holds the first point of each run that it
    may name.
    """
    if not isinstance(run, dict) or not {"notebook"} <= set(run) <= _KEYS:
        odd = [str(key) for key in run if key not in _KEYS] if isinstance(run, dict) else []
        raise ValueError(
            f"it takes {', '.join(sorted(_KEYS))}, and a notebook at least"
            + (f"; not {', '.join(odd)}" if odd else "")
        )
    notebook = NOTEBOOKS / str(run["notebook"])
    if not notebook.is_file():
        raise ValueError(f"there is no notebook {run['notebook']!r} in {NOTEBOOKS}")
    parts = {key: run.get(key) or {} for key in _KEYS - {"notebook"}}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f"{key} must be a mapping, not {part!r}")
    if odd := [
        parameter
        for parameter, values in parts["grid"].items()
        if not isinstance(values, list) or not values
    ]:
        raise ValueError(f"grid: {odd[0]} needs a list of values")
    if odd := [
        key
        for part in ("parameters", "grid", "gpu")
        for key in parts[part]
        if not isinstance(key, str)
    ]:
        raise ValueError(
            f"{odd[0]!r} is no parameter's name (YAML reads on, off, yes and no as true and false)"
        )
    if any(
        isinstance(value, str) and value.startswith("@")
        for values in parts["grid"].values()
        for value in values
    ):
        raise ValueError("grid: only `parameters` can name a run by @: write an entry for each")
    if odd := [
        value
        for value in parts["minutes"].values()
        if type(value) not in (int, float) or not value >= 0
    ]:
        raise ValueError(f"minutes are a number from 0 on, not {odd[0]!r}")
    if unheard := sorted(set(parts["minutes"]) - set(SCALES)):
        raise ValueError(f"minutes are of {' and '.join(SCALES)}, not of {unheard[0]!r}")
    given, needed = dict(parts["parameters"] | (parts["gpu"] if scale == "gpu" else {})), []
    for parameter, value in given.items():
        if isinstance(value, str) and value.startswith("@"):
            if value[1:] not in above:
                raise ValueError(f"{value} names no run above it")
            needed.append(above[value[1:]])
            given[parameter] = os.path.relpath(
                needed[-1].path, notebook.parent
            )  # where its kernel runs; so moved runs keep their keys
    wave = max((point.wave + 1 for point in needed), default=0)
    needs = tuple(point.path for point in needed)
    return _combine(
        name,
        notebook,
        given,
        parts["grid"],
        root,
        needs=needs,
        wave=wave,
        minutes=parts["minutes"].get(scale),
    )


def _combine(name, notebook, fixed, grid, root, **others) -> list[Point]:
    """A point a combination; all parameters are checked."""
    if both := sorted(set(fixed) & set(grid)):
        raise ParameterError(f"{both[0]} is given and in the grid: keep one")
    parameters, points = declared(notebook), []
    for values in itertools.product(*grid.values()):
        given = {**fixed, **dict(zip(grid, values))}  # numbers such as 3e-4 are text to YAML
        given = {
            k: coerce(parameters[k], v) if isinstance(v, str) and k in parameters else v
            for k, v in given.items()
        }
        path = run_path(notebook, complete(parameters, given), root, name)
        if path not in [point.path for point in points]:
            points.append(Point(name, notebook, given, path, **others))
    return points


def _parted(text: str) -> list[str]:
    """`text` parted at its commas, but not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if c == "," and not depth and not quote:
            parts.append("")
            continue
        begins = depth or not parts[-1].strip()
        parts[-1] += c
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c if begins else ""  # an apostrophe inside a word is none
        else:
            depth += (c in "([{") - (c in ")]}")
    return parts
