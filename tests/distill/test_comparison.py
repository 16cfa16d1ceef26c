"""Does `esr-distill eval` write what it measured, and compare only what can be?  pytest tests/distill/test_comparison.py"""

import json
import math
import statistics

import pytest
from tiny_models import make_model, make_tokenizer

from esr_distill.command_line import main
from esr_distill.evaluation.comparison import problems_digest
from esr_distill.prompts import PromptRecord

SAMPLING = {"samples_per_problem": 3, "sampling_temperature": 1.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random models, and sums whose "answers" are digits that such models write often."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (4, 5):
        make_model(seed).save_pretrained(folder / f"model{seed}")
        make_tokenizer().save_pretrained(folder / f"model{seed}")
    lines = [{"prompt": f"{i}+{i + 1}=", "answer": str(i % 5)} for i in range(10)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluate(models, output, *, model="model4", prompts="problems.jsonl", **options) -> int:
    options = {
        "model": models / model,
        "prompts": models / prompts,
        "chat_template": "false",
        "device": "cpu",
        "max_tokens": 10,
        "output": output,
    } | options
    return main(["eval", *(word for name, value in options.items() for word in (f"--{name}", str(value)))])


@pytest.fixture(scope="module")
def other(models, tmp_path_factory):
    """The result of one model at 3 samples a problem."""
    path = tmp_path_factory.mktemp("other") / "other.json"
    assert evaluate(models, path, model="model5", **SAMPLING) == 0
    return path


def test_the_result_has_what_is_needed_to_draw_it_again(models, tmp_path):
    for name, batch_size in (("a", 4), ("b", 30)):
        arguments = SAMPLING | {"save_replies": "true", "seed": 3, "top_p": 0.9, "batch_size": batch_size}
        assert evaluate(models, tmp_path / f"{name}.json", **arguments) == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    for result in (first, second):
        del result["rollout_seconds"], result["options"]["output"], result["options"]["batch_size"]
    assert first == second
    assert first["options"]["seed"] == 3 and first["options"]["top_p"] == 0.9
    assert first["machine"]["versions"]["torch"] and first["count"] == 10 and first["samples_per_problem"] == 3
    assert first["math_verify"] is None and "difference" not in first
    row = first["problems"][7]
    assert (row["prompt"], row["answer"]) == ("7+8=", "2")
    assert len(row["replies"]) == len(row["correct"]) == len(row["answers"]) == 3
    correct = [sum(row["correct"]) / 3 for row in first["problems"]]
    assert first["accuracy"] == pytest.approx(statistics.mean(correct)) and 0 < first["accuracy"] < 1
    assert first["standard_error"] == pytest.approx(statistics.stdev(correct) / math.sqrt(10))


def test_replies_are_left_out_unless_asked_for(other):
    row = json.loads(other.read_text())["problems"][7]
    assert not {"prompt", "answer", "replies"} & row.keys() and "7+8=" not in other.read_text()


def test_the_difference_from_another_result(models, other, tmp_path, capsys):
    assert evaluate(models, tmp_path / "this.json", compare=other, **SAMPLING | {"max_tokens": 9}) == 0
    this, there = json.loads((tmp_path / "this.json").read_text()), json.loads(other.read_text())
    difference = this["difference"]
    assert (difference["minus"], difference["other_model"]) == (str(other), there["model"])
    assert difference["options_that_differ"] == {"max_tokens": [9, 10]}
    pairs = zip(this["problems"], there["problems"], strict=True)
    by_hand = [(sum(a["correct"]) - sum(b["correct"])) / 3 for a, b in pairs]
    found = difference["estimates"]["accuracy"]
    assert found["difference"] == pytest.approx(statistics.mean(by_hand))
    assert found["difference"] == pytest.approx(this["accuracy"] - there["accuracy"])
    assert found["standard_error"] == pytest.approx(statistics.stdev(by_hand) / math.sqrt(10))
    assert found["count"] == 10 and {"majority", "pass@3", "finished", "mean_length"} <= difference["estimates"].keys()
    output = capsys.readouterr().out
    assert "this model minus" in output and "max_tokens is 9 here and 10 there" in output


def test_a_model_does_not_differ_from_itself(models, other, tmp_path):
    assert evaluate(models, tmp_path / "again.json", model="model5", compare=other, **SAMPLING) == 0
    difference = json.loads((tmp_path / "again.json").read_text())["difference"]
    assert difference["options_that_differ"] == {}
    for name, found in difference["estimates"].items():
        assert (found["difference"], found["standard_error"]) == (0.0, 0.0), name


def test_votes_are_compared_only_among_equal_numbers_of_samples(models, other, tmp_path):
    assert evaluate(models, tmp_path / "greedy.json", compare=other) == 0
    difference = json.loads((tmp_path / "greedy.json").read_text())["difference"]
    assert {"accuracy", "pass@1", "finished"} <= difference["estimates"].keys()
    assert not {"majority", "pass@2"} & difference["estimates"].keys()
    assert difference["options_that_differ"] == {"samples_per_problem": [1, 3], "sampling_temperature": [0.0, 1.0]}


def test_other_problems_are_refused(models, other, tmp_path, capsys):
    assert evaluate(models, tmp_path / "out.json", compare=other, limit=9) == 2
    error = capsys.readouterr().err
    assert "compare must be a result on the same problems (prompts, answers, order and limit), got" in error
    assert "which has 10 with digest" in error and not (tmp_path / "out.json").exists()


def test_another_scorer_is_refused(models, other, tmp_path, capsys):
    assert evaluate(models, tmp_path / "out.json", compare=other, scorer="boxed_exact") == 2
    assert "compare must be a result of scorer boxed_exact, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        None,
        "no json",
        "[]",
        "{}",
        '{"problems_digest": "0", "options": {}, "model": "m", "problems": []}',
        '{"problems_digest": "0", "options": {"scorer": "s"}, "model": "m", "problems": [{"correct": [true]}]}',
    ],
)
def test_what_is_no_result_is_refused(models, tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "other.json").write_text(text)
    assert evaluate(models, tmp_path / "out.json", compare=tmp_path / "other.json") == 2
    assert "compare must be a result file of esr-distill eval, got" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["folder", "file/result.json"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(models, tmp_path, capsys, where):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert evaluate(models, tmp_path / where) == 2
    assert "output must be a file that can be written, got" in capsys.readouterr().err


def test_an_unknown_option_is_an_error(models, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate(models, tmp_path / "out.json", samples_per_prompt=3)
    assert stopped.value.code == 2 and "samples_per_prompt" in capsys.readouterr().err


def test_first_and_last_box_are_printed(models, tmp_path, capsys):
    assert evaluate(models, tmp_path / "out.json", scorer="boxed_exact", limit=3) == 0
    output = capsys.readouterr().out
    assert "first box accuracy" in output and "last box accuracy" in output
    assert "first_box_correct" in json.loads((tmp_path / "out.json").read_text())["problems"][0]


def test_the_digest_is_of_prompts_answers_and_order():
    first, second = PromptRecord("1+1=", "2"), PromptRecord([{"role": "user", "content": "1+2="}], "3")
    digests = [
        problems_digest(records)
        for records in ([first, second], [second, first], [first], [first, PromptRecord(second.prompt, "4")])
    ]
    assert len(set(digests)) == 4
    assert problems_digest([PromptRecord("1+1=", "2"), second]) == digests[0]
