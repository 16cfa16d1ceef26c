"""Do the shipped tokenizer and model pairs load, and are they as good and as bad as the demo says?

`pytest tests/distill/test_demo_models.py`
"""

import hashlib
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_distill.demo import make_models as maker
from esr_distill.demo.chain_sum import TASKS, ChainSumProblem, make_problems
from esr_distill.demo.character_tokenizer import make_character_tokenizer

ROLES = ("teacher", "student")
PAIRS = [(task, role) for task in TASKS for role in ROLES]


def test_tokenizer_ids_by_hand():
    tokenizer = make_character_tokenizer()
    # 0 <pad>, 1 <bos>, 2 <eos>, 3..12 the digits, then + - = ; # .
    assert tokenizer("17+5-8=").input_ids == [1, 4, 10, 13, 8, 14, 11, 15]
    assert tokenizer("0;#.").input_ids == [1, 3, 16, 17, 18]
    assert tokenizer("9", add_special_tokens=False).input_ids == [12]
    assert len(tokenizer) == 19
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_tokenizer_pads_on_the_left():
    batch = make_character_tokenizer()(["17+5=", "9"], padding=True)
    assert batch.input_ids == [[1, 4, 10, 13, 8, 15], [0, 0, 0, 0, 1, 12]]
    assert batch.attention_mask == [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize(("task", "role"), PAIRS)
def test_shipped_tokenizer_round_trip(task, role):
    tokenizer = AutoTokenizer.from_pretrained(maker.SHIPPED_MODELS / task / role)
    for problem in make_problems(task, 20, seed=0, min_terms=2, max_terms=9):
        text = problem.prompt + problem.response
        ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
        assert len(ids) == len(text) + 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_tokenizer_refuses_other_characters():
    with pytest.raises(Exception, match="Missing .UNK. token"):
        make_character_tokenizer()("17*5=")


@pytest.mark.parametrize(("task", "role"), PAIRS)
def test_shipped_model_loads_small_and_tied(task, role):
    folder = maker.SHIPPED_MODELS / task / role
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.num_parameters() == 642_304
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    assert (folder / "model.safetensors").stat().st_size < 2_700_000


def test_shipped_files_are_small():
    sizes = [path.stat().st_size for path in maker.SHIPPED_MODELS.rglob("*") if path.is_file()]
    assert len(sizes) == 2 * (1 + 2 * 5)  # recipe.json, and five files for each model
    assert sum(sizes) < 6_000_000


@pytest.mark.parametrize("task", TASKS)
def test_recipe_describes_the_shipped_weights(task):
    record = json.loads((maker.SHIPPED_MODELS / task / "recipe.json").read_text())
    recipe = maker.RECIPES[task]
    assert record["task"] == task
    assert [stage["num_steps"] for stage in record["recipe"]["teacher_stages"]] == [
        stage.num_steps for stage in recipe.teacher_stages
    ]
    assert record["recipe"]["student_stage"]["forget_carry"] is True
    for role in ROLES:
        weights = (maker.SHIPPED_MODELS / task / role / "model.safetensors").read_bytes()
        assert record[role]["sha256"] == hashlib.sha256(weights).hexdigest()


# recipe.json has the accuracies on 1,024 problems; the bounds leave 64 problems room for chance.
@pytest.mark.parametrize(
    ("task", "role", "lowest", "highest"),
    [
        ("rewrite", "teacher", 0.94, 1.0),
        ("rewrite", "student", 0.10, 0.50),
        ("pointer", "teacher", 0.94, 1.0),
        ("pointer", "student", 0.05, 0.50),
    ],
)
def test_shipped_accuracy(task, role, lowest, highest):
    folder = maker.SHIPPED_MODELS / task / role
    num_terms = maker.RECIPES[task].num_terms
    problems = make_problems(task, 64, seed=99, min_terms=num_terms, max_terms=num_terms, split="held_out")
    model, tokenizer = maker.load_model(folder), AutoTokenizer.from_pretrained(folder)
    assert lowest <= maker.greedy_accuracy(model, tokenizer, problems) <= highest


def test_worked_problems_are_encoded_with_labels_on_the_response_only():
    problem = ChainSumProblem("17+5=", "22#22", "22")
    token_ids, labels = maker.encode_worked_problems(make_character_tokenizer(), [problem])
    assert token_ids.tolist() == [[1, 4, 10, 13, 8, 15, 5, 5, 17, 5, 5, 2]]
    assert labels.tolist() == [[-100] * 6 + [5, 5, 17, 5, 5, 2]]


def test_learning_rate_by_hand():
    assert maker.learning_rate_factor(25, 10**9) == pytest.approx(0.5)
    assert maker.learning_rate_factor(500, 1000) == pytest.approx(0.05 + 0.95 / 2)
    assert maker.learning_rate_factor(1000, 1000) == pytest.approx(0.05)


def test_curriculum_grows_from_short_to_long():
    stage = maker.Stage("base", 1000, max_terms=9, batch_size=32, learning_rate=1.0, short_fraction=0.4)
    rng = random.Random(0)
    lengths = {step: {maker.draw_num_terms(rng, stage, step) for _ in range(400)} for step in (1, 399, 525, 650, 1000)}
    assert lengths[1] == lengths[399] == {2, 3}
    assert lengths[525] == set(range(2, 7))  # half of the quarter after 0.4: 3 + int(6 * 0.5)
    assert lengths[650] == lengths[1000] == set(range(2, 10))


TINY = maker.Recipe(
    num_terms=2,
    rope_theta=500.0,
    teacher_stages=(maker.Stage("base", 2, max_terms=3, batch_size=4, learning_rate=1e-3),),
    student_stage=maker.Stage("forget", 1, max_terms=3, batch_size=4, learning_rate=1e-3, forget_carry=True),
)


def test_same_seed_makes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "NUM_HELD_OUT", 4)
    weights = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        maker.make_models("rewrite", TINY, seed, tmp_path / name)
        weights[name] = [(tmp_path / name / role / "model.safetensors").read_bytes() for role in ROLES]
    assert weights["first"] == weights["again"]
    assert weights["first"][0] != weights["other"][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first", "other"]


def test_interrupted_run_leaves_the_old_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "NUM_HELD_OUT", 4)
    maker.make_models("rewrite", TINY, 0, tmp_path / "pair")
    before = (tmp_path / "pair" / "recipe.json").read_text()

    def interrupt(model, tokenizer, held_out, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(maker, "round_and_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        maker.make_models("rewrite", TINY, 1, tmp_path / "pair")
    assert (tmp_path / "pair" / "recipe.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output must be new or hold a recipe.json, got .*"):
        maker.main(["--task", "rewrite", "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_task_is_refused(capsys):
    with pytest.raises(SystemExit):
        maker.main(["--task", "sums"])
    assert "invalid choice: 'sums'" in capsys.readouterr().err
