"""Annotations are checked in tests only; lanes of the suite; a small exact model to check against.

Lanes: `-m "not slow and not heavy"` is for before a commit (90 s on two cores), `-m "not heavy"` is
`make test`, and continuous integration runs all.  A test is `slow` that starts a kernel, starts a
process that imports torch, or takes several seconds; `heavy` are a browser, several processes of
one run, real sizes, and long studies.
"""

import os
from pathlib import Path

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of kernels and processes that tests start, too
if not os.environ.get("RSPO_LAB_BENCHMARKS"):  # tests ask whether it is set
    os.environ.pop("RSPO_LAB_BENCHMARKS", None)

LIBRARY = Path(__file__).parent.parent / "rspo_lab"
NO_HOOK = {
    "architectures"
}  # jaxtyping would wrap the inherited dataclass initialiser of transformers' configs
MODULES = [
    path.relative_to(LIBRARY.parent).with_suffix("")
    for path in LIBRARY.rglob("*.py")
    if path.stem not in NO_HOOK | {"__init__"}
]
install_import_hook([".".join(module.parts) for module in MODULES], "beartype.beartype")

import types  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from rspo_lab.batch import Batch  # noqa: E402
from rspo_lab.plugins import TABLES  # noqa: E402

torch.set_num_threads(1)


def table_denoiser(tokens: int, vocabulary: int, seed: int) -> torch.nn.Module:
    """A float64 denoiser with independent random conditionals for every visible context: as
    inconsistent as can be.

    Positions 0..tokens-1, ids 0..vocabulary-1; the context is the completion with `vocabulary` at
    hidden positions.
    """

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            shape = ((vocabulary + 1) ** tokens, tokens, vocabulary)
            self.logits = torch.nn.Parameter(
                torch.randn(shape, generator=generator, dtype=torch.float64)
            )

        def forward(self, batch, hidden):
            logp = self.conditionals(batch, hidden)
            return logp.gather(-1, batch.completion[..., None])[..., 0]

        def conditionals(self, batch, hidden):
            """All ids' log-probs at the hidden positions, 0 elsewhere."""
            logits = self.of_context(batch.completion.masked_fill(hidden, vocabulary))
            return logits.log_softmax(-1).where(hidden[..., None], 0.0)

        def of_context(self, context):
            power = (vocabulary + 1) ** torch.arange(tokens)
            return self.logits[(context * power).sum(1)]

    return Table()


def completions(rows: list[list[int]], valid: list[list[bool]] | None = None) -> Batch:
    """A batch of given completions behind a one-token prompt."""
    completion = torch.tensor(rows)
    valid = torch.ones_like(completion, dtype=torch.bool) if valid is None else torch.tensor(valid)
    prompt = torch.zeros(len(rows), 1, dtype=torch.long)
    return Batch(prompt, prompt == 0, completion, valid)


@pytest.fixture(scope="module", autouse=True)
def tables_of_plugins():
    """What a file of tests loads from plugins is gone after it."""
    before = {table: dict(entries) for table, entries in TABLES.items()}
    yield
    for table, entries in TABLES.items():
        entries.clear()
        entries.update(before[table])


@pytest.fixture
def small():
    """4 tokens of 3 ids: a table policy, a table reference, and three completions, one of them
    shorter.
    """
    batch = completions(
        [[0, 1, 2, 0], [2, 2, 1, 0], [1, 0, 2, 2]],
        [[True] * 4, [True] * 4, [True, True, True, False]],
    )
    return types.SimpleNamespace(
        policy=table_denoiser(4, 3, 0), reference=table_denoiser(4, 3, 1), batch=batch
    )


# What a test may lack even in continuous integration, by words of its reason: files that are not
# ours to give, a right of the machine, a later torch.
MAY_BE_MISSING = ("RSPO_LAB_BENCHMARKS", "no unprivileged mounts", "this torch has no")


def no_silent_skip(report):
    """In continuous integration (CI=true) a skip is a failure: else a missing browser or compiler
    would shrink what is tested, and nobody would see it.
    """
    if os.environ.get("CI") == "true" and report.skipped:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not any(word in reason for word in MAY_BE_MISSING):
            report.outcome = "failed"
            report.longrepr = f"nothing is skipped where CI=true: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return no_silent_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return no_silent_skip((yield))


LONG = (  # by processor time, all lanes
    "test_notebooks",
    "test_storage",
    "test_distributed",
    "test_study",
    "test_browser",
    "test_real_size",
    "test_training",
    "test_sweep",
    "test_gym",
    "test_measurement",
)


def pytest_collection_modifyitems(items):
    """Long files begin first, so that no core waits for another's last one."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
