"""Tables and the figure of a result file of bench/bench_scaling.py.

python -m bench.reports.scaling_report bench/results/nvidia-h200/scaling.json
"""

import argparse
import math
import sys
from pathlib import Path

from bench.reports.markdown_tables import markdown
from esr_distill.complete_files import complete_file, read_json, write_text

TITLES = {
    "tokens": "divergence against trained tokens",
    "vocabulary": "divergence against vocabulary",
    "batch": "rollouts against batch",
    "horizon": "rollouts against horizon",
}
X_LABELS = {
    "tokens": "trained tokens N",
    "vocabulary": "ids in the vocabulary V",
    "batch": "rollouts in a batch B",
    "horizon": "tokens of a rollout K (horizon)",
}
SPREADS = {"tokens": "p10 to p90", "vocabulary": "p10 to p90", "batch": "least to most", "horizon": "least to most"}
MEASURED_COLOR, FLOOR_COLOR = "#1f5fa8", "#b0493a"


def axes_of(results: dict) -> dict[str, list[dict]]:
    """Rows by axis, in the order of the file."""
    return {
        axis: [row for row in results["rows"] if row["axis"] == axis]
        for axis in dict.fromkeys(row["axis"] for row in results["rows"])
    }


def fixed_sizes(rows: list[dict]) -> str:
    """What is the same in all rows of an axis: "V 8192, D 256, E 512, float32"."""
    names = [name for name in ("N", "V", "D", "E", "model", "B", "P", "K") if name in rows[0]]
    same = [name for name in names if len({row[name] for row in rows}) == 1]
    words = [rows[0][name] if name == "model" else f"{name} {rows[0][name]}" for name in same]
    return ", ".join([rows[0]["implementation"], *words, rows[0]["dtype"]])


def slope_text(slope: float | None) -> str:
    return "none" if slope is None else f"{slope:.2f}"


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def axis_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if row["status"] != "timed":
            lines.append((f"{row['size']:,}", f"{row['status']}: {row['message'].splitlines()[0]}"[:120], *[""] * 4))
            continue
        spread = f"{milliseconds(row['low_s'])} to {milliseconds(row['high_s'])}"
        share = f"{row['floor_s'] / row['median_s']:.1%}"
        floor = f"{milliseconds(row['floor_s'])} ({row['floor_bound']})"
        lines.append((f"{row['size']:,}", milliseconds(row["median_s"]), spread, floor, share, str(row["repetitions"])))
    headings = ("size", "median ms", SPREADS[rows[0]["axis"]], "floor ms", "share of the floor", "n")
    return markdown(headings, lines)


def tables(results: dict) -> dict[str, str]:
    """Markdown by name: the slopes of all axes, then one table for each, with what was fixed."""
    axes, slopes = axes_of(results), results["slopes"]
    lines = [
        (
            TITLES[axis],
            slope_text(slopes[axis]["measured"]),
            slope_text(slopes[axis]["floor"]),
            str(slopes[axis]["points"]),
        )
        for axis in axes
    ]
    headings = ("cost", "slope in log-log", "slope of the floor", "points")
    made = {"scaling-slopes": markdown(headings, lines)}
    for axis, rows in axes.items():
        made[f"scaling-{axis}"] = f"{TITLES[axis].capitalize()} ({fixed_sizes(rows)}):\n\n{axis_table(rows)}"
    return made


def caption(results: dict) -> str:
    machine, rates = results["machine"], results["rates"]
    return (
        f"{rates['name']}, copy {1e-9 * rates['copy_bytes_per_s']:,.3g} GB/s, "
        f"products {1e-12 * rates['flop_per_s']:,.3g} TFLOP/s, commit {machine['commit']}"
    )


def fitted_line(x: list[float], y: list[float], slope: float) -> list[float]:
    """The line of that slope through the mean of the logarithms, at each x."""
    offset = sum(math.log(value) for value in y) / len(y) - slope * sum(math.log(value) for value in x) / len(x)
    return [math.exp(offset + slope * math.log(value)) for value in x]


def draw_axis(axes, axis: str, rows: list[dict], slopes: dict) -> None:
    """Medians with their spread, the fitted line, and the floor."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    timed = [row for row in rows if row["status"] == "timed"]
    axes.set_title(f"{TITLES[axis].capitalize()}\n{fixed_sizes(rows)}", fontsize=9)
    if not timed:
        axes.text(0.5, 0.5, "no point was timed", ha="center", transform=axes.transAxes)
        return
    x = [row["size"] for row in timed]
    median, floor = [1e3 * row["median_s"] for row in timed], [1e3 * row["floor_s"] for row in timed]
    below = [1e3 * (row["median_s"] - row["low_s"]) for row in timed]
    above = [1e3 * (row["high_s"] - row["median_s"]) for row in timed]
    axes.errorbar(
        x,
        median,
        yerr=(below, above),
        fmt="o",
        color=MEASURED_COLOR,
        markersize=5,
        capsize=3,
        linewidth=1,
        label=f"measured: median, {SPREADS[axis]}",
    )
    if slopes["measured"] is not None:
        line = fitted_line(x, median, slopes["measured"])
        axes.plot(x, line, color=MEASURED_COLOR, linewidth=1.2, label=f"fit, slope {slope_text(slopes['measured'])}")
    name = f"floor, slope {slope_text(slopes['floor'])}"
    axes.plot(x, floor, color=FLOOR_COLOR, linestyle="--", marker="s", markersize=3, linewidth=1.2, label=name)
    axes.set(xscale="log", yscale="log", xlabel=X_LABELS[axis], ylabel="milliseconds")
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(FixedLocator(x))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(which="major", linewidth=0.4, alpha=0.5)
    axes.legend(fontsize=8)


def write_figure(results: dict, path: Path) -> None:
    """One panel for each axis, both scales logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_axis = axes_of(results)
    num_columns = min(2, len(by_axis))
    num_rows = -(-len(by_axis) // num_columns)
    figure, panels = plt.subplots(num_rows, num_columns, figsize=(6 * num_columns, 4.3 * num_rows), squeeze=False)
    for panel, (axis, rows) in zip(panels.flat, by_axis.items(), strict=False):
        draw_axis(panel, axis, rows, results["slopes"][axis])
    for panel in list(panels.flat)[len(by_axis) :]:
        panel.set_visible(False)
    title = "smoke run: no figure here means anything" if results["is_smoke"] else caption(results)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    with complete_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a result file, e.g. bench/results/nvidia-h200/scaling.json")
    path = parser.parse_args(argv).result
    results = read_json(path)
    write_text(path.with_suffix(".md"), "\n\n".join(["# Scaling", caption(results), *tables(results).values()]) + "\n")
    write_figure(results, path.with_suffix(".png"))
    print(path.with_suffix(".md"), path.with_suffix(".png"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
