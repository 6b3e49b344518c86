"""The suite itself: in continuous integration a skip is a failure; long files begin first."""

from pathlib import Path

import pytest
from conftest import LONG


@pytest.mark.parametrize(
    "given, reason, outcome",
    [
        ("true", "no Chromium on the PATH", "failed"),
        ("true", "reasoning-gym is not installed", "failed"),
        ("true", "no unprivileged mounts here, so no small disk to fill", "skipped"),
        ("", "no Chromium on the PATH", "skipped"),
    ],
)
def test_a_skip_fails_in_continuous_integration(monkeypatch, request, given, reason, outcome):
    """As pytest itself reports a test that skips."""
    monkeypatch.setenv("CI", given)
    call = pytest.CallInfo.from_call(lambda: pytest.skip(reason), when="setup")
    report = request.node.ihook.pytest_runtest_makereport(item=request.node, call=call)
    assert report.outcome == outcome and reason in str(report.longrepr)


def test_long_files_are_there():
    """A renamed file would begin last."""
    assert set(LONG) <= {path.stem for path in Path(__file__).parent.glob("test_*.py")}
