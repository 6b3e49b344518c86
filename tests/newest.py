"""A look ahead, by hand: the quick tests on the newest of everything that pyproject.toml allows, in
a throw-away environment, and how that differs from constraints.txt.  `make test-newest`

What pyproject.toml holds (`constraint-dependencies`: torch) stays.  The exit code is the tests'.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"([\w.-]+)==([^\s;]+)")


def canonical(name: str) -> str:
    """The name as indexes compare it: case, "-", "_" and "." make no difference."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(path: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """The version of each package in a lock, by canonical name; ValueError for a second one."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    pins = [PIN.match(line) for line in lines]
    if unread := [line for line, pin in zip(lines, pins) if pin is None]:
        raise ValueError(f"{path}: not a pin: {unread[0]!r}")
    versions = {canonical(pin[1]): pin[2] for pin in pins}
    if len(versions) < len(pins):
        raise ValueError(f"{path} names a package twice")
    return versions


def difference(lock: Mapping[str, str], installed: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(package, locked, installed) of each installed package of another version, "-" if not locked.

    What follows a "+" (the build: torch 2.13.0+cpu) makes no difference.
    """
    return [
        (name, lock.get(name, "-"), version)
        for name, version in sorted(installed.items())
        if version.split("+")[0] != lock.get(name)
    ]


def installed(python: Path) -> dict[str, str]:
    """The version of each package in an environment but this one, by canonical name."""
    command = [python, "-m", "pip", "list", "--format=json", "--exclude=rspo-lab"]
    listed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return {canonical(row["name"]): row["version"] for row in json.loads(listed)}


def main() -> int:
    holds = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin/python"
        (Path(folder) / "holds.txt").write_text("\n".join(holds["constraint-dependencies"]))
        install = [python, "-m", "pip", "install", "--quiet", "--upgrade"]
        subprocess.run([*install, "pip", "setuptools"], check=True)
        everything = f"{ROOT}[test,reasoning-gym]"
        command = [*install, "-c", f"{folder}/holds.txt", "-e", everything]
        subprocess.run(command, check=True)
        lane = ["-m", "not slow and not heavy", "--deselect", "tests/test_project.py::test_lock"]
        tests = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "4", *lane],
            cwd=ROOT,
            env=os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"},
        )
        rows = [("package", "locked", "newest"), *difference(locked(), installed(python))]
    for row in rows:
        print("{:32} {:>16} {:>16}".format(*row))
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
