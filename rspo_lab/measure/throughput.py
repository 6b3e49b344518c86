"""Sequences/s, TFLOP/s and peak memory of scoring, decoding and an update on this device, beside
the naive path in the same run.

Shapes: B sequences of S = P + L tokens, K views.  The sequences of a rate are masked sequences of S
tokens that the work takes
through the policy: B in scoring, K B in an update, B times the denoising steps in a rollout.  GiB
of 2^30 bytes, TFLOP of 10^12.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from rspo_lab.batch import Batch
from rspo_lab.estimators import elbo_draws
from rspo_lab.masks.base import Masks
from rspo_lab.masks.published import count
from rspo_lab.measure.cost import flop, timed
from rspo_lab.measure.naive import NaiveLM, naive_generate, one_graph
from rspo_lab.models.adapters import add_lora
from rspo_lab.models.diffusion_lm import DiffusionLM
from rspo_lab.models.loading import untrained
from rspo_lab.models.tokenizer import char_tokenizer
from rspo_lab.models.vocabulary_head import token_logp
from rspo_lab.objectives import Loss, rspo
from rspo_lab.policies import reference_of
from rspo_lab.random_streams import generator
from rspo_lab.sampler import generate
from rspo_lab.update import accumulate_gradient

MATMUL = {"cuda": 16384, "cpu": 1024}  # rows and columns of the product that measures the ceiling
CACHED = "rollout, dual cache"
GRADIENT = {"ours": accumulate_gradient, "naive": one_graph}


@dataclass(frozen=True)
class Work:
    """One thing to time, by path; `flop` counts the useful ones, the same number for both paths."""

    name: str
    sequences: int
    flop: int | float
    run: dict[str, Callable[[], object]]
    views: int = 1
    note: str = ""


def random_model(*, vocab: int, **shape) -> DiffusionLM:
    """An untrained model (`model.untrained`) of `vocab` ids, all but four of them text."""
    return untrained(char_tokenizer("".join(map(chr, range(2**16, 2**16 + vocab - 4)))), **shape)


def random_batch(
    model: DiffusionLM, sequences: int, prompt: int, completion: int, *, generator: torch.Generator
) -> Batch:
    """Rows of random text ids without padding.  No two are equal, so nothing is won by computing
    equal ones once.
    """
    text = (~model.banned).nonzero()[:, 0].cpu()
    ids = text[torch.randint(len(text), (sequences, prompt + completion), generator=generator)].to(
        model.device
    )
    real = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids[:, :prompt], real[:, :prompt], ids[:, prompt:], real[:, prompt:])


def exact_check(device: str, *, seed: int) -> dict[str, float]:
    """The largest difference of the naive path from ours, of a small float32 model with LoRA on
    this device.
    """
    draw = generator(seed, "check")
    ours = random_model(
        vocab=200, width=32, layers=2, heads=4, ffn=64, positions=12, device=device, seed=seed
    )
    add_lora(ours, "all-linear", rank=4, alpha=8.0, seed=seed)
    trained = [p for p in ours.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:  # adapters start as 0: the policy would be its reference
            p.add_(0.1 * torch.randn(p.shape, generator=draw).to(p))
    naive = NaiveLM(ours.hf, ours.tokenizer).to(ours.device)
    batch = random_batch(ours, 3, 4, 8, generator=draw)
    masks = count(batch.valid.cpu(), 4, generator=draw)
    draws, gradient = {}, {}
    for path, lm in (("ours", ours), ("naive", naive)):
        ours.zero_grad()
        _, draws[path] = GRADIENT[path](
            lm, batch, masks, _rspo_of(reference_of(lm), batch, masks, 2), 2
        )
        gradient[path] = torch.cat([p.grad.flatten() for p in trained])
    hidden = masks.hidden[0].to(ours.device)
    schedule = {"block": 4, "steps": 6, "temperature": 0.0}
    completion = _roll_out(ours, batch, draw, **schedule)
    theirs = naive_generate(
        naive, batch.prompt, length=8, generator=torch.Generator(ours.device), **schedule
    )
    return {
        "token log-probs, nats": (ours(batch, hidden) - naive(batch, hidden)).abs().max().item(),
        "draws, nats": (draws["ours"] - draws["naive"]).abs().max().item(),
        "gradient, relative": (
            (gradient["ours"] - gradient["naive"]).norm() / gradient["naive"].norm()
        ).item(),
        "greedy completions, tokens": (completion != theirs).sum().item(),
    }


def works(
    policy: DiffusionLM,
    batch: Batch,
    *,
    views: list[int],
    slice_size: int,
    block: int,
    decode_steps: int,
    seed: int,
) -> list[Work]:
    """All that `measure` times: the ceiling, scoring and its parts, a rollout, and an update at
    each number of views.

    Without LoRA each path has a frozen copy of its own as reference, so that peaks hold one more
    copy than training does.
    """
    (rows, length), prompt, device = batch.completion.shape, batch.prompt.shape[1], policy.device
    lm = {"ours": policy, "naive": NaiveLM(policy.hf, policy.tokenizer).to(device)}
    reference = {path: reference_of(model) for path, model in lm.items()}
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0, fused=True
    )
    masks = {
        k: count(batch.valid.cpu(), k, generator=generator(seed, k, "masks")) for k in (1, *views)
    }
    hidden, schedule = (
        masks[1].hidden[0].to(device),
        {"block": block, "steps": decode_steps, "temperature": 1.0},
    )
    weight = policy.hf.get_output_embeddings().weight
    states = torch.randn(
        rows, prompt + length, weight.shape[1], generator=generator(seed, "states")
    ).to(weight)
    square = torch.randn(
        MATMUL[device.type], MATMUL[device.type], generator=generator(seed, "matmul")
    ).to(weight)

    def score(denoiser, some, masks):
        with torch.no_grad():
            return elbo_draws(denoiser, some, masks, slice_size=slice_size)

    def body(some, hidden):  # the head has nothing to do where nothing is hidden
        return policy(some, hidden & False)

    def gradient(path, some, masks):
        GRADIENT[path](lm[path], some, masks, lambda draws: Loss(-draws.mean(), {}), slice_size)

    @torch.no_grad()
    def head(path):
        if path == "ours":
            return token_logp(
                states[:, prompt:][hidden], weight, batch.completion[hidden], policy.banned
            )
        logits = (
            torch.nn.functional.linear(states, weight)
            .float()
            .masked_fill_(policy.banned, -torch.inf)
        )
        return logits.log_softmax(-1)[:, prompt:].gather(-1, batch.completion[..., None])

    def roll_out(path):
        if path == "ours":
            return _roll_out(policy, batch, generator(seed, "rollout"), **schedule)
        return naive_generate(
            lm[path],
            batch.prompt,
            length=length,
            generator=torch.Generator(device).manual_seed(seed),
            **schedule,
        )

    def held_roll_out():
        return _roll_out(
            policy,
            batch,
            generator(seed, "rollout"),
            cached_logits=partial(policy.cached_logits, suffix=True),
            **schedule,
        )

    def update(path, masks):
        optimizer.zero_grad()
        GRADIENT[path](
            lm[path], batch, masks, _rspo_of(reference[path], batch, masks, slice_size), slice_size
        )
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0).item()
        optimizer.step()

    def both(run, *given):
        return {path: lambda path=path: run(path, *given) for path in lm}

    forward, forward_token = _flop_a_sequence(lambda *some: score(policy, *some), batch)
    bare, bare_token = _flop_a_sequence(lambda *some: score(reference["ours"], *some), batch)
    backward, backward_token = _flop_a_sequence(lambda *some: gradient("ours", *some), batch)
    optimizer.zero_grad()  # scoring and rollouts are measured without a gradient on hand
    tokens, a_step = hidden.sum().item(), rows * (forward + forward_token * block)
    found = [
        Work(
            "matmul",
            0,
            2 * len(square) ** 3,
            {"ours": lambda: square @ square},
            note=f"the ceiling: {len(square)} x {len(square)}",
        ),
        Work(
            "score",
            rows,
            rows * forward + tokens * forward_token,
            both(lambda path: score(lm[path], batch, masks[1])),
            note=f"{tokens / hidden.numel():.0%} of the completion tokens hidden",
        ),
        Work(
            "score, adapters off",
            rows,
            rows * bare + tokens * bare_token,
            both(lambda path: score(reference[path], batch, masks[1])),
        ),
        Work(
            "score, body alone",
            rows,
            rows * forward,
            {"ours": lambda: score(body, batch, masks[1])},
        ),
        Work(
            "score, head alone", rows, tokens * forward_token, both(head), note="of random states"
        ),
        Work(
            "rollout",
            rows * decode_steps,
            decode_steps * a_step,
            both(roll_out),
            note=f"{rows} completions, {decode_steps} steps each",
        ),
        Work(
            CACHED,
            rows * decode_steps,
            flop(held_roll_out),
            {"ours": held_roll_out},
            note="not the published sampler",
        ),
        Work(
            "score and gradient",
            rows,
            rows * backward + tokens * backward_token,
            both(gradient, batch, masks[1]),
        ),
    ]
    for k in views:
        passes = int(masks[k].hidden.any(-1).sum())
        tokens = int(masks[k].hidden.sum())
        useful = passes * (bare + backward) + tokens * (bare_token + backward_token)
        found.append(
            Work(
                "update",
                passes,
                useful,
                both(update, masks[k]),
                views=k,
                note="reference, gradient, clipping, AdamW",
            )
        )
    return found


def measure(
    policy: DiffusionLM, batch: Batch, *, repeats: int, on_work: Callable[[int, int], None], **given
) -> pd.DataFrame:
    """A row a work and path: the median of `repeats` calls after a warm-up, ours and naive by
    turns; `given` as `works` takes it.

    spread: slowest less fastest call, seconds.  peak_gib: the most that all tensors of the process
    took together.  A path that runs out of memory has no numbers, and says so in its note.
    """
    device, todo, found = policy.device, works(policy, batch, **given), []
    length, of = batch.prompt.shape[1] + batch.completion.shape[1], len(todo)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    while todo:
        work = todo.pop(0)  # whose tensors may go then
        for path, (seconds, peak) in timed(work.run, device, repeats).items():
            median = statistics.median(seconds or [float("nan")])
            row = {
                "work": work.name,
                "path": path,
                "views": work.views,
                "sequences": work.sequences,
                "tokens": work.sequences * length,
            }
            row |= {"seconds": median, "spread": max(seconds) - min(seconds) if seconds else median}
            row |= {
                "sequences_per_s": row["sequences"] / median,
                "tokens_per_s": row["tokens"] / median,
            }
            row |= {"tflops": work.flop / median / 1e12}
            row |= {
                "share_of_ceiling": row["tflops"] / (found[0] if found else row)["tflops"],
                "peak_gib": peak / 2**30,
            }
            row |= {
                "device": name,
                "dtype": str(policy.hf.dtype).removeprefix("torch."),
                "note": work.note if seconds else "out of memory",
            }
            found.append(row)
        on_work(of - len(todo), of)
    return pd.DataFrame(found)


def ratios(results: pd.DataFrame) -> pd.DataFrame:
    """Ours beside naive, a row a work and number of views; `times` is the ratio of their
    sequences/s.

    The rollout with a cache stands beside the naive rollout, which has none.
    """
    timed = results[results["sequences"] > 0]
    timed = pd.concat(
        [
            timed,
            timed[(timed["work"] == "rollout") & (timed["path"] == "naive")].assign(work=CACHED),
        ]
    )
    wide = timed.pivot(
        index=["work", "views"], columns="path", values=["sequences_per_s", "tflops", "peak_gib"]
    )
    wide = wide.loc[
        list(dict.fromkeys(zip(timed["work"], timed["views"])))
    ]  # in the order measured
    table = pd.DataFrame(
        {"times": wide["sequences_per_s", "ours"] / wide["sequences_per_s", "naive"]}
    )
    for column, unit in (
        ("sequences_per_s", "sequences/s"),
        ("tflops", "TFLOP/s"),
        ("peak_gib", "GiB"),
    ):
        table[[f"ours, {unit}", f"naive, {unit}"]] = wide[column][["ours", "naive"]]
    return table


def scoring_shares(results: pd.DataFrame) -> pd.Series:
    """Where the time of scoring goes: body and heads as shares of the naive path's, and the ratio
    that a head of no cost would reach.
    """
    seconds = results.set_index(["work", "path"])["seconds"]
    naive, body = seconds["score", "naive"], seconds["score, body alone", "ours"]
    heads = {
        f"{path} head": seconds["score, head alone", path] / naive for path in ("naive", "ours")
    }
    return pd.Series({"body": body / naive} | heads | {"most that a head can win": naive / body})


def _flop_a_sequence(run: Callable[[Batch, Masks], object], batch: Batch) -> tuple[int, int]:
    """The FLOP of one masked sequence and of each of its hidden tokens, counted with 1 and 2 of
    them, when nothing is done twice.
    """
    one, place = batch.rows(slice(0, 1)), torch.arange(batch.completion.shape[1])
    some = [
        Masks(
            (place < n)[None, None],
            torch.ones(1, 1, dtype=torch.float64),
            torch.zeros(1, dtype=torch.long),
        )
        for n in (1, 2)
    ]
    first, second = (flop(lambda masks=masks: run(one, masks)) for masks in some)
    return 2 * first - second, second - first


def _rspo_of(reference, batch: Batch, masks: Masks, slice_size: int) -> Callable[[Tensor], Loss]:
    """The RSPO loss of a policy's draws, advantages evenly from -1 to 1; this is where the
    reference is scored.
    """
    with torch.no_grad():
        baseline = elbo_draws(reference, batch, masks, slice_size=slice_size)
    return lambda draws: rspo(
        draws - baseline, torch.linspace(-1, 1, len(batch)).to(draws), lam=0.1
    )


def _roll_out(model: DiffusionLM, batch: Batch, draw: torch.Generator, **schedule) -> Tensor:
    canvas = torch.full_like(batch.completion, model.mask_id)
    found = generate(
        model.logits,
        batch.prompt,
        batch.prompt_valid,
        canvas=canvas,
        mask_id=model.mask_id,
        generator=draw,
        **schedule,
    )
    return found.completion
