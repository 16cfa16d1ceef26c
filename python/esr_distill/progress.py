"""Live progress of a run: step, loss, and where the time goes."""

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

# Without a terminal there is no live bar; a line is printed this often instead.
SECONDS_BETWEEN_LINES = 15
LINE_WIDTH = 160


def make_console() -> Console:
    """Output of a command: the terminal's width, or long lines where the output goes to a file.

    The progress bars of transformers are switched off; what they count is over in a moment and would break into ours.
    """
    transformers_logging.disable_progress_bar()
    console = Console()
    return console if console.is_terminal else Console(width=LINE_WIDTH)


def print_line(console: Console, text: str) -> None:
    """A line as it is: brackets in paths are no markup, and a command that is broken in the middle could not be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class TrainingProgress:
    """A progress bar with the last step's loss and stage times; plain lines where the output is no terminal."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.console = console
        self.printed = -math.inf
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[summary]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=steps, completed=done, summary="")

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, record: dict) -> None:
        """Show one step's metrics."""
        summary = step_summary(record)
        self.bar.update(self.task, completed=record["step"], summary=summary)
        if not self.console.is_terminal and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            self.console.print(f"step {record['step']}  {summary}")


def step_summary(record: dict) -> str:
    """One line: loss, mean length, tokens per second, seconds and the share of each stage."""
    stages = record["stage_seconds"]
    shares = " ".join(
        f"{name.removesuffix('_forward')} {100 * t / record['seconds']:.0f}%" for name, t in stages.items()
    )
    speed = "" if record["tokens_per_second"] is None else f"{record['tokens_per_second']:.0f} tokens/s  "
    return f"loss {record['loss']:.4f}  length {record['mean_length']:.1f}  {speed}{record['seconds']:.2f} s ({shares})"
