"""The rows of one pair at one batch size: every implementation at every horizon, taking turns.

Two rounds, the second in reverse order. A turn is one implementation at one horizon: it is made anew, does one step that is not
timed (it captures graphs, and the allocator finds its sizes), then its share of the timed steps, and gives back its memory: none
pays for another one's cache. One implementation passes through all horizons before the next, so a run that is stopped early has
whole columns. What an implementation raises becomes the status of its row.
"""

import gc
import statistics
from collections.abc import Iterator

import torch

from bench.baselines.peers import NotInstalled
from bench.floor import StepSetting
from bench.steps.gate import check_gate, step_gate
from bench.steps.implementations import GATED, IMPLEMENTATIONS
from bench.steps.record import StepRecord, Steps
from bench.steps.runs import Pair, make_run
from bench.timing import ROUNDS, Stopwatch

MOST_CHARACTERS = 600  # of a message


def failure(error: Exception) -> dict:
    """Status and message of a row whose implementation raised."""
    message = str(error) or type(error).__name__
    is_out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and "allocate memory" in message  # the allocator of a CPU has no class of its own
    )
    if isinstance(error, NotInstalled):
        status = "not installed"
    elif is_out_of_memory:
        status = "out of memory"
    elif isinstance(error, AssertionError):
        status = "refused"
    else:
        status, message = "failed", f"{type(error).__name__}: {message}"
    return {"status": status, "message": message[:MOST_CHARACTERS]}


class SettingRows:
    """Rows of one setting, by implementation, as they are filled."""

    def __init__(self, pair: Pair, setting: StepSetting, names: list[str], facts: dict, stopwatch: Stopwatch) -> None:
        self.pair, self.setting, self.stopwatch = pair, setting, stopwatch
        self.rows = {name: facts | empty_row(name) for name in names}
        self.samples: dict[str, list[tuple[float, StepRecord]]] = {name: [] for name in names}
        self.spent = dict.fromkeys(names, 0.0)
        self.is_gated = False

    def take_turn(self, name: str, count: int, row_seconds: float) -> None:
        """Up to `count` timed steps more; none where the row was given up, or has a time and has taken `row_seconds`."""
        if name in GATED and not self.is_gated and not self.is_given_up(name):
            self.gate()
        if self.is_given_up(name) or self.has_enough(name, row_seconds):
            return
        row, samples, steps = self.rows[name], self.samples[name], None
        try:
            steps = IMPLEMENTATIONS[name](self.pair, self.setting)
            first_s, _ = self.timed(name, steps)
            row["first_step_s"] = row["first_step_s"] or first_s
            for _ in range(count):
                if self.has_enough(name, row_seconds):
                    break
                samples.append(self.timed(name, steps))
            row |= summary(samples, self.setting) | {"optimizer_state_dtype": self.pair.optimizer_state_dtype}
            if self.stopwatch.is_cuda:
                row["reserved_bytes"] = torch.cuda.memory_reserved()
        except Exception as error:
            row |= failure(error)
        finally:
            if steps is not None:
                steps.release()
            del steps
            self.clear()

    def is_given_up(self, name: str) -> bool:
        return self.rows[name]["status"] not in (None, "timed")

    def has_enough(self, name: str, row_seconds: float) -> bool:
        return bool(self.samples[name]) and self.spent[name] > row_seconds

    def timed(self, name: str, steps: Steps) -> tuple[float, StepRecord]:
        """Seconds of one whole step, and what it tells.

        Raises:
            AssertionError: a rollout is shorter than the horizon.
        """
        records: list[StepRecord] = []
        seconds = self.stopwatch.seconds(lambda: records.append(steps.step()))
        self.spent[name] += seconds
        (record,) = records
        wanted = self.setting.num_rows
        if record.response_tokens != wanted or record.longest_rollout != self.setting.horizon:
            raise AssertionError(
                f"rollouts must all have {self.setting.horizon} tokens, {wanted} together, got {record.response_tokens} "
                f"and a longest one of {record.longest_rollout}"
            )
        return seconds, record

    def gate(self) -> None:
        """Refuse ours where its loss or gradient is not that of the step by hand; the columns stand in its rows."""
        self.is_gated = True
        gated = [row for name, row in self.rows.items() if name in GATED]
        try:
            columns = step_gate(make_run(self.pair, self.setting))
            for row in gated:
                row |= columns
            check_gate(columns, self.pair.dtype)
        except Exception as error:
            for row in gated:
                row |= failure(error)
        finally:
            self.clear()

    def clear(self) -> None:
        """No gradient and no free block is left to the next one."""
        self.pair.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.stopwatch.is_cuda:
            torch.cuda.empty_cache()


def take_turns(settings: list[SettingRows], names: list[str], repetitions: int, row_seconds: float) -> Iterator[dict]:
    """Fill all rows; yields the row of each turn after it."""
    turns = [(rows, name) for name in names for rows in settings]
    for number in range(ROUNDS):
        count = (repetitions + ROUNDS - 1 - number) // ROUNDS
        for rows, name in turns if number % 2 == 0 else reversed(turns):
            if count > 0:
                rows.take_turn(name, count, row_seconds)
            yield rows.rows[name]


def empty_row(name: str) -> dict:
    """Every column, so that a row that was not timed has them too."""
    return {
        "implementation": name,
        "status": None,
        "message": None,
        "step_s": None,
        "least_s": None,
        "most_s": None,
        "repetitions": 0,
        "first_step_s": None,
        "stage_s": None,
        "between_stages_s": None,  # of the same steps: batches of prompts, checks, metrics
        "stage_peak_bytes": None,
        "reserved_bytes": None,  # that the allocator holds after the steps, memory of graphs included
        "tokens_per_s": None,
        "loss": None,
        "optimizer_state_dtype": None,
        "gate_rows": None,
        "gate_loss": None,
        "gate_eager_loss": None,
        "gate_loss_difference": None,
        "gate_gradient_cosine": None,
        "gate_gradients": None,
    }


def summary(samples: list[tuple[float, StepRecord]], setting: StepSetting) -> dict:
    """Columns of a timed row; stage times are medians of their own, so they need not add up to the step's."""
    step_seconds = [seconds for seconds, _ in samples]
    records = [record for _, record in samples]
    step_s = statistics.median(step_seconds)
    peaks = [record.stage_peak_bytes for record in records if record.stage_peak_bytes is not None]
    return {
        "status": "timed",
        "step_s": step_s,
        "least_s": min(step_seconds),
        "most_s": max(step_seconds),
        "repetitions": len(step_seconds),
        "stage_s": {
            stage: statistics.median(record.stage_s[stage] for record in records) for stage in records[0].stage_s
        },
        "between_stages_s": statistics.median(seconds - sum(record.stage_s.values()) for seconds, record in samples),
        "stage_peak_bytes": {stage: max(peak[stage] for peak in peaks) for stage in peaks[0]} if peaks else None,
        "tokens_per_s": setting.num_rows / step_s,
        "loss": records[-1].loss,
    }
