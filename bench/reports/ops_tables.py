"""Short tables of a result file of the ops for docs/benchmarks.md: a line for each row of ours, the others beside it.

Every figure of every row is in the longer tables of ops_report.py, beside the result file.
"""

from bench.cases.comparison import VALUES, largest_gradient_error
from bench.reports.markdown_tables import markdown
from bench.reports.row_keys import groups, is_ours, milliseconds

HEADINGS = (
    "setting",
    "ours",
    "{unit}",
    "p10 to p90",
    "{bound}",
    "error",
    "peak {memory}",
    "others: {unit} (x ours, error)",
)
SIZES = ("B", "N", "V", "D", "K")
LEGEND = (
    "A line is one of our ways to compute a setting; the others stand beside the first, with their time over that of our "
    "fastest. Error: of the gradient where there is one, else of the value, relative in norm to float64; of a sampler's "
    "log-probs in nats. Peak memory is beyond the inputs, with results."
)
BOUNDS = {
    "share_of_copy": "of copy rate",
    "ratio_to_products": "x bare products",
}


def case_table(rows: list[dict]) -> str:
    """The table of one case."""
    is_sampler = all("sampler" in row for row in rows)
    unit, memory, scale = ("us", "MB", 1e3) if is_sampler else ("ms", "GB", 1.0)
    bounds = [heading for key, heading in BOUNDS.items() if any(key in row for row in rows)]
    headings = [
        heading.format(unit=unit, memory=memory, bound=" or ".join(bounds) or "of ceiling") for heading in HEADINGS
    ]
    lines = []
    for group in groups(rows):
        ours = [row for row in group if is_ours(row)]
        others = [row for row in group if not is_ours(row)]
        told = others_cell(ours, others, scale)
        start = setting_cell(group[0], rows)
        for row in ours:
            lines.append([start, row["implementation"], *time_cells(row, scale), told])
            start = told = ""
        if not ours:
            lines.append([start, *("",) * (len(HEADINGS) - 2), told])
    return markdown(headings, [[cell.replace("|", "/") for cell in line] for line in lines], "llrrrrrl")


def setting_cell(row: dict, rows: list[dict]) -> str:
    """What is measured, with the sizes that differ within the case."""
    parts = [row.get("divergence") or row["op"]] if "sampler" not in row else [row["sampler"], row["logits"]]
    parts += [row["dtype"]]
    if row["pass"] != "forward" or any(other["pass"] != "forward" for other in rows):
        parts += [row["pass"]]
    parts += [f"{name} {row[name]}" for name in SIZES if name in row and len({r.get(name) for r in rows}) > 1]
    if "gap" in row and len({other["gap"] for other in rows if "gap" in other}) > 1:
        parts += [f"mean {row['mean_divergence']:.2g} nats"]
    if row.get("d_weight") is False:
        parts += ["head frozen"]
    return ", ".join(parts)


def time_cells(row: dict, scale: float) -> tuple[str, ...]:
    """`scale` makes the unit of time from milliseconds, and that of memory from GB."""
    if row["status"] != "timed":
        return f"**{row['status']}**", "", "", "", ""
    bound = f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else f"{row['ratio_to_products']:.3f}"
    peak_bytes = row["peak_bytes"]
    return (
        number(scale * row["median_ms"]),
        f"{number(scale * row['p10_ms'])} to {number(scale * row['p90_ms'])}",
        bound,
        error_of(row),
        "" if peak_bytes is None else f"{1e-9 * scale * peak_bytes:.2f}",
    )


def others_cell(ours: list[dict], others: list[dict], scale: float) -> str:
    """The timed ones, fastest first, then those that were not."""
    timed_ours = [milliseconds(row) for row in ours if row["status"] == "timed"]
    parts = []
    for row in sorted((row for row in others if row["status"] == "timed"), key=milliseconds):
        beside = [f"{milliseconds(row) / min(timed_ours):.2f} x"] if timed_ours else []
        beside += [error_of(row)] if error_of(row) else []
        parts.append(f"{row['implementation']} {number(scale * milliseconds(row))} ({', '.join(beside)})")
    for status in dict.fromkeys(row["status"] for row in others if row["status"] != "timed"):
        parts.append(f"{status}: {' / '.join(row['implementation'] for row in others if row['status'] == status)}")
    return "; ".join(parts)


def number(value: float) -> str:
    """Four digits, and none after the point that mean nothing."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def error_of(row: dict) -> str:
    errors = row.get("errors", {})
    error = largest_gradient_error(row)
    if error != error:  # NaN: there is no gradient
        error = next((errors[name] for name in VALUES if name in errors), None)
    return "" if error is None else f"{error:.1e}"


def tables(results: dict, cases: tuple[str, ...]) -> dict[str, str]:
    """The tables of those of `cases` that the file has rows of."""
    by_case = {case: [row for row in results["rows"] if row["case"] == case] for case in cases}
    return {case: case_table(rows) for case, rows in by_case.items() if rows}
