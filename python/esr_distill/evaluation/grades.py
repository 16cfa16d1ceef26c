"""What was right about each reply, by question (Q) and sample (S), and as rows of a result file."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from esr_distill.evaluation.repetition import is_repetitive
from esr_distill.evaluation.scorers import SCORERS


@dataclass(frozen=True)
class Reply:
    """A response as text, its length in tokens (EOS included), whether it ended by EOS within the limit, and how often its last
    three tokens occur in it (`end_repeats`)."""

    text: str
    length: int
    finished: bool
    end_repeats: int = 0


@dataclass(frozen=True)
class Grades:
    """All that the statistics need.

    Attributes:
        answers: for each question the answers found, None where there is none.
        correct_Q_S: (Q, S) bool; a boxed scorer's last box.
        first_box_correct_Q_S: (Q, S) bool; None for a scorer without boxes.
        majority_correct_Q: (Q,) bool, whether the majority's answer is right.
        finished_Q_S, repetitive_Q_S: (Q, S) bool.
        length_Q_S: (Q, S) tokens.
    """

    answers: list[list[str | None]]
    correct_Q_S: np.ndarray
    first_box_correct_Q_S: np.ndarray | None
    majority_correct_Q: np.ndarray
    finished_Q_S: np.ndarray
    repetitive_Q_S: np.ndarray
    length_Q_S: np.ndarray

    def rows(self) -> list[dict]:
        """One JSON object a question."""
        rows = [
            {
                "answers": answers,
                "correct": self.correct_Q_S[question].tolist(),
                "majority_correct": bool(self.majority_correct_Q[question]),
                "finished": self.finished_Q_S[question].tolist(),
                "repetitive": self.repetitive_Q_S[question].tolist(),
                "length": self.length_Q_S[question].tolist(),
            }
            for question, answers in enumerate(self.answers)
        ]
        if self.first_box_correct_Q_S is not None:
            for row, correct_S in zip(rows, self.first_box_correct_Q_S.tolist(), strict=True):
                row["first_box_correct"] = correct_S
        return rows

    @classmethod
    def from_rows(cls, rows: list[dict]) -> "Grades":
        """What `rows` wrote. Raises KeyError, IndexError, TypeError or ValueError where it did not."""

        shape = len(rows), len(rows[0]["correct"])

        def table(name: str, dtype: type) -> np.ndarray:
            table_Q_S = np.array([row[name] for row in rows], dtype=dtype)
            if table_Q_S.shape != shape or 0 in shape:
                raise ValueError(f"{name} must hold {shape[1]} values in every row")
            return table_Q_S

        return cls(
            answers=[row["answers"] for row in rows],
            correct_Q_S=table("correct", bool),
            first_box_correct_Q_S=table("first_box_correct", bool) if "first_box_correct" in rows[0] else None,
            majority_correct_Q=np.array([row["majority_correct"] for row in rows], dtype=bool),
            finished_Q_S=table("finished", bool),
            repetitive_Q_S=table("repetitive", bool),
            length_Q_S=table("length", np.int64),
        )


def majority(answers: list[str | None], is_same: Callable[[str, str], bool]) -> str | None:
    """The answer that most samples gave. Of equally frequent ones, the one whose first sample was drawn earliest.

    Each answer joins the first group whose first answer is the same. Samples without an answer have no vote; None where none has
    one.
    """
    groups: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        for group in groups:
            if answer == group[0] or is_same(group[0], answer):
                group.append(answer)
                break
        else:
            groups.append([answer])
    return max(groups, key=len)[0] if groups else None  # max takes the first of equals


def grade_replies(replies: list[Reply], expected: list[str], scorer_name: str, samples_per_problem: int) -> Grades:
    """Grade the replies to questions whose right answers are `expected`; the samples of a question are next to each other.

    Raises:
        ValueError: another number of replies than questions times samples.
    """
    scorer, num_samples = SCORERS[scorer_name], samples_per_problem
    if len(replies) != len(expected) * num_samples:
        raise ValueError(f"there must be {len(expected)} x {num_samples} replies, got {len(replies)}")
    samples = [replies[start : start + num_samples] for start in range(0, len(replies), num_samples)]

    def is_right(question: int, answer: str | None) -> bool:
        return answer is not None and scorer.is_same(expected[question], answer)

    def right(find: Callable[[str], str | None]) -> np.ndarray:
        return np.array([[is_right(q, find(reply.text)) for reply in replies_S] for q, replies_S in enumerate(samples)])

    answers = [[scorer.find(reply.text) for reply in replies_S] for replies_S in samples]
    votes = [majority(answers_S, scorer.is_same) for answers_S in answers]
    return Grades(
        answers=answers,
        correct_Q_S=right(scorer.find),
        first_box_correct_Q_S=None if scorer.find_first is None else right(scorer.find_first),
        majority_correct_Q=np.array([is_right(question, vote) for question, vote in enumerate(votes)]),
        finished_Q_S=np.array([[reply.finished for reply in replies_S] for replies_S in samples]),
        repetitive_Q_S=np.array([[is_repetitive(reply.end_repeats) for reply in replies_S] for replies_S in samples]),
        length_Q_S=np.array([[reply.length for reply in replies_S] for replies_S in samples]),
    )
