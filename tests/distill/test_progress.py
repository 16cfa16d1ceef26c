"""Does the line of a step say what matters?  pytest tests/distill/test_progress.py"""

from io import StringIO

from rich.console import Console

from esr_distill.progress import TrainingProgress, step_summary

RECORD = {
    "step": 3,
    "loss": 0.25,
    "mean_length": 99.5,
    "seconds": 2.0,
    "stage_seconds": {"rollout": 1.5, "student_forward": 0.5},
    "tokens_per_second": 796.4,
}


def test_a_step_in_one_line():
    assert step_summary(RECORD) == "loss 0.2500  length 99.5  796 tokens/s  2.00 s (rollout 75% student 25%)"
    without = RECORD | {"tokens_per_second": None}
    assert step_summary(without) == "loss 0.2500  length 99.5  2.00 s (rollout 75% student 25%)"


def test_without_a_terminal_lines_are_printed_now_and_then():
    console = Console(file=StringIO(), width=160)
    with TrainingProgress(console, steps=10, done=2) as progress:
        progress.show(RECORD)
        progress.show(RECORD | {"step": 4})  # at once: no second line
    assert console.file.getvalue().splitlines() == [f"step 3  {step_summary(RECORD)}"]
