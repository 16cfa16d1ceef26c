"""The tables of the sampler: C1 to C3 in microseconds with what follows from them, and the one of a CPU."""

from bench.cases.comparison import derived
from bench.cases.sampler_inputs import LM_LIKE
from bench.reports.markdown_tables import markdown
from bench.reports.row_keys import setting_of

SAMPLER_COLUMNS = (
    "logits",
    "sampler",
    "implementation",
    "log-probs",
    "median us",
    "p10 to p90",
    "GB/s",
    "of copy rate",
    "log-prob error",
    "peak MB",
    "host us",
    "host waits",
    "captured",
    "first call s",
    "n",
)
NUM_TEXT_COLUMNS = 4
EXPLANATION = (
    "Time of a call, as one of the several that a sample takes together: captured in one CUDA graph, or enqueued one after the "
    "other. Host us is what one call by itself takes to enqueue. Logits are read again and again where they fit in the cache "
    "(1 input), else two batches take turns. Ours returns both log-probs, the next ids and the stop flags. Errors of log-probs "
    "are the largest, in nats, against float64."
)


def sampler_lines(rows: list[dict], copy_gb_per_s: float) -> list[str]:
    """The table of one case and the ratios below it, as Markdown: to LM-like logits where there are others, else to others."""
    lines = ["| " + " | ".join(SAMPLER_COLUMNS) + " |"]
    lines += ["|" + " --- |" * NUM_TEXT_COLUMNS + " ---: |" * (len(SAMPLER_COLUMNS) - NUM_TEXT_COLUMNS)]
    cells = [sampler_row(row, copy_gb_per_s) for row in rows]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in cells]
    is_of_logits = any(row["logits"] != LM_LIKE for row in rows)
    return [*lines, "", *(against_lm_like(rows) if is_of_logits else against_others(rows)), ""]


def place(row: dict) -> str:
    count = row["inputs"]
    return f"{row['logits']}, B {row['B']}, {row['dtype']}, {count} input{'s' if count > 1 else ''}"


def sampler_row(row: dict, copy_gb_per_s: float) -> tuple[str, ...]:
    """One row of results as text; columns as in SAMPLER_COLUMNS."""
    start = place(row), row["sampler"], row["implementation"], "yes" if row["has_logprobs"] else "no"
    if row["status"] != "timed":
        message = f"{row['status']}: {row['message'].splitlines()[0]}"[:120]
        return *start, message, *("",) * (len(SAMPLER_COLUMNS) - NUM_TEXT_COLUMNS - 1)
    figures = derived(row, copy_gb_per_s)
    error, peak_bytes, host_syncs = row["errors"].get("logprobs"), row["peak_bytes"], row["host_syncs"]
    return (
        *start,
        f"{1e3 * row['median_ms']:.2f}",
        f"{1e3 * row['p10_ms']:.2f} to {1e3 * row['p90_ms']:.2f}",
        f"{figures['gb_per_s']:.0f}",
        f"{figures['share_of_copy']:.0%}",
        "" if error is None else f"{error:.1e}",
        "" if peak_bytes is None else f"{1e-6 * peak_bytes:.1f}",
        f"{1e3 * row['host_ms']:.1f}",
        "" if host_syncs is None else str(host_syncs),
        f"{row['calls_per_sample']} calls" if row["captured"] else "no",
        f"{row['first_call_s']:.1f}",
        str(row["repetitions"]),
    )


def against_others(rows: list[dict]) -> list[str]:
    """For each timed row of ours the fastest of the others in its setting, PyTorch and peers apart, or that there is none."""
    timed = [row for row in rows if row["status"] == "timed"]
    lines = []
    for ours in (row for row in timed if row["is_ours"]):
        others = [row for row in timed if not row["is_ours"] and setting_of(row) == setting_of(ours)]
        parts = []
        for label, is_peer in (("PyTorch", False), ("peers", True)):
            for has_logprobs in (True, False):
                kind = f"{label} with{'' if has_logprobs else 'out'} log-probs"
                found = [row for row in others if (row["is_peer"], row["has_logprobs"]) == (is_peer, has_logprobs)]
                if found:
                    best = min(found, key=lambda row: row["median_ms"])
                    parts.append(f"{best['median_ms'] / ours['median_ms']:.2f} x by {best['implementation']} ({kind})")
                else:
                    parts.append(f"{kind}: not measured")
        lines.append(f"- {ours['sampler']}, {place(ours)}: the fastest others take " + "; ".join(parts) + ".")
    return lines


def against_lm_like(rows: list[dict]) -> list[str]:
    """What other logits cost an implementation beside LM-like ones."""
    timed = [row for row in rows if row["status"] == "timed"]
    lines = []
    for row in (row for row in timed if row["logits"] != LM_LIKE):
        for usual in timed:
            key = usual["implementation"], usual["logits"], setting_of(usual, without=("logits",))
            if key == (row["implementation"], LM_LIKE, setting_of(row, without=("logits",))):
                ratio = row["median_ms"] / usual["median_ms"]
                lines.append(
                    f"- {row['sampler']}, {place(row)}: {row['implementation']} takes {ratio:.2f} x its LM-like time."
                )
    return lines


def cpu_table(results: dict) -> str:
    """Median and percentiles of every implementation, and how many times ours it takes."""
    ours = {(row["dtype"], row["sampler"]): row.get("median_ms") for row in results["rows"] if row["is_ours"]}
    lines = []
    for row in results["rows"]:
        start = row["dtype"], row["sampler"], row["implementation"]
        if row["status"] != "timed":
            lines.append((*start, row["status"], "", ""))
            continue
        our_ms = ours[start[:2]]
        ratio = f"{row['median_ms'] / our_ms:.1f}" if our_ms else "ours was not timed"
        spread = f"{row['p10_ms']:.1f} to {row['p90_ms']:.1f}" if row["repetitions"] > 1 else ""
        lines.append((*start, f"{row['median_ms']:.1f}", spread, ratio))
    return markdown(("dtype", "sampler", "implementation", "median ms", "p10 to p90", "x ours"), lines, "lllrrr")
