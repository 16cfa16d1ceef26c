"""What a row of a result file is of: its setting, its implementation, whether that is ours, its time.

Ops, the sampler on a CPU and rollouts name these differently; what reads their files reads them through here.
"""

from collections.abc import Iterable
from typing import NamedTuple

# Fields that say what was asked for. Others are measured, or follow from the implementation and its plan.
SETTING = (
    *(
        "case",
        "axis",
        "op",
        "divergence",
        "model",
        "pair",
        "sampler",
        "logits",
        "dtype",
        "pass",
        "gap",
        "d_weight",
        "upstream",
    ),
    *("B", "N", "V", "D", "E", "K", "T", "P", "inputs", "batch_size", "prompt", "is_ragged", "horizon", "threads"),
    *("trained_tokens", "samples_per_prompt", "is_head_trained"),
)
OURS = ("ours", "in-process engine")  # names begin so, where a row does not say whose it is


class Spread(NamedTuple):
    """Milliseconds: the median, and what most repetitions lie between (10th and 90th percentile, or least and most)."""

    median: float
    low: float
    high: float


def setting_of(row: dict, without: Iterable[str] = ()) -> tuple:
    """(field, value) of each setting that the row has: equal for rows that may be compared."""
    return tuple((name, row[name]) for name in SETTING if name in row and name not in without)


def groups(rows: list[dict], without: Iterable[str] = ()) -> list[list[dict]]:
    """Rows of one setting together, in the order of the file."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(setting_of(row, without), []).append(row)
    return list(found.values())


def is_ours(row: dict) -> bool:
    """Rows of the ops say it, others by their name alone."""
    return row["is_ours"] if "is_ours" in row else row["implementation"].startswith(OURS)


def spread_of(row: dict) -> Spread | None:
    """None where no time was taken."""
    if row["status"] != "timed":
        return None
    if "median_ms" in row:
        return Spread(row["median_ms"], row["p10_ms"], row["p90_ms"])
    median_s = row["step_s"] if "step_s" in row else row["median_s"]
    low_s, high_s = (row["low_s"], row["high_s"]) if "low_s" in row else (row["least_s"], row["most_s"])
    return Spread(1e3 * median_s, 1e3 * low_s, 1e3 * high_s)


def milliseconds(row: dict) -> float:
    """Median of a timed row."""
    spread = spread_of(row)
    if spread is None:
        raise ValueError(f"a row must be timed to have a time, got status {row['status']!r}")
    return spread.median
