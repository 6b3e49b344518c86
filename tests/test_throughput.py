"""The benchmark: FLOP and memory counted by hand, both paths equal, memory that does not grow with
the views, a path without memory.
"""

import pytest
import torch

from rspo_lab.batch import Batch
from rspo_lab.figures.throughput import throughput_figure
from rspo_lab.masks.published import count
from rspo_lab.measure import naive, throughput
from rspo_lab.measure.cost import LiveTensors, flop, peak_bytes
from rspo_lab.measure.naive import NaiveLM, naive_generate
from rspo_lab.models.adapters import add_lora
from rspo_lab.random_streams import generator

WIDTH, FFN, VOCAB, RANK, PROMPT, COMPLETION = 32, 48, 3000, 4, 5, 12
SHAPE = {
    "width": WIDTH,
    "ffn": FFN,
    "vocab": VOCAB,
    "heads": 2,
    "layers": 1,
    "positions": PROMPT + COMPLETION,
    "seed": 0,
}
GIVEN = {"views": [2, 8], "slice_size": 3, "block": 4, "decode_steps": 6, "seed": 0}


def small(*, lora=True, **changes):
    """(model, batch of 3) of one layer."""
    model = throughput.random_model(**SHAPE | changes)
    if lora:
        add_lora(model, "all-linear", rank=RANK, alpha=8.0, seed=0)
    return model, throughput.random_batch(
        model, 3, PROMPT, COMPLETION, generator=generator(0, "batch")
    )


def named(model, batch, **changes):
    return {
        (work.name, work.views): work for work in throughput.works(model, batch, **GIVEN | changes)
    }


@pytest.mark.parametrize("lora", [False, True])
def test_flop_equal_a_count_by_hand(lora):
    """One layer: 4 square matrices, 3 of the gated layer, attention, the head on hidden tokens;
    backward by what has a gradient.
    """
    model, batch = small(lora=lora)
    found, hidden = (
        named(model, batch),
        count(batch.valid, 1, generator=generator(0, 1, "masks")).hidden.sum().item(),
    )
    tokens, length = 3 * (PROMPT + COMPLETION), PROMPT + COMPLETION
    square, gated, head = (
        2 * tokens * WIDTH**2,
        2 * tokens * WIDTH * FFN,
        2 * hidden * WIDTH * VOCAB,
    )
    attention = (
        4 * tokens * length * WIDTH
    )  # torch counts 5 products backward, that of the recomputed scores too
    down, up = (
        2 * tokens * RANK * (6 * WIDTH + FFN),
        2 * tokens * RANK * (5 * WIDTH + 2 * FFN),
    )  # into and out of the adapters
    base = 4 * square + 3 * gated + attention + head
    adapters = down + up if lora else 0
    assert (
        found["score", 1].flop == base + adapters and found["score, adapters off", 1].flop == base
    )
    assert (
        found["score, body alone", 1].flop + found["score, head alone", 1].flop == base + adapters
    )
    if lora:  # embeddings are frozen, so no gradient goes through q, k and v of the first layer
        backward = (
            square
            + 3 * gated
            + 2.5 * attention
            + head
            + 2 * up
            + 2 * down
            - 3 * 2 * tokens * RANK * WIDTH
        )
    else:
        backward = 8 * square + 6 * gated + 2.5 * attention + 2 * head
    assert found["score and gradient", 1].flop == base + adapters + backward


def test_useful_flop_are_those_of_a_call_that_does_nothing_twice():
    """In one slice ours does no more than is counted as useful; in several it also has a pass
    without gradient.
    """
    model, batch = small(lora=False)
    for slice_size, passes in ((24, 0), (3, 1)):
        work = named(model, batch, slice_size=slice_size)["update", 8]
        masks = count(batch.valid, 8, generator=generator(0, 8, "masks"))
        forward = (
            masks.hidden.sum().item() * 2 * WIDTH * VOCAB
            + 24 * named(model, batch)["score, body alone", 1].flop // 3
        )
        assert flop(work.run["ours"]) == work.flop + passes * forward
    assert flop(work.run["naive"]) > work.flop


def test_live_tensors_are_counted_until_they_die():
    before = torch.zeros(1000)
    with LiveTensors() as live:
        start = live.now
        first = before + 1
        second = first * 2
        part = second[3:]
        del first, second
        assert live.now - start == 4000 and live.peak - start == 8000
        del part
        assert live.now == start >= 4000 and live.peak - start == 8000


def test_live_tensors_count_what_a_graph_keeps():
    x = torch.zeros(1000, requires_grad=True)
    with LiveTensors() as live:
        start = live.now
        y = x.exp().sum()  # exp keeps its result for the gradient
        assert live.now - start == 4004
        y.backward()
        del y
        assert live.now - start == 4000  # the gradient


