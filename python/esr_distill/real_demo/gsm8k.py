"""GSM8K: the problems that ship with the package, cut into slices that share no problem. See DATA.md for the source.

Only problems whose question and solution are short are used, so that a step takes seconds on a CPU. That makes the
held-out problems easier than the whole test set: accuracies here are not comparable with published ones.
"""

import json
import lzma
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esr_distill.input_error import InputError

DATA_FOLDER = Path(__file__).parent
LONGEST_QUESTION, LONGEST_SOLUTION = 240, 240  # characters
INSTRUCTION = "Solve the problem in short steps. End with the line #### answer."


@dataclass(frozen=True)
class Problem:
    """`solution` is worked out in words and ends with the line `#### answer`, without calculator marks."""

    question: str
    solution: str
    answer: str


@dataclass(frozen=True)
class Slices:
    """No problem of `teacher` is in `distillation`; `held_out` comes from the test set."""

    teacher: list[Problem]
    distillation: list[Problem]
    held_out: list[Problem]


def load_problems(split: str, folder: Path = DATA_FOLDER) -> list[Problem]:
    """All problems of "train" or "test", in the file's order."""
    with lzma.open(folder / f"gsm8k_{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [parse_problem(line) for line in lines]


def parse_problem(line: str) -> Problem:
    """One line of the file.

    Raises:
        ValueError: the solution does not end with "#### number".
    """
    fields = json.loads(line)
    solution = clean_solution(fields["answer"])
    match = re.search(r"\n#### (-?[\d,.]+)$", solution)
    if match is None:
        raise ValueError(f"a solution must end with a line '#### number', got {fields['answer'][-60:]!r}")
    return Problem(fields["question"].strip(), solution, match[1].replace(",", ""))


def clean_solution(answer: str) -> str:
    """The solution without its calculator marks: "48/2 = <<48/2=24>>24 clips" -> "48/2 = 24 clips"."""
    return re.sub(r"<<[^>]*>>", "", answer).strip()


def is_short(problem: Problem) -> bool:
    """Whether question and solution both keep to the limits of this file."""
    return len(problem.question) <= LONGEST_QUESTION and len(problem.solution) <= LONGEST_SOLUTION


def cut_slices(
    train: Sequence[Problem], test: Sequence[Problem], *, teacher: int, distillation: int, held_out: int
) -> Slices:
    """The first `teacher` short training problems, the `distillation` after them, the first `held_out` of the test set.

    Raises:
        InputError: there are fewer short problems than asked for.
    """
    train, test = list(filter(is_short, dict.fromkeys(train))), list(filter(is_short, dict.fromkeys(test)))
    if teacher + distillation > len(train):
        raise InputError(
            f"teacher_steps and steps must need at most {len(train)} problems together, "
            f"got {teacher} for the teacher and {distillation} for the student"
        )
    if held_out > len(test):
        raise InputError(f"problems must be <= {len(test)}, got {held_out}")
    return Slices(train[:teacher], train[teacher : teacher + distillation], test[:held_out])


def write_prompt_file(path: Path, problems: Sequence[Problem]) -> None:
    """JSONL with "prompt" and "answer", as `esr-distill train` and `esr-distill eval` read it."""
    lines = [json.dumps({"prompt": problem.question, "answer": problem.answer}) + "\n" for problem in problems]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
