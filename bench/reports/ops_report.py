"""Tables and figures of a result file of bench/bench_ops.py, also for one that was brought from elsewhere.

python -m bench.reports.ops_report bench/results/nvidia-h200/ops.json
"""

import argparse
import json
import math
import sys
from pathlib import Path

from bench.cases.comparison import VALUES, derived, largest_gradient_error
from bench.reports.sampler_report import EXPLANATION, sampler_lines
from esr_distill.complete_files import complete_file, write_text

COLUMNS = (
    "setting",
    "implementation",
    "median ms",
    "p10 to p90",
    "GB/s",
    "of copy rate",
    "to products",
    "TFLOP/s",
    "value error",
    "gradient error",
    "peak GB",
    "host ms",
    "host waits",
    "first call s",
    "n",
)
SIZES = ("B", "N", "V", "D", "T", "K")


def measured(row: dict) -> str:
    """The divergence or the sampler's setting, or the op where there is neither."""
    if "sampler" in row:
        return f"{row['sampler']}, {row['logits']}"
    return row.get("divergence") or row["op"]


def table_row(row: dict, copy_gb_per_s: float) -> tuple[str, ...]:
    """One row of results as text; columns as in COLUMNS."""
    sizes = [f"{key} {row[key]}" for key in SIZES if key in row]
    setting = ", ".join([measured(row), row["dtype"], row["pass"], *sizes])
    if row["case"] == "L7":
        setting += f", mean KL {row['mean_divergence']:.2g}"
    if row.get("d_weight") is False:
        setting += ", head frozen"
    name = row["implementation"]
    if "schedule" in row:
        name += f" ({row['storage']}, {row['schedule']}, chunk {row['chunk_rows']})"
    if row["status"] != "timed":
        message = row["message"].splitlines()
        return setting, name, ": ".join([row["status"], *message[:1]])[:120], *("",) * (len(COLUMNS) - 3)
    figures = derived(row, copy_gb_per_s)

    def text(key: str, pattern: str, scale: float = 1.0) -> str:
        value = figures.get(key, row.get(key))
        return "" if value is None else pattern.format(scale * value)

    value_errors = [error for name, error in row["errors"].items() if name in VALUES]
    gradient_error = largest_gradient_error(row)
    return (
        setting,
        name,
        text("median_ms", "{:.3f}"),
        text("p10_ms", "{:.3f} to ") + text("p90_ms", "{:.3f}"),
        text("gb_per_s", "{:.0f}"),
        text("share_of_copy", "{:.0%}") + text("schedule_share_of_copy", " ({:.0%})"),
        text("ratio_to_products", "{:.3f}"),
        text("tflop_per_s", "{:.0f}"),
        "".join(f"{error:.1e}" for error in value_errors),
        "" if math.isnan(gradient_error) else f"{gradient_error:.1e}",
        text("peak_bytes", "{:.2f}", 1e-9),
        text("host_ms", "{:.2f}"),
        text("host_syncs", "{:.0f}"),
        text("first_call_s", "{:.1f}"),
        text("repetitions", "{:.0f}"),
    )


def markdown(results: dict) -> str:
    """Every case as a table, with what it was measured on and against."""
    machine, ceilings = results["machine"], results["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = ["# Fused ops: measured", ""]
    if results["is_smoke"]:
        lines += ["**Smoke run in Triton's interpreter on tiny shapes: no figure here means anything.**", ""]
    lines += [
        f"{machine['gpu'] or machine['processor']}, Python {machine['python']}, {versions}, commit {machine['commit']}.",
        "" if results["is_finished"] else "**The run was not finished: later cases are missing.**",
        f"Copy {ceilings['copy_gb_per_s']:.0f} GB/s (read plus written); square bfloat16 product "
        f"{ceilings['square_bfloat16_tflop_per_s']:.0f} TFLOP/s.",
        "",
        "Shares of the copy rate are by the bytes that no schedule avoids, in brackets by those of our own schedule. Ratios "
        "are to the sum of the bare matrix products of the minimal schedule. Errors are in norm, against float64; of the "
        "gradients the largest. Host ms is what it takes to enqueue a call. Peak memory is beyond the inputs, with results.",
        "",
    ]
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        lines += [f"## {case}", ""]
        if "sampler" in rows[0]:
            lines += [] if EXPLANATION in lines else [EXPLANATION, ""]
            lines += sampler_lines(rows, ceilings["copy_gb_per_s"])
            continue
        lines += ["| " + " | ".join(COLUMNS) + " |"]
        lines += ["|" + " --- |" * 2 + " ---: |" * (len(COLUMNS) - 2)]
        cells = [table_row(row, ceilings["copy_gb_per_s"]) for row in rows]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in cells] + [""]
        lines += horizon_lines(rows)
    lines += ["## Bare matrix products", "", "| product | ms |", "| --- | ---: |"]
    lines += [f"| {name} | {milliseconds:.3f} |" for name, milliseconds in ceilings["bare_products_ms"].items()]
    return "\n".join(lines) + "\n"


