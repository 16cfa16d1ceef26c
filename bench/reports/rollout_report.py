"""The table of a result file of rollouts (D1, D2)."""

from bench.reports.markdown_tables import markdown
from bench.reports.row_keys import setting_of

HEADINGS = (
    "model",
    "rows",
    "threads",
    "implementation",
    "tokens/s",
    "ms a step",
    "of floor",
    "x generate",
    "host waits",
)


def rollout_table(results: dict) -> str:
    """Every way to draw, against `generate` with as many rows and threads; a way that was only checked says what was found."""
    generate = {
        setting_of(row): row["tokens_per_s"]
        for row in results["rows"]
        if row["implementation"] == "generate" and row["status"] == "timed"
    }
    return markdown(HEADINGS, [cells(row, generate.get(setting_of(row))) for row in results["rows"]], "lrrlrrrrr")


def caption(results: dict) -> str:
    """What is the same in all rows, and what the columns say."""
    kinds = {(row["prompt"], row["is_ragged"], row["horizon"], row["dtype"]) for row in results["rows"]}
    told = [
        f"{'ragged prompts of up to' if is_ragged else 'prompts of'} {prompt} tokens, horizon {horizon}, {dtype}"
        for prompt, is_ragged, horizon, dtype in sorted(kinds)
    ]
    return (
        f"Rollouts: {'; '.join(told)}. A step is one token of all rows; its floor reads weights and cache once at "
        f"{results['copy_gb_per_s']:,.0f} GB/s, the copy rate in this run."
    )


def cells(row: dict, generate: float | None) -> tuple[str, ...]:
    """One row as text; columns as in HEADINGS."""
    start = row["model"], str(row["batch_size"]), str(row["threads"])
    if row["status"] == "checked":
        equal, error = row["rows_equal_to_generate"], row["largest_logprob_error"]
        name = f"{row['implementation']}: checked, {equal:.0%} of the rows as generate, log-probs within {error:.1e}"
        return *start, name, *("",) * 5
    if row["status"] != "timed":
        return *start, f"{row['implementation']}: {row['status']}", *("",) * 5
    return (
        *start,
        row["implementation"],
        f"{row['tokens_per_s']:,.0f}",
        f"{row['ms_per_step']:.2f}",
        f"{row['share_of_floor']:.0%}",
        "" if generate is None else f"{row['tokens_per_s'] / generate:.2f}",
        "" if row["host_syncs"] is None else str(row["host_syncs"]),
    )
