"""What part of the floor our measured steps reach, stage by stage: the speed of light is 100 %."""

from statistics import median

from bench.floor import STAGES, shares, step_floor
from bench.plan import case_of, leave_one_out, measured_cases, rates_of
from bench.reports.markdown_tables import markdown

CAPTION = (
    "Share of the floor that our steps reach: by stage the larger of counted bytes over the copy rate and counted FLOP over the "
    "rate of products, both measured in this run, over the measured seconds (`bench/floor.py`)."
)


def with_shapes(results: dict) -> dict:
    """The rows that say what their models are."""
    return results | {"rows": [row for row in results["rows"] if row.get("student_shape")]}


def prediction_sentence(results: dict) -> str:
    """How far the planner is off on steps that it has not seen; empty where there are too few."""
    errors = [case["error"] for case in leave_one_out(with_shapes(results))]
    if not errors:
        return ""
    return (
        f"The planner (`bench/plan.py`), given the shares of the others, predicts each of these steps within {max(errors):.1%}, "
        f"half of them within {median(errors):.1%}."
    )


def floor_shares_table(results: dict) -> str:
    """Rows of ours that were timed and say what their models are, in their order; empty where there are none."""
    rates, rows = rates_of(results), []
    for row in measured_cases(with_shapes(results)):
        student, teacher, setting = case_of(row)
        floors = step_floor(student, teacher, setting, rates)
        reached = shares(row["stage_s"], floors)
        total_ms = 1e3 * sum(floor.seconds for floor in floors.values())
        cells = [f"{reached[stage]:.1%} ({floors[stage].bound})" for stage in STAGES]
        rows.append(
            (
                row["pair"],
                str(row["batch_size"]),
                str(row["horizon"]),
                f"{total_ms:.3g}",
                *cells,
                f"{reached['total']:.1%}",
            )
        )
    if not rows:
        return ""
    names = [stage.replace("_", " ") for stage in STAGES]
    return markdown(("pair", "rows", "horizon", "floor ms", *names, "step"), rows)
