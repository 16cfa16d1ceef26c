"""The two synthetic tasks of the demo: sums of one-digit terms, worked out one step at a time.

Every running total stays inside 00..99 and is written with two digits, so a problem of `num_terms` terms has a prompt
and a response of known length. Both tasks ask the same question and differ in how the response is written:

- `rewrite`: each line rewrites the whole remaining expression. `17+5+8-8=` is answered `22+8-8=30-8=22#22`. A late line
  of a long problem looks exactly like the first line of a shorter one, so what is learnt on the prefix applies to the
  suffix.
- `pointer`: each step names its operand. `17+5+8-8=` is answered `17+5=22;22+8=30;30-8=22;#22`. Step i has to look its
  operand up at position i of the prompt, which the prefix of a response never practises for large i.

Training and held-out problems are the two parts of a fixed partition of all prompts (see `split_of`): whatever the
seeds, no prompt is in both.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

TASKS = ("rewrite", "pointer")
SPLITS = ("training", "held_out")


@dataclass(frozen=True)
class ChainSumProblem:
    """`prompt` ends with `=`; `response` is the worked solution and ends with `#` and `answer`; no special tokens."""

    prompt: str
    response: str
    answer: str


def make_problem(rng: random.Random, task: str, num_terms: int, forget_carry: bool = False) -> ChainSumProblem:
    """Draw one problem.

    Args:
        rng: source of all randomness.
        task: one of `TASKS`.
        num_terms: terms of the sum, the first (two digits) included; >= 2.
        forget_carry: write the response of a pupil who forgets every carry and borrow: 17+5 becomes 12, 30-8 becomes
            32. `answer` is then the pupil's answer.

    Raises:
        ValueError: unknown task, num_terms < 2.
    """
    if task not in TASKS:
        raise ValueError(f"make_problem: task must be one of {TASKS}, got {task!r}")
    if num_terms < 2:
        raise ValueError(f"make_problem: num_terms must be >= 2, got {num_terms}")
    totals = [rng.randrange(100)]
    operands = []
    while len(totals) < num_terms:
        operand = rng.choice("+-") + str(rng.randrange(1, 10))
        total = totals[-1] + int(operand)
        if forget_carry:
            total = totals[-1] // 10 * 10 + total % 10
        if 0 <= total < 100:
            operands.append(operand)
            totals.append(total)
    steps = [_write_step(task, operands, i, totals[i], totals[i + 1]) for i in range(num_terms - 1)]
    prompt = f"{totals[0]:02d}" + "".join(operands) + "="
    answer = f"{totals[-1]:02d}"
    return ChainSumProblem(prompt, _SEPARATOR[task].join(steps) + _LAST_SEPARATOR[task] + "#" + answer, answer)


def make_problems(
    task: str,
    count: int,
    seed: int,
    min_terms: int,
    max_terms: int,
    *,
    split: str = "training",
    forget_carry: bool = False,
) -> list[ChainSumProblem]:
    """`count` problems with lengths uniform in min_terms..max_terms; the same arguments give the same list.

    Problems of the split "training" and of "held_out" never share a prompt. Inside one list a prompt may repeat (there
    are only 1,710 two-term prompts).

    Raises:
        ValueError: unknown task or split, count < 0, bounds that are not 2 <= min_terms <= max_terms.
    """
    return draw_problems(random.Random(seed), task, count, min_terms, max_terms, split=split, forget_carry=forget_carry)


def draw_problems(
    rng: random.Random,
    task: str,
    count: int,
    min_terms: int,
    max_terms: int,
    *,
    split: str = "training",
    forget_carry: bool = False,
) -> list[ChainSumProblem]:
    """`make_problems` from a generator that goes on: for streams of training batches."""
    if split not in SPLITS:
        raise ValueError(f"make_problems: split must be one of {SPLITS}, got {split!r}")
    if count < 0:
        raise ValueError(f"make_problems: count must be >= 0, got {count}")
    if not 2 <= min_terms <= max_terms:
        raise ValueError(f"make_problems: need 2 <= min_terms <= max_terms, got {min_terms} and {max_terms}")
    problems = []
    while len(problems) < count:
        problem = make_problem(rng, task, rng.randint(min_terms, max_terms), forget_carry)
        if split_of(problem.prompt) == split:
            problems.append(problem)
    return problems


def split_of(prompt: str) -> str:
    """The split a prompt belongs to: about one prompt in eight is held out, chosen by a digest of its text."""
    return "held_out" if hashlib.sha256(prompt.encode()).digest()[0] % 8 == 0 else "training"


def check_no_shared_prompt(training: Sequence[ChainSumProblem], held_out: Sequence[ChainSumProblem]) -> None:
    """Raise ValueError when a prompt is in both lists (possible only if the lists were not made by split)."""
    shared = {problem.prompt for problem in training} & {problem.prompt for problem in held_out}
    if shared:
        raise ValueError(
            f"check_no_shared_prompt: training and held_out must share no prompt, got {len(shared)} shared, "
            f"for example {min(shared)!r}"
        )


def extract_answer(text: str) -> str | None:
    """The digits after the first `#`, or None when there are none. `extract_answer("22-8=14#14") == "14"`."""
    match = re.search(r"#(\d+)", text)
    return match.group(1) if match else None


def correct_steps(problem: ChainSumProblem, text: str) -> list[bool]:
    """Which steps of a written response are right, one entry per step of the problem (num_terms - 1 of them).

    Step i is right when it has the right form, uses operand i of the prompt (rewrite: and carries the later operands
    over unchanged), and its total follows from the total *that the response itself wrote* one step earlier. A wrong
    total is therefore counted once, where it was made. Steps that were not written are wrong. What follows `#` is not
    looked at.
    """
    task = "pointer" if ";" in problem.response else "rewrite"
    start, operands = problem.prompt[:2], re.findall(r"[+-]\d", problem.prompt)
    written = text.split("#")[0].split(_SEPARATOR[task])
    verdicts = []
    previous_total = start
    for i in range(len(operands)):
        step = written[i] if i < len(written) else ""
        total = step[:2] if task == "rewrite" else step[-2:]
        is_right = False
        if re.fullmatch(r"\d\d", previous_total) and 0 <= int(previous_total) + int(operands[i]) < 100:
            expected_total = int(previous_total) + int(operands[i])
            is_right = step == _write_step(task, operands, i, int(previous_total), expected_total)
        verdicts.append(is_right)
        previous_total = total
    return verdicts


_SEPARATOR = {"rewrite": "=", "pointer": ";"}
_LAST_SEPARATOR = {"rewrite": "", "pointer": ";"}


def _write_step(task: str, operands: Sequence[str], index: int, total_before: int, total_after: int) -> str:
    if task == "rewrite":
        return f"{total_after:02d}" + "".join(operands[index + 1 :])
    return f"{total_before:02d}{operands[index]}={total_after:02d}"