def test_both_paths_compute_the_same():
    found = throughput.exact_check("cpu", seed=0)
    assert (
        len(found) == 4 and max(found.values()) < 1e-5 and found["greedy completions, tokens"] == 0
    )


def test_the_check_would_see_a_difference(monkeypatch):
    plain = NaiveLM.all_logits
    monkeypatch.setattr(NaiveLM, "all_logits", lambda self, ids: 1.1 * plain(self, ids))
    found = throughput.exact_check("cpu", seed=0)
    assert (
        min(found[name] for name in ("token log-probs, nats", "draws, nats", "gradient, relative"))
        > 1e-4
    )


def test_naive_sampler_writes_text_and_repeats_itself():
    model, batch = small(lora=False)
    lm = NaiveLM(model.hf, model.tokenizer)
    schedule = {"length": COMPLETION, "block": 4, "steps": 6, "temperature": 1.0}
    one, two, other = (
        naive_generate(lm, batch.prompt, generator=torch.Generator().manual_seed(n), **schedule)
        for n in (0, 0, 1)
    )
    assert one.shape == (3, COMPLETION) and not model.banned[one].any()
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_peak_memory_of_an_update_does_not_grow_with_the_views_and_that_of_the_naive_one_does():
    model, batch = small()
    found = named(model, batch)
    with LiveTensors() as resident:
        pass
    peak = {
        (path, k): peak_bytes(found["update", k].run[path], model.device)
        for k in (2, 8)
        for path in ("ours", "naive")
    }
    assert peak["ours", 8] < 1.1 * peak["ours", 2]
    grown = (peak["naive", 8] - resident.now) / (peak["naive", 2] - resident.now)
    assert 2.5 < grown < 4.5
    logits = 4 * 8 * 3 * (PROMPT + COMPLETION) * VOCAB
    assert peak["naive", 8] - resident.now > logits > peak["ours", 8] - resident.now


@pytest.mark.slow
def test_rows_agree_and_a_path_without_memory_says_so(monkeypatch):
    monkeypatch.setattr(
        naive, "_memory", lambda: 4 * 3 * 8 * (PROMPT + COMPLETION) * VOCAB - 1
    )  # enough for 2 views
    monkeypatch.setitem(throughput.MATMUL, "cpu", 64)
    model, batch = small()
    told = []
    rows = throughput.measure(
        model, batch, repeats=1, on_work=lambda done, of: told.append((done, of)), **GIVEN
    )
    assert told == [(n, 10) for n in range(1, 11)]
    full = rows[rows["note"] != "out of memory"]
    assert len(rows) - len(full) == 1 and not full.isna().any(axis=None)
    without = rows[rows["note"] == "out of memory"].iloc[0]
    assert (
        tuple(without[["work", "path", "views"]]) == ("update", "naive", 8)
        and without[["seconds", "tflops", "peak_gib"]].isna().all()
    )
    assert (full["share_of_ceiling"] * full["tflops"].iloc[0]).tolist() == pytest.approx(
        full["tflops"].tolist()
    )
    assert (full["tokens_per_s"]).tolist() == pytest.approx(
        (full["sequences_per_s"] * (PROMPT + COMPLETION)).tolist()
    )
    useful = (full["tflops"] * full["seconds"]).groupby([full["work"], full["views"]])
    assert (useful.max() / useful.min()).tolist() == pytest.approx([1] * len(useful))
    table = throughput.ratios(rows)
    assert table.index[0] == ("score", 1) and table.index[-1] == ("update", 8)
    assert table["times"].isna().sum() == 2  # the body has no naive path
    shares = throughput.scoring_shares(rows)
    assert shares["body"] * shares["most that a head can win"] == pytest.approx(1)
    texts = [text.get_text() for axis in throughput_figure(rows).axes for text in axis.texts]
    assert "naive: out of memory" in texts and "naive: out of memory at K = 8" in texts


def test_rows_of_a_batch_differ_and_are_text():
    model, batch = small(lora=False)
    assert (
        isinstance(batch, Batch)
        and len(batch.distinct()[0]) == 3
        and batch.valid.all()
        and batch.prompt_valid.all()
    )
    assert (
        not model.banned[torch.cat([batch.prompt, batch.completion], 1)].any()
        and len(model.banned) == VOCAB
    )


def test_bfloat16_is_made_in_bfloat16_and_scores():
    model, batch = small(dtype=torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "lora" not in n} == {torch.bfloat16}
    assert model.hf.get_base_model().model.rotary_emb.inv_freq.dtype == torch.float32
    logp = model(batch, batch.valid)
    plain = NaiveLM(model.hf, model.tokenizer)(batch, batch.valid)
    assert torch.isfinite(logp).all() and torch.allclose(logp, plain, atol=0.05)
