"""Are the demo's problems, answers and step verdicts right? `pytest tests/distill/test_chain_sum.py`"""

import random
import re

import pytest

from esr_distill.demo.chain_sum import (
    SPLITS,
    TASKS,
    ChainSumProblem,
    check_no_shared_prompt,
    correct_steps,
    draw_problems,
    extract_answer,
    make_problem,
    make_problems,
    split_of,
)

REWRITE = ChainSumProblem("17+5+8-8=", "22+8-8=30-8=22#22", "22")
POINTER = ChainSumProblem("17+5+8-8=", "17+5=22;22+8=30;30-8=22;#22", "22")


class ScriptedRandom(random.Random):
    """Answers `randrange` and `choice` from lists written by hand."""

    def __init__(self, numbers, signs):
        super().__init__(0)
        self.numbers, self.signs = list(numbers), list(signs)

    def randrange(self, *bounds):
        return self.numbers.pop(0)

    def choice(self, options):
        return self.signs.pop(0)


def test_problem_of_hand_written_draws():
    assert make_problem(ScriptedRandom([17, 5, 8, 8], "++-"), "rewrite", 4) == REWRITE
    assert make_problem(ScriptedRandom([17, 5, 8, 8], "++-"), "pointer", 4) == POINTER


def test_forgotten_carry_and_borrow():
    # 17+5 -> 12 (carry forgotten), 12-8 -> 14 (borrow forgotten), 14+3 -> 17 (nothing to forget)
    rewrite = make_problem(ScriptedRandom([17, 5, 8, 3], "+-+"), "rewrite", 4, forget_carry=True)
    assert rewrite == ChainSumProblem("17+5-8+3=", "12-8+3=14+3=17#17", "17")
    pointer = make_problem(ScriptedRandom([17, 5, 8, 3], "+-+"), "pointer", 4, forget_carry=True)
    assert pointer == ChainSumProblem("17+5-8+3=", "17+5=12;12-8=14;14+3=17;#17", "17")


def test_draw_that_would_leave_two_digits_is_drawn_again():
    problem = make_problem(ScriptedRandom([97, 5, 2], "++"), "rewrite", 2)
    assert problem == ChainSumProblem("97+2=", "99#99", "99")
    problem = make_problem(ScriptedRandom([3, 4, 3], "--"), "pointer", 2)
    assert problem == ChainSumProblem("03-3=", "03-3=00;#00", "00")