def horizon_lines(rows: list[dict]) -> list[str]:
    """What our prefix takes of the time of all rows, for the rows of one case that have a horizon."""
    timed = [row for row in rows if "horizon" in row and row["status"] == "timed"]
    lines = []
    for short in (row for row in timed if row["is_ours"]):
        for full in (row for row in timed if row["op"] == short["op"] and row["horizon"] > short["horizon"]):
            share, rows_share = (short[key] / full[key] for key in ("median_ms", "N"))
            lines.append(
                f"- {short['op']}: {short['implementation']} takes {share:.4f} of the time of {full['implementation']}, "
                f"on {rows_share:.4f} of its rows."
            )
    return [*lines, ""] if lines else []


def accuracy_rows(results: dict) -> list[dict]:
    return [row for row in results["rows"] if row["case"] == "L7" and row["status"] == "timed"]


def write_figure(results: dict, path: Path) -> None:
    """Gradient error against time, one line per implementation through its points from far apart to nearly converged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = accuracy_rows(results)
    gaps = sorted({row["gap"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(figsize=(9.5, 5.2), constrained_layout=True)
    for name in dict.fromkeys(row["implementation"] for row in rows):
        of_name = [row for row in rows if row["implementation"] == name]
        x, y = [row["median_ms"] for row in of_name], [largest_gradient_error(row) for row in of_name]
        (line,) = axes.plot(x, y, linewidth=1, label=name)
        # A time hardly depends on the gap, so that points of the exact ones lie on each other: small ones are on top.
        sizes = [150 / (1 + gaps.index(row["gap"])) ** 1.5 for row in of_name]
        axes.scatter(x, y, s=sizes, color=line.get_color(), edgecolors="white", linewidths=0.6, zorder=3)
    axes.axhline(2e-3, color="gray", linestyle=":", linewidth=1)
    axes.text(
        0.995, 2.1e-3, "budget 2e-3", transform=axes.get_yaxis_transform(), ha="right", fontsize=8, color="#555555"
    )
    machine = results["machine"]
    name = "smoke run: no figure here means anything" if results["is_smoke"] else machine["gpu"] or machine["processor"]
    axes.set(
        xlabel="time of forward and backward (ms)",
        ylabel="error of the gradient in norm, against float64",
        yscale="log",
    )
    axes.set_title(f"{name}: L7", loc="left")
    axes.set_xlim(left=0)
    nats = [f"{row['mean_divergence']:.1g}" for gap in (gaps[0], gaps[-1]) for row in rows if row["gap"] == gap]
    title = f"mean reverse KL from {nats[0]} nats (large\npoints) to {nats[-1]} (small ones)"
    axes.legend(fontsize=8, title=title, title_fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with complete_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    plt.close(figure)


def write_report(results: dict, path: Path) -> list[Path]:
    """Tables beside the result file `path`, and the figure where L7 was measured; what was written."""
    written = [path.with_suffix(".md")]
    write_text(written[0], markdown(results))
    if accuracy_rows(results):
        written.append(path.with_name(f"{path.stem}-accuracy.png"))
        write_figure(results, written[1])
    return written


def write_all(results: dict, path: Path) -> list[Path]:
    """What `write_report` writes, and the roofline where something was timed."""
    from bench.reports import roofline  # a benchmark writes its report where there may be no matplotlib

    written = write_report(results, path)
    if any(roofline.points(results)):
        written.append(path.with_name(f"{path.stem}-roofline.png"))
        roofline.write_figure(results, written[-1])
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a result file, e.g. bench/results/nvidia-h200/ops.json")
    path = parser.parse_args(argv).result
    print(*write_all(json.loads(path.read_text(encoding="utf-8")), path), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
