"""Parameters: what a cell or a config declares, what a text means, and what is refused."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from throwaway import make

from rspo_lab.runs.parameters import (
    Parameter,
    ParameterError,
    check,
    coerce,
    complete,
    declared,
    fields,
)


def test_declared_reads_types_literals_and_comments(tmp_path):
    lines = [
        "a: int = -3  # meaning; GPU: 2000",
        "b = 1e-4",
        "c: str | None = None",
        'd = "x=y"',
        "e: list[float] = [1,",
        "  2]  # two",
    ]
    text = "\n".join([*lines, "f = True", 'g = {"k": [1]}'])
    found = declared(make(tmp_path, parameters=text))
    assert found["a"] == Parameter("a", "int", -3, "meaning; GPU: 2000")
    assert found["b"] == Parameter("b", "float", 1e-4)
    assert found["c"] == Parameter("c", "str | None", None)
    assert found["d"] == Parameter("d", "str", "x=y")
    assert found["e"] == Parameter("e", "list[float]", [1.0, 2.0], "two")
    assert [found["f"].annotation, found["g"].annotation] == ["bool", "dict"]


@pytest.mark.parametrize(
    "line",
    [
        "a = b * 2",
        "a: int = 2.5",
        "a = (1, 2)",
        "a: list = (1, 2)",
        "a = None",
        "a: int",
        "import os",
        "a = {1: 2}",
        "a: int = 1\na = 2",
        "_a = 1",
        "state = 1",
        "a: Path = 'x'",
        "a = 1e999",
        "!ls",
        "a = b = 1",
        "a: bool = 1",
    ],
)
def test_declared_refuses_what_is_not_a_typed_literal(tmp_path, line):
    with pytest.raises(ParameterError):
        declared(make(tmp_path, parameters=line))


def test_declared_refuses_what_is_not_a_notebook(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no notebook at .*x\.ipynb"):
        declared(tmp_path / "x.ipynb")
    (tmp_path / "x.ipynb").write_text("{")
    with pytest.raises(ParameterError, match="not a notebook"):
        declared(tmp_path / "x.ipynb")


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        ("int", "-5", -5),
        ("float", "1e-4", 1e-4),
        ("float", "3", 3.0),
        ("bool", "true", True),
        ("bool", "False", False),
        ("str", "12", "12"),
        ("str", '"q"', '"q"'),
        ("str", "a=b", "a=b"),
        ("str | None", "None", None),
        ("str | None", "none of them", "none of them"),
        ("int | None", "null", None),
        ("int | None", "4", 4),
        ("list", "[1, 'a']", [1, "a"]),
        ("list[int]", "[1, 2]", [1, 2]),
        ("dict[str, float]", '{"a": 1}', {"a": 1.0}),
        ("list[int]", "1,2", [1, 2]),
        ("list[str]", '["a"]', ["a"]),
    ],
)
def test_coerce(annotation, text, value):
    found = coerce(Parameter("p", annotation, None), text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        ("int", "2.0"),
        ("int", "1e3"),
        ("int", "True"),
        ("int", "abc"),
        ("float", "nan"),
        ("float", "NaN"),
        ("float", "Infinity"),
        ("float", "true"),
        ("bool", "1"),
        ("bool", "yes"),
        ("list[int]", "[1.5]"),
        ("dict", "[1]"),
        ("int | None", ""),
        ("list", "(1"),
        ("dict", "{1: 2}"),
    ],
)
def test_coerce_refuses_in_one_line(annotation, text):
    with pytest.raises(ParameterError) as caught:
        coerce(Parameter("p", annotation, None), text)
    assert str(caught.value) == f"parameter p: given {text!r}, expected {annotation}"


def test_check_converts_numpy_scalars_and_tuples_and_no_more():
    assert type(check(Parameter("p", "float", 0.0), np.float32(0.5))) is float
    assert type(check(Parameter("p", "int", 0), np.int64(3))) is int
    assert check(Parameter("p", "list[int]", []), (1, np.int64(2))) == [1, 2]
    for value in (Path("x"), {1}, np.zeros(2), object(), float("inf")):
        with pytest.raises(ParameterError):
            check(Parameter("p", "str | list | float", ""), value)


def test_fields_of_a_config_are_parameters():
    @dataclass(frozen=True, kw_only=True)
    class Config:
        model: str
        steps: int = 3
        views: int | None = None
        sizes: list[int] | None = None

    found = fields(Config)
    assert [p.annotation for p in found.values()] == [
        "str",
        "int",
        "int | None",
        "list[int] | None",
    ]
    assert complete(found, {"model": "x", "sizes": (1, 2)}) == {
        "model": "x",
        "steps": 3,
        "views": None,
        "sizes": [1, 2],
    }
    with pytest.raises(ParameterError, match="no value for model: give -p model VALUE"):
        complete(found, {"steps": 4})
