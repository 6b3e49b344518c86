"""Parameters of a notebook or a config: what is declared, and whether a given value fits.

A parameter is `name: type = literal  # meaning`.  Values are None, bool, int, float, str, list or
dict (JSON), nothing else: these cross from a command line through Papermill into a kernel and come
out as they went in.
"""

import ast
import dataclasses
import difflib
import io
import json
import math
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict}
_RESERVED = {"In", "Out", "exit", "quit", "open", "get_ipython"} | {
    "name",
    "key",
    "state",
    "progress",
    "error",
    "path",
}


class ParameterError(ValueError):
    """A parameter is unknown, missing, of the wrong type or wrongly declared; the message is one
    line.
    """


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One declared parameter; `annotation` is source text, such as `int` or `list[float] | None`."""

    name: str
    annotation: str
    default: Any
    comment: str = ""

    @property
    def required(self) -> bool:
        """Whether a value must be given (only configs have such parameters)."""
        return self.default is dataclasses.MISSING


def declared(notebook: Path | str) -> dict[str, Parameter]:
    """The parameters a notebook declares, in order: the literal assignments of its cell tagged
    `parameters`.
    """
    notebook = Path(notebook)
    if not notebook.is_file():
        raise FileNotFoundError(f"no notebook at {notebook}")
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [
            cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", ())
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ParameterError(
            f"{notebook} is not a notebook: {type(error).__name__}: {error}"
        ) from error
    if len(tagged) > 1:
        raise ParameterError(
            f"{notebook.name} has {len(tagged)} cells tagged 'parameters'; keep one"
        )
    found: dict[str, Parameter] = {}
    for parameter in _parse("".join(tagged[0]) if tagged else "", notebook.name):
        if parameter.name in found:
            raise ParameterError(f"{notebook.name} declares {parameter.name} twice")
        found[parameter.name] = parameter
    return found


def coerce(parameter: Parameter, text: str) -> Any:
    """The value a command-line text stands for: a JSON or Python literal that fits, else the raw
    text if a str fits.
    """
    for value in [*_literals(text), text]:
        try:
            return check(parameter, value)
        except ParameterError:
            continue
    raise ParameterError(
        f"parameter {parameter.name}: given {text!r}, expected {parameter.annotation}"
    )


def check(parameter: Parameter, value: Any) -> Any:
    """`value` as plain data in the declared type (an int given for a float becomes one), else
    ParameterError.
    """
    try:
        return _fit(_annotation(parameter.annotation), _plain(value))
    except (TypeError, ValueError, OverflowError) as error:
        raise ParameterError(
            f"parameter {parameter.name}: given {value!r}, expected {parameter.annotation}"
        ) from error


def fields(config: type) -> dict[str, Parameter]:
    """The fields of a config dataclass as parameters; one without a default has MISSING."""
    found = dataclasses.fields(config)
    return {
        f.name: Parameter(
            f.name, f.type.__name__ if isinstance(f.type, type) else str(f.type), f.default
        )
        for f in found
    }


def complete(parameters: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """All declared values, in order: the given ones checked, the defaults for the rest."""
    for name in given:
        if name not in parameters:
            raise unknown(name, parameters)
    if missing := [p.name for p in parameters.values() if p.required and p.name not in given]:
        raise ParameterError(f"no value for {', '.join(missing)}: give -p {missing[0]} VALUE")
    return {name: check(p, given.get(name, p.default)) for name, p in parameters.items()}


def unknown(name: str, names: Iterable[str]) -> ParameterError:
    """The error for an undeclared name: what was probably meant, and everything that is declared."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ParameterError(
        f"unknown parameter {name!r}: {hint}declared: {', '.join(names) or 'none'}"
    )


def _parse(source: str, where: str) -> Iterable[Parameter]:
    """One Parameter for each line of a parameters cell; anything but a literal assignment is
    refused.
    """
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"{where}: the parameters cell is not Python: {error}") from error
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for statement in body:
        match statement:
            case ast.AnnAssign(
                target=ast.Name(id=name), annotation=node, value=ast.expr() as value
            ):
                annotation = ast.unparse(node)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                annotation = ""
            case _:
                raise ParameterError(
                    f"{where}: write `name: type = literal`, not `{ast.unparse(statement)}`"
                )
        if name in _RESERVED or name.startswith("_"):
            raise ParameterError(f"{where}: {name} is reserved, rename the parameter")
        try:
            default = ast.literal_eval(value)
            annotation = annotation or {kind: text for text, kind in _TYPES.items()}[type(default)]
            if _plain(default) != default:
                raise TypeError("a tuple would come back as a list")
            default = _fit(_annotation(annotation), default)
        except (KeyError, TypeError, ValueError) as error:
            expected = annotation or "a typed literal (bool, int, float, str, list, dict)"
            raise ParameterError(
                f"{where}: {name} = {ast.unparse(value)} is not {expected}"
            ) from error
        yield Parameter(name, annotation, default, comments.get(statement.end_lineno or 0, ""))


def _literals(text: str) -> Iterable[Any]:
    """What a text means as JSON, then as Python; a quoted string is left to be taken raw."""
    for load in (json.loads, ast.literal_eval):
        try:
            value = load(text)
        except (ValueError, SyntaxError, TypeError, RecursionError):
            continue
        if not isinstance(value, str):
            yield value


def _plain(value: Any) -> Any:
    """JSON data equal to `value`: numpy scalars and tuples converted, any other kind a TypeError."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if type(value) in (list, tuple):
        return [_plain(item) for item in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) is float and not math.isfinite(value):
        raise ValueError("not finite")
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{type(value).__name__} does not cross")


def _annotation(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _fit(node: ast.expr, value: Any) -> Any:
    """`value` in the annotated type, else TypeError; annotations are the types above, `list[T]`,
    `dict[str, T]`, `T | T`.
    """
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            try:
                return _fit(left, value)
            except TypeError:
                return _fit(right, value)
        case ast.Constant(value=None) if value is None:
            return value
        case ast.Name(id="float") if type(value) is int:
            return float(value)
        case ast.Name(id=name) if name in _TYPES and type(value) is _TYPES[name]:
            return value
        case ast.Subscript(value=ast.Name(id="list"), slice=item) if type(value) is list:
            return [_fit(item, entry) for entry in value]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, item])) if (
            type(value) is dict
        ):
            return {key: _fit(item, entry) for key, entry in value.items()}
    raise TypeError(f"not {ast.unparse(node)}")
