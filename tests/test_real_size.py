"""A tiny LLaDA in its published layout, with as many tokens as LLaDA has: a hundred steps of RSPO,
broken off, resumed, graded.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_real_models import LLADA, LLADA_NAMES, tensors_of
from throwaway import Folder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from rspo_lab.batch import Batch
from rspo_lab.cli import main
from rspo_lab.config import TrainConfig
from rspo_lab.decoding import prompts
from rspo_lab.masks.published import count
from rspo_lab.models.loading import load
from rspo_lab.random_streams import generator
from rspo_lab.sweeps.study import read_study
from rspo_lab.tasks import gsm8k, sudoku
from rspo_lab.training import starting_point, train

pytestmark = pytest.mark.heavy

STUDIES = Path(__file__).parent.parent / "notebooks/studies"
BENCHMARKS = Path(os.environ.get("RSPO_LAB_BENCHMARKS", ""))
SPECIAL = {  # LLaDA's ids
    126080: "<|startoftext|>",
    126081: "<|endoftext|>",
    126336: "<|mdm_mask|>",
    126346: "<|start_header_id|>",
    126347: "<|end_header_id|>",
    126348: "<|eot_id|>",
}
SIZE = 126464  # rows of LLaDA's embedding
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
NAMES = ["Ann", "Ben", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal"]


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    """The folder of a freshly initialised model with 126,349 tokens; most are only there."""
    folder = tmp_path_factory.mktemp("llada")
    text = (
        gsm8k.D1_PROMPT
        + 8 * sudoku.D1_PROMPT
        + " ".join(f"{name} has {n} apples. {n}" for name in NAMES for n in range(99))
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    learnt = json.loads(tokenizer.to_str())["model"]
    vocabulary = learnt["vocab"] | {
        f"token{i}": i for i in range(len(learnt["vocab"]), 126349) if i not in SPECIAL
    }
    tokenizer.model = models.BPE(
        vocabulary | {text: i for i, text in SPECIAL.items()},
        [tuple(pair) for pair in learnt["merges"]],
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in SPECIAL.values()]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    } | roles
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = LLADA | {
        "embedding_size": SIZE,
        "vocab_size": SIZE,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
        "mask_token_id": 126336,
    }
    config |= {"max_sequence_length": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(config, LLADA_NAMES), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def writer(llada, tmp_path_factory):
    """The same model after 40 steps of pretraining: it answers 7 or, oftener and greedily, 3."""
    model, length = load(llada, dtype=torch.float32), 10
    prompt, prompt_valid = model.encode(prompts(model, gsm8k, problems(NAMES), "d1"))
    rows = [model.encode([f"<answer>\n{n}\n</answer>"])[0][0].tolist() for n in (7, 3)]
    answers = torch.tensor(
        [row + [model.tokenizer.eos_token_id] * (length - len(row)) for row in rows]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for step in range(40):
        draw = generator(0, "pretrain", step)
        completion = answers[(torch.rand(len(NAMES), generator=draw) < 0.7).long()]
        batch = Batch(
            prompt, prompt_valid, completion, torch.ones_like(completion, dtype=torch.bool)
        )
        hidden = count(batch.valid, 1, generator=draw).hidden[0]
        optimizer.zero_grad()
        (-model(batch, hidden).sum() / hidden.sum()).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("writer")
    model.save(folder, original_names=True)
    return folder


def problems(names):
    return [
        gsm8k.Example(name, f"{name} has {i} apples. How many are that?", 7.0)
        for i, name in enumerate(names)
    ]


def words(given):
    return [word for name, value in given.items() for word in ("-p", name, str(value))]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_hundred_steps_on_gsm8k_rows_killed_resumed_and_graded(writer, tmp_path, capsys):
    """Of two answers that the model gives, one earns: RSPO makes it the answer to questions that it
    was not trained on.
    """
    for name, who in (("train", NAMES[:6]), ("test", NAMES[6:])):
        rows = [
            json.dumps({"question": e.question, "answer": "Count them.\n#### 7"}) + "\n"
            for e in problems(who)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    given = dict(
        model=writer,
        task="gsm8k",
        data=tmp_path / "train.jsonl",
        eval_data=tmp_path / "test.jsonl",
        style="d1",
        length=10,
    )
    given |= dict(
        block=5,
        decode_steps=4,
        eval_steps=4,
        eval_problems=2,
        prompts=1,
        group=4,
        steps=100,
        views=2,
        lam=0.03,
    )
    given |= dict(
        lora="all-linear",
        lr=3e-3,
        lora_rank=8,
        lora_alpha=16.0,
        warmup=0,
        eval_every=50,
        checkpoint_every=5,
        snapshots=1,
    )
    given |= dict(device="cpu", seed=1)
    run = tmp_path / "run"
    command = ["train", "--run", str(run), *words(given)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rspo_lab.cli", *command], stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 300
    while (
        process.poll() is None
        and time.monotonic() < until
        and not ((run / "checkpoint.pt").exists() and len(records(run)) > 8)
    ):
        time.sleep(0.05)
    assert process.poll() is None, process.returncode
    process.kill()
    process.wait()
    assert main(command) == 0
    found = records(run)
    assert [r["step"] for r in found] == list(range(101))
    assert found[0]["eval_solve_rate"] == 0 and found[-1]["eval_solve_rate"] == 1
    assert (
        sum(r["reward"] for r in found[1:11]) < 7.5 and sum(r["reward"] for r in found[-10:]) > 8.5
    )

    evaluate = [
        "eval",
        "--model",
        str(run / "snapshots/000100"),
        "--task",
        "gsm8k",
        "--data",
        str(tmp_path / "test.jsonl"),
    ]
    evaluate += [
        "--style",
        "d1",
        "--lengths",
        "10",
        "--block",
        "5",
        "--steps",
        "4",
        "--protocol",
        "strict",
    ]
    assert main([*evaluate, "--out", str(tmp_path / "eval")]) == 0
    capsys.readouterr()
    assert (
        main(["grade", str(tmp_path / "eval/completions_10.jsonl"), "--task", "gsm8k", "--json"])
        == 0
    )
    grade = json.loads(capsys.readouterr().out)
    assert (grade["correct"], grade["total"]) == (2, 2)


@pytest.mark.skipif(
    not BENCHMARKS.name, reason="RSPO_LAB_BENCHMARKS names no folder of benchmark files"
)
def test_a_hundred_steps_on_d1s_sudoku_that_earn_nothing_change_nothing(llada, tmp_path, capsys):
    """From random weights no grid is ever solved: no advantage, d = 0, so no update however noisy
    the scores; stopped, resumed, graded.
    """
    rows = (BENCHMARKS / "4x4_train_sudoku.csv").read_text().splitlines(keepends=True)[:1001]
    (tmp_path / "train.csv").write_text("".join(rows))
    given = dict(
        model=llada,
        task="sudoku",
        data=tmp_path / "train.csv",
        eval_data=BENCHMARKS / "4x4_test_sudoku.csv",
    )
    given |= dict(
        style="d1",
        length=8,
        block=8,
        decode_steps=2,
        eval_steps=2,
        eval_problems=2,
        prompts=1,
        group=2,
        steps=100,
        views=2,
    )
    given |= dict(
        lora="all-linear", lr=3e-3, eval_every=50, checkpoint_every=25, snapshots=1, device="cpu"
    )
    run = tmp_path / "run"
    stopped, seen = Folder(run), []
    train(
        TrainConfig(**{k: str(v) if isinstance(v, Path) else v for k, v in given.items()}),
        stopped,
        on_step=seen.append,
        should_stop=lambda: len(seen) > 40,
    )
    assert stopped.stopped and len(records(run)) == 41
    assert main(["train", "--run", str(run), *words(given)]) == 0
    found = records(run)
    assert [r["step"] for r in found] == list(range(101)) and found[-1]["eval_solve_rate"] == 0
    assert all(r["reward"] == r["d_mean"] == r["gradient_norm"] == 0 for r in found[1:])
    evaluate = [
        "eval",
        "--model",
        str(run / "snapshots/000100"),
        "--task",
        "sudoku",
        "--data",
        str(BENCHMARKS / "4x4_test_sudoku.csv"),
    ]
    assert (
        main(
            [
                *evaluate,
                "--problems",
                "3",
                "--lengths",
                "32",
                "--steps",
                "4",
                "--out",
                str(tmp_path / "eval"),
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert (
        main(
            [
                "grade",
                str(tmp_path / "eval/completions_32.jsonl"),
                "--task",
                "sudoku",
                "--protocol",
                "d1",
            ]
        )
        == 0
    )
    assert "blank cells" in capsys.readouterr().out


PUBLISHED = dict(
    lr=3e-6,
    lora_rank=128,
    lora_alpha=64.0,
    group=6,
    length=256,
    block=32,
    decode_steps=128,
    views=2,
    lam=0.01,
)
FILES = {
    "sudoku": ("4x4_train_sudoku.csv", "4x4_test_sudoku.csv"),
    "countdown": (None, "countdown_cd3_test.jsonl"),
    "gsm8k": ("gsm8k_train.jsonl", "gsm8k_test.jsonl"),
    "math": ("math_train.jsonl", "math500_test.jsonl"),
}


@pytest.mark.skipif(
    not BENCHMARKS.name, reason="RSPO_LAB_BENCHMARKS names no folder of benchmark files"
)
@pytest.mark.parametrize("name", FILES)
def test_presets_hold_the_published_settings_and_train(llada, name, tmp_path, capsys):
    """Read at the GPU scale, and two updates of `one_gpu` on this model with everything long made
    short.
    """
    file = STUDIES / f"llada8b_{name}.yaml"
    published, one_gpu = read_study(file, tmp_path, "gpu").points
    assert PUBLISHED.items() <= published.given.items() and published.given["inner_steps"] == (
        8 if name in ("sudoku", "countdown") else 12
    )
    assert {k for k in published.given if published.given[k] != one_gpu.given[k]} == {"prompts"}
    TrainConfig(**published.given)
    assert (
        main(["sweep", str(file), "--runs", str(tmp_path)]) == 2
        and "asks for GPUs" in capsys.readouterr().err
    )
    assert main(["sweep", str(file), "--runs", str(tmp_path), "--dry-run"]) == 0
    short = dict(
        model=llada,
        device="cpu",
        dtype="float32",
        length=8,
        block=4,
        decode_steps=4,
        eval_steps=4,
        eval_problems=2,
    )
    short |= dict(steps=1, inner_steps=2, group=2, lora_rank=4)
    short |= {
        field: BENCHMARKS / path for field, path in zip(("data", "eval_data"), FILES[name]) if path
    }
    if name == "math":  # four rows of this file have no answer, and are refused by their line
        lines = short["data"].read_text().splitlines(keepends=True)
        short["data"] = tmp_path / "train.jsonl"
        short["data"].write_text("".join(line for line in lines if json.loads(line)["answer"]))
    assert (
        main(
            [
                "train",
                "--study",
                str(file),
                "one_gpu",
                "--run",
                str(tmp_path / "run"),
                *words(short),
            ]
        )
        == 0
    )
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (
        config["lr"] == 3e-6
        and config["max_grad_norm"] == 0.2
        and config["prompts"] == 2
        and config["lora"] == "d1"
    )
    assert [r["step"] for r in records(tmp_path / "run")] == [0, 1]
    if name == "gsm8k":  # notebook 02 begins with this, also without the hub
        assert starting_point(TrainConfig(**config))["largest |d|, shared masks"] == 0


def test_a_run_of_a_study_that_is_not_there_is_named(tmp_path, capsys):
    file = STUDIES / "llada8b_math.yaml"
    assert main(["train", "--study", str(file), "ten_gpus", "--run", str(tmp_path / "run")]) == 2
    assert (
        "it trains one_gpu, published" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )
