"""Ratios that targets speak of, each a function from the rows of a case to one number.

Ours is the fastest row of ours in a setting that needs no workspace to be named. Over several settings the worst counts:
`worst` is `min` where a ratio must be at least something, `max` where it must be at most. What is not measured is said and
never guessed: where a part is missing, the ratio stands for the other settings alone.
"""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

from bench.cases.comparison import largest_gradient_error
from bench.cases.sampler_inputs import LM_LIKE
from bench.reports.row_keys import groups, is_ours, milliseconds, setting_of

GRADIENT_BUDGET = 2e-3  # relative error in norm
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
# Fields that tell settings of one case apart, for the notes.
TOLD = (
    "model",
    "op",
    "divergence",
    "sampler",
    "logits",
    "dtype",
    "pass",
    "B",
    "batch_size",
    "N",
    "V",
    "D",
    "K",
    "threads",
)


class Measured(NamedTuple):
    ratio: float | None
    note: str = ""  # the rows it is of
    missing: str = ""  # what of it was not measured

    def __bool__(self) -> bool:
        return self.ratio is not None


Worst = Callable  # min or max
Measure = Callable[[list[dict], Worst], Measured]


def worst_of(found: list[Measured], worst: Worst, nothing: str) -> Measured:
    """The worst of several, with what is missing of any; `nothing` says what is missing where there are none."""
    parts = (part for measured in found for part in measured.missing.split("; "))
    missing = "; ".join(dict.fromkeys(filter(None, parts)))
    with_ratio = [measured for measured in found if measured]
    if not with_ratio:
        return Measured(None, missing=missing or nothing)
    return worst(with_ratio, key=lambda measured: measured.ratio)._replace(missing=missing)


def place(row: dict, rows: list[dict]) -> str:
    """What tells the setting of a row from those of the others of its case."""
    told = [name for name in TOLD if name in row and len({str(other.get(name)) for other in rows}) > 1]
    return ", ".join(f"{name} {row[name]}" if isinstance(row[name], int) else str(row[name]) for name in told)


def timed_ours(group: list[dict], named: str = "*") -> list[dict]:
    ours = [row for row in group if is_ours(row) and fnmatchcase(row["implementation"], named)]
    return [row for row in ours if row["status"] == "timed" and row.get("workspace_bytes") is None]


def statuses(rows: list[dict]) -> str:
    """ "FlashInfer: not installed": of the rows that were not timed."""
    told = dict.fromkeys(f"{row['implementation']}: {row['status']}" for row in rows if row["status"] != "timed")
    return "; ".join(told)


def of_groups(
    of_group: Callable[[list[dict], dict], Measured],
    rows: list[dict],
    worst: Worst,
    *,
    nothing: str = "no rows",
    ours_named: str = "*",
) -> Measured:
    """`of_group` (rows of one setting, our fastest row) over the settings."""
    found = []
    for group in groups(rows):
        ours = min(timed_ours(group, ours_named), key=milliseconds, default=None)
        if ours is None:
            all_ours = [row for row in group if is_ours(row) and fnmatchcase(row["implementation"], ours_named)]
            found.append(Measured(None, missing=statuses(all_ours) or "no row of ours"))
        else:
            measured = of_group(group, ours)
            found.append(measured._replace(note=", ".join(filter(None, (place(ours, rows), measured.note)))))
    return worst_of(found, worst, nothing)


def our_figure(figure: Callable[[dict], float | None], what: str) -> Measure:
    """A figure of our rows; `what` says what is missing where it is None."""

    def of_group(group: list[dict], ours: dict) -> Measured:
        value = figure(ours)
        return Measured(None, missing=what) if value is None else Measured(value, ours["implementation"])

    return lambda rows, worst: of_groups(of_group, rows, worst)


def recorded(key: str) -> Measure:
    return our_figure(lambda row: row.get(key), f"no {key}")


def against(other: str, ours: str = "*") -> Measure:
    """How many times the time of ours others take, the fastest whose name fits the pattern `other`."""

    def is_other(row: dict) -> bool:
        return not is_ours(row) and fnmatchcase(row["implementation"], other)

    def of_group(group: list[dict], our_row: dict) -> Measured:
        others = [row for row in group if is_other(row)]
        timed = [row for row in others if row["status"] == "timed"]
        if not timed:
            return Measured(None, missing=statuses(others))
        best = min(timed, key=milliseconds)
        note = f"{our_row['implementation']} against {best['implementation']}"
        return Measured(milliseconds(best) / milliseconds(our_row), note, statuses(others))

    def measure(rows: list[dict], worst: Worst) -> Measured:
        compared = [row for group in groups(rows) if any(map(is_other, group)) for row in group]
        nothing = f"no row of {other}" if rows else "no rows"
        return of_groups(of_group, compared, worst, nothing=nothing, ours_named=ours)

    return measure


def only(where: Callable[[dict], bool], measure: Measure) -> Measure:
    return lambda rows, worst: measure([row for row in rows if where(row)], worst)


def flatness(key: str) -> Measure:
    """The least of a figure of ours over the settings, as a share of the largest."""

    def measure(rows: list[dict], worst: Worst) -> Measured:
        least, most = (recorded(key)(rows, extreme) for extreme in (min, max))
        return least._replace(ratio=least.ratio / most.ratio) if least else least

    return measure


def prefix_saving(rows: list[dict], worst: Worst) -> Measured:
    """Time of all rows of the rollouts over that of their prefix, both ours; with and without a named workspace."""
    found = []
    for group in groups(rows, without=("N", "horizon")):
        ours = [row for row in group if is_ours(row)]
        if not ours:
            continue
        shortest = min(row["horizon"] for row in ours)
        timed = [row for row in ours if row["status"] == "timed"]
        short = [row for row in timed if row["horizon"] == shortest]
        full = [row for row in timed if row["horizon"] > shortest]
        if not short or not full:
            found.append(Measured(None, missing=statuses(ours) or "only one horizon"))
            continue
        a, b = (min(rows_of_one, key=milliseconds) for rows_of_one in (short, full))
        note = f"{a['op']}, {b['implementation']} against {a['implementation']}"
        found.append(Measured(milliseconds(b) / milliseconds(a), note, statuses(ours)))
    return worst_of(found, worst, "no rows of ours")


def against_lm_like(rows: list[dict], worst: Worst) -> Measured:
    """Our time on flat and on one-hot logits over that on LM-like ones."""
    found = []
    for group in groups(rows, without=("logits",)):
        ours = [row for row in group if is_ours(row)]
        usual = [row for row in timed_ours(group) if row["logits"] == LM_LIKE]
        others = [row for row in timed_ours(group) if row["logits"] != LM_LIKE]
        missing = statuses(ours)
        if not usual or not others:
            found.append(Measured(None, missing=missing or "only one kind of logits"))
        else:
            found += [Measured(milliseconds(row) / milliseconds(usual[0]), place(row, rows), missing) for row in others]
    return worst_of(found, worst, "no rows")


def pareto_lead(rows: list[dict], worst: Worst) -> Measured:
    """How far ours leads among those whose gradient is within the budget: above 1 where it is on the Pareto front alone.

    For each other row the fastest of ours that is at least as exact is found; its lead is how many times longer the other
    takes, and 0 where no row of ours is as exact, or none within the budget.
    """
    found = []
    for group in groups(rows):
        ours = [row for row in timed_ours(group) if largest_gradient_error(row) <= GRADIENT_BUDGET]
        others = [row for row in group if not is_ours(row)]
        unknown = statuses([row for row in others if row["status"] != "out of memory"])
        here = f"mean divergence {group[0]['mean_divergence']:.1g}"
        if not ours:
            missing = statuses([row for row in group if is_ours(row)])
            found.append(Measured(None, missing=missing) if missing else Measured(0.0, f"{here}, ours is outside"))
            continue
        leads = []
        for other in (row for row in others if row["status"] == "timed"):
            error = largest_gradient_error(other)
            if math.isnan(error) or error > GRADIENT_BUDGET:
                continue
            as_exact = [row for row in ours if largest_gradient_error(row) <= error]
            lead = max((milliseconds(other) / milliseconds(row) for row in as_exact), default=0.0)
            leads.append(Measured(lead, f"{here}, {other['implementation']}"))
        if not leads:
            leads.append(Measured(math.inf if not unknown else None, f"{here}, no other is within"))
        found += [lead._replace(missing=unknown) for lead in leads]
    return worst_of(found, worst, "no rows")


def gradient_copies(row: dict) -> float | None:
    """Peak memory beyond the inputs, in units of the gradient of the logits."""
    if row["peak_bytes"] is None:
        return None
    return row["peak_bytes"] / (row["N"] * row["V"] * ITEMSIZE[row["dtype"]])


def of_setting(**wanted) -> Callable[[dict], bool]:
    """Whether a row has these values in its setting."""
    return lambda row: wanted.items() <= dict(setting_of(row)).items()