@pytest.mark.parametrize("task", TASKS)
def test_answers_agree_with_python_arithmetic(task):
    for problem in make_problems(task, 300, seed=1, min_terms=2, max_terms=9):
        terms = re.fullmatch(r"(\d\d)((?:[+-][1-9])+)=", problem.prompt)
        total = int(terms[1]) + sum(int(operand) for operand in re.findall(r"[+-]\d", terms[2]))
        assert problem.answer == f"{total:02d}"
        assert extract_answer(problem.response) == problem.answer
        assert correct_steps(problem, problem.response) == [True] * (len(terms[2]) // 2)


# Seven terms. Rewrite: lines of 12, 10, .. 2 characters, 5 equal signs between them, #dd. Pointer: 6 steps of 8, #dd.
@pytest.mark.parametrize(("task", "length"), [("rewrite", 42 + 5 + 3), ("pointer", 6 * 8 + 3)])
def test_response_length_is_known(task, length):
    problems = make_problems(task, 20, 0, 7, 7)
    assert {len(problem.response) for problem in problems} == {length}
    assert {len(problem.prompt) for problem in problems} == {2 + 6 * 2 + 1}


def test_same_seed_same_problems():
    assert make_problems("rewrite", 50, 3, 2, 7) == make_problems("rewrite", 50, 3, 2, 7)
    assert make_problems("rewrite", 50, 3, 2, 7) != make_problems("rewrite", 50, 4, 2, 7)


def test_lengths_cover_the_range_and_nothing_else():
    num_terms = {(len(problem.prompt) - 1) // 2 for problem in make_problems("pointer", 400, 0, 2, 7)}
    assert num_terms == {2, 3, 4, 5, 6, 7}


def test_splits_share_no_prompt_whatever_the_seed():
    training = make_problems("rewrite", 3000, seed=5, min_terms=2, max_terms=3)
    held_out = make_problems("rewrite", 500, seed=5, min_terms=2, max_terms=3, split="held_out")
    assert {problem.prompt for problem in training}.isdisjoint(problem.prompt for problem in held_out)
    check_no_shared_prompt(training, held_out)
    with pytest.raises(ValueError, match=r"must share no prompt, got 1 shared, for example '\d\d"):
        check_no_shared_prompt(training, [*held_out, training[0]])


def test_held_out_share_is_an_eighth():
    prompts = {make_problem(random.Random(seed), "rewrite", 5).prompt for seed in range(4000)}
    share = sum(split_of(prompt) == "held_out" for prompt in prompts) / len(prompts)
    assert 0.10 < share < 0.15  # 0.125, standard error 0.005


def test_stream_of_batches_moves_on():
    rng = random.Random(0)
    assert draw_problems(rng, "rewrite", 4, 5, 5) != draw_problems(rng, "rewrite", 4, 5, 5)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("22-8=14#14", "14"),
        ("#07", "07"),
        ("#52#53", "52"),
        ("22-8=14", None),
        ("14#", None),
        ("", None),
        ("#x1", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("22+8-8=30-8=22#22", [True, True, True]),
        ("12+8-8=20-8=12#12", [False, True, True]),  # carry forgotten once; what follows is consistent
        ("22+8-8=20-8=12#12", [True, False, True]),
        ("22+8-8=30-7=23#23", [True, False, False]),  # an operand copied wrongly spoils the line and the next
        ("22+8-8=30-8", [True, True, False]),  # cut off
        ("22-8=14#14", [False, False, False]),  # an operand lost: nothing after it is in its place
        ("2x+8-8=30-8=22#22", [False, False, True]),
        ("", [False, False, False]),
    ],
)
def test_correct_steps_of_rewrite(text, verdicts):
    assert correct_steps(REWRITE, text) == verdicts


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("17+5=22;22+8=30;30-8=22;#22", [True, True, True]),
        ("17+5=12;12+8=20;20-8=12;#12", [False, True, True]),
        ("17+5=22;22+9=31;31-8=23;#23", [True, False, True]),  # wrong operand, right arithmetic
        ("17+5=22;23+8=31;31-8=23;#23", [True, False, True]),  # does not continue the previous total
        ("17+5=22;22+8=30;", [True, True, False]),
        ("17+5=22;;30-8=22;#22", [True, False, False]),
    ],
)
def test_correct_steps_of_pointer(text, verdicts):
    assert correct_steps(POINTER, text) == verdicts


def test_step_whose_total_needs_three_digits_is_wrong():
    problem = ChainSumProblem("95+2+2=", "97+2=99#99", "99")
    assert correct_steps(problem, "98+2=100#100") == [False, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make_problem(random.Random(0), "sums", 4),
            r"make_problem: task must be one of .*'rewrite'.*got 'sums'",
        ),
        (lambda: make_problem(random.Random(0), "rewrite", 1), r"make_problem: num_terms must be >= 2, got 1"),
        (lambda: make_problems("rewrite", -1, 0, 2, 7), r"count must be >= 0, got -1"),
        (lambda: make_problems("rewrite", 4, 0, 5, 4), r"2 <= min_terms <= max_terms, got 5 and 4"),
        (lambda: make_problems("rewrite", 4, 0, 1, 4), r"2 <= min_terms <= max_terms, got 1 and 4"),
        (
            lambda: make_problems("rewrite", 4, 0, 2, 4, split="test"),
            rf"split must be one of .*{SPLITS[1]}.*got 'test'",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
