"""Do rules by the class of a token keep the ids of these classes, and are tables that cannot be used refused?

pytest tests/distill/test_token_classes.py
"""

import json

import pytest
from test_token_selection import kept, tokens
from tiny_models import make_tokenizer

from esr_distill.config import SelectionRule
from esr_distill.input_error import InputError
from esr_distill.token_selection.paper_classes import class_of, main
from esr_distill.token_selection.token_classes import ids_of_rule


def classes(path, *names: str, **more) -> SelectionRule:
    return SelectionRule("token_classes", table=str(path), classes=list(names), **more)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"5": "planning", "6": "math_latex", "7": "math_latex", "2": "structural"}))
    return path


def test_ids_are_kept_or_left_out_by_class(table):
    """Rollouts 5 6 7 8 9 | 6 7 2 | 5; ids 8 and 9 are in no class."""
    assert kept(rules=[classes(table, "math_latex")]) == tokens([1, 2], [0, 1], [])
    assert kept(rules=[classes(table, "planning", "structural")]) == tokens([0], [2], [0])
    assert kept(rules=[classes(table, "math_latex", complement=True)]) == tokens([0, 3, 4], [2], [0])
    both = [classes(table, "math_latex"), SelectionRule("top", score="divergence", tokens=1)]
    assert kept(rules=both) == tokens([1], [1], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[5, 6]", r'selection\.rules\.table must hold pairs such as "785": "planning", got \[5, 6\]: None in '),
        ('{"To": "planning"}', r"selection\.rules\.table must hold pairs .*, got 'To': 'planning' in "),
        ('{"-1": "planning"}', r"must hold pairs .*, got '-1': 'planning' in "),
        ('{"5": ["planning"]}', r"must hold pairs .*, got '5': \['planning'\] in "),
        ('{"5": "planning", "5": "structural"}', r"selection\.rules\.table must hold each id once, got 5 twice in "),
        ('{"5": ', r"selection\.rules\.table must be a JSON file of ids and classes, got "),
        ('{"5": "b", "6": "a"}', r"selection\.rules\.classes must be classes of .* \(a, b\), got 'planing'"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(InputError, match=message):
        ids_of_rule(classes(tmp_path / "classes.json", "planing"))


def test_no_table(tmp_path):
    with pytest.raises(
        InputError, match=r"selection\.rules\.table must be a JSON file of ids and classes, got '.*no\.json'"
    ):
        ids_of_rule(classes(tmp_path / "no.json", "planning"))
    with pytest.raises(InputError, match=r"selection\.rules\.table must be set for token_classes, got None"):
        SelectionRule("token_classes", classes=["planning"])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" Therefore", "planning"),
        ("therefore", "continuation"),
        ("Step", "planning"),
        ("Steps", "continuation"),
        (" 42", "math_number"),
        ("4.2", "continuation"),
        ("+", "math_operator"),
        (" ×", "math_operator"),
        (" \\(", "math_latex"),
        ("\\[\n", "math_latex"),
        (" \n", "structural"),
        ("**:", "structural"),
        ("", "structural"),
        (" answer", "continuation"),
    ],
)
def test_the_classes_of_the_paper(text, name):
    assert class_of(text) == name


def test_the_papers_classes_of_a_tokenizer_can_be_written_and_used(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "classes.json")]) == 0
    digits = ids_of_rule(classes(tmp_path / "classes.json", "math_number"))
    assert sorted(tokenizer.convert_ids_to_tokens(digits)) == list("0123456789")
    special = ids_of_rule(classes(tmp_path / "classes.json", "structural"))
    assert {0, 1, 2} <= set(special)  # <pad>, <bos>, <eos>


def test_a_model_without_a_tokenizer(tmp_path, capsys):
    assert main(["--model", str(tmp_path), "--output", str(tmp_path / "classes.json")]) == 2
    assert "paper_classes: --model must be a folder with a saved model and tokenizer" in capsys.readouterr().err
