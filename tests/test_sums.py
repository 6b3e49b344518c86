"""The task sums: splits, grading by hand, files, and its place among the tasks."""

import json

import pytest

from rspo_lab.tasks import TASKS, sums, task

EXAMPLE = sums.Example("x", ((7, 8), (0, 5), (1, 1), (9, 9), (2, 3), (4, 4), (6, 0), (3, 8)))
RIGHT = "7+8=15;0+5=05;1+1=02;9+9=18;2+3=05;4+4=08;6+0=06;3+8=11;"


def test_prompt_canvas_and_solution():
    assert task("sums") is TASKS["sums"] is sums
    assert (
        sums.prompt(EXAMPLE, "compact")
        == "7+8=  ;0+5=  ;1+1=  ;9+9=  ;2+3=  ;4+4=  ;6+0=  ;3+8=  ;:"
    )
    assert "7+8,0+5," in sums.prompt(EXAMPLE, "d1") and "<answer>" in sums.prompt(EXAMPLE, "d1")
    assert (
        sums.solutions(EXAMPLE) == [RIGHT]
        and len(RIGHT) == len(sums.canvas(EXAMPLE)) == sums.COMPACT_LENGTH == 56
    )
    assert set(RIGHT + sums.prompt(EXAMPLE, "compact")) <= set(sums.COMPACT_CHARS)


@pytest.mark.parametrize(
    "completion, style, reward, failure",
    [
        (RIGHT, "compact", 1.0, None),
        (f"so <answer> {RIGHT} </answer>", "d1", 1.0, None),
        (RIGHT.replace("7+8=15", "7+8=16"), "compact", 7 / 8, "wrong_sums"),
        (RIGHT.replace("7+8=15", "8+7=15"), "compact", 7 / 8, "wrong_sums"),
        (RIGHT[:-7], "compact", 0.0, "wrong_length"),
        (RIGHT + "1", "compact", 0.0, "wrong_length"),
        ("", "compact", 0.0, "no_answer"),
        (RIGHT, "d1", 0.0, "no_answer"),
        ("?" * 56, "compact", 0.0, "wrong_sums"),
    ],
)
def test_grading_by_hand(completion, style, reward, failure):
    verdict = sums.verdict(completion, EXAMPLE, protocol="strict", style=style)
    assert (verdict.reward, verdict.failure) == (reward, failure)
    assert sums.reward(completion, EXAMPLE, style=style) == reward and verdict.components[
        "solved"
    ] == (failure is None)


def test_there_is_no_published_protocol():
    with pytest.raises(ValueError, match="unknown protocol of sums 'd1'"):
        sums.verdict(RIGHT, EXAMPLE, protocol="d1", style="compact")


def test_splits_are_disjoint_and_prefixes_agree():
    train, test = (sums.examples(split, 400, seed=3) for split in ("train", "test"))
    assert (
        not {sums.split_key(e) for e in train} & {sums.split_key(e) for e in test}
        and len({e.id for e in train}) == 400
    )
    assert sums.examples("train", 5, seed=3) == train[:5] != sums.examples("train", 5, seed=4)
    assert all(sums.reward(sums.solutions(e)[0], e) == 1 for e in train[:20])
    with pytest.raises(ValueError, match="unknown split"):
        sums.examples("dev", 1, seed=0)


def test_files(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"sums": "7+8,0+5,1+1,9+9,2+3,4+4,6+0,3+8"}) + "\n")
    assert sums.read(path)[0].pairs == EXAMPLE.pairs
    path.write_text(json.dumps({"sums": "7+8,0+5"}) + "\n")
    with pytest.raises(ValueError, match="sums.jsonl:1: sums '7.8,0.5'; write 8 of two digits"):
        sums.read(path)
