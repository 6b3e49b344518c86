"""The project's own files agree with each other."""

import ast
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
# fmt: off
# a file imports only from the levels before its own, or from files before it in its level
LEVELS = [
    {"batch", "keys", "files", "interrupts", "tracking", "masks", "advantages", "objectives", "diagnostics", "tasks", "style", "cost"},
    {"architectures", "tokenizer", "head", "held", "world"},
    {"parameters", "provenance", "estimators", "oracle", "rollout", "plots", "noise_plots", "explore_plots", "throughput_plots",
     "grading", "runs", "views"},
    {"model", "naive", "evaluation", "notebook"},
    {"config", "benchmark", "base_model", "checkpoints", "scores", "training"},
    {"score_noise", "gradient_noise", "gap", "throughput", "live", "explore", "explorer", "arms", "report", "study", "board", "jobs",
     "sweep", "cli"},
]
# fmt: on


def imports(path: Path) -> set[str]:
    """The rspo_lab modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "rspo_lab":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rspo_lab."):
            found.add(node.module.split(".")[1])
    return found


def test_files_import_from_lower_levels_only():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    files = {p.stem: p for p in (ROOT / "rspo_lab").glob("*.py") if p.stem != "__init__"}
    assert set(files) | {"tasks"} == set(level)
    for name, path in files.items():
        for other in imports(path):
            assert level[other] <= level[name], (
                f"{name} (level {level[name]}) imports {other} (level {level[other]})"
            )


def test_no_import_cycles():
    graph = {p.stem: imports(p) for p in (ROOT / "rspo_lab").glob("*.py")}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"cycle: {' -> '.join([*path, name])}"
        if name not in done and name in graph:
            path.append(name)
            for other in graph[name]:
                visit(other)
            path.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_no_file_is_longer_than_300_lines():
    long = {
        p.name: n
        for p in (ROOT / "rspo_lab").rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 300
    }
    assert not long


def test_conda_environment_and_pyproject_agree():
    """environment.yml names python, pip, the constraints and this package with an extra; the
    dependencies are pyproject's.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, pip, options = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    lowest = tuple(map(int, re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"]).groups()))
    assert tuple(map(int, re.fullmatch(r"python=(\d+)\.(\d+)", python).groups())) >= lowest
    assert pip == "pip" and options == {"pip": ["-c constraints.txt", "-e .[test]"]}
    assert "test" in project["optional-dependencies"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    wanted = {re.match(r"[\w-]+", d).group() for d in project["dependencies"]}
    assert set(pins) <= wanted


def test_readme_commands_are_makefile_targets():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", readme, re.M))
    assert {"study", "test"} <= targets and "make test" in (ROOT / ".ci/run").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target
