"""The ops of a result file against what their machine can do: operations a byte across, the share of a measured ceiling up.

Left, what is given logits, bound by memory: its share of the copy rate. Right, what starts from hidden states: its share of the
rate of a square bfloat16 product, below a roof that few FLOP a byte lower to what the copy rate allows. Bytes and FLOP are
those that no schedule avoids, so that two implementations of one setting stand above each other.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MultipleLocator, NullLocator

from bench.reports.row_keys import is_ours
from esr_distill.complete_files import complete_file

# Operations that the formula writes for each logit (of both models, where there are two), an exponential as one: forward, and
# with backward. They place a point across, not up.
OPERATIONS = {"token_divergence": (9, 14), "prefix_logprobs": (3, 6), "sample_tokens": (3, 3)}
COLORS = {
    "token_divergence": "#0b4d8a",
    "prefix_logprobs": "#1b9e77",
    "sample_tokens": "#b2182b",
    "linear_divergence": "#0b4d8a",
    "linear_prefix_logprobs": "#1b9e77",
    "topk_divergence": "#d6791e",
    "head and sample_tokens": "#b2182b",
}
OTHER_COLOR = "#7a3f98"  # of an op that has none of its own
RIDGE_POINTS = 200  # of the drawn roof
OTHERS = {"PyTorch": "s", "peers": "^"}
PYTORCH = (
    "eager",
    "compile",
    "auto-chunker",
    "rows of the prefix",
    "whole sequences",
    "torch.",
    "exponential race",
    "Hugging Face",
    "one sort",
)
SAME_COLUMN = 0.022  # of the width of a panel
LABEL_HEIGHT = 0.38  # of the panel above its points
BFLOAT16_BYTES = 2


class Point(NamedTuple):
    intensity: float  # FLOP, or operations, a byte
    share: float  # of the ceiling
    row: dict


def points(results: dict) -> tuple[list[Point], list[Point]]:
    """Of timed rows: bound by memory, and by products."""
    from_logits, from_hidden = [], []
    for row in results["rows"]:
        if row["status"] != "timed" or row["case"] in ("tiles", "slices"):
            continue
        if row["floor_ms"] is None:
            from_logits.append(Point(operations(row) / row["counted_bytes"], row["share_of_copy"], row))
        else:
            rate = results["ceilings"]["square_bfloat16_tflop_per_s"]
            from_hidden.append(Point(row["counted_flop"] / least_bytes(row), row["tflop_per_s"] / rate, row))
    return from_logits, from_hidden


def operations(row: dict) -> int:
    forward, with_backward = OPERATIONS[row["op"]]
    return (with_backward if "backward" in row["pass"] else forward) * row.get("N", row.get("B")) * row["V"]


def least_bytes(row: dict) -> int:
    """Hidden states and heads read once, the gradients that are wanted written once."""
    rows, vocab_size, hidden_size = row.get("N", row.get("B")), row["V"], row["D"]
    values = (rows + vocab_size) * (hidden_size + row.get("E", 0))
    if "backward" in row["pass"]:
        values += rows * hidden_size + (vocab_size * hidden_size if row.get("d_weight") else 0)
    return BFLOAT16_BYTES * values


def kind_of(row: dict) -> str:
    if is_ours(row):
        return "ours"
    return "PyTorch" if row["implementation"].startswith(PYTORCH) else "peers"


def write_figure(results: dict, path: Path) -> None:
    """Both panels as a PNG."""
    from_logits, from_hidden = points(results)
    ceilings = results["ceilings"]
    copy, product = ceilings["copy_gb_per_s"], ceilings["square_bfloat16_tflop_per_s"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6.4), constrained_layout=True)
    left.axhline(1, color="black", linewidth=1)
    draw_panel(left, from_logits)
    left.set_title(f"from logits: share of the copy rate, {copy:,.0f} GB/s", loc="left", fontsize=11)
    left.set_xlabel("operations a byte", loc="left")
    draw_panel(right, from_hidden)
    draw_roof(right, 1e-3 * copy / product)
    right.set_title(
        f"from hidden states: share of a square product's rate, {product:,.0f} TFLOP/s", loc="left", fontsize=11
    )
    right.set_xlabel("FLOP a byte", loc="left")
    machine = results["machine"]
    name = "smoke run: no figure here means anything" if results["is_smoke"] else machine["gpu"] or machine["processor"]
    figure.suptitle(f"{name}: ops against measured ceilings", x=0.01, ha="left", fontsize=13)
    with complete_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)


def draw_panel(axes: Axes, found: list[Point]) -> None:
    for point in sorted(found, key=lambda point: is_ours(point.row)):  # ours on top
        color, kind = COLORS.get(point.row["op"], OTHER_COLOR), kind_of(point.row)
        style = (
            {"marker": "o", "color": color} if kind == "ours" else {"marker": OTHERS[kind], "mfc": "none", "mec": color}
        )
        axes.plot(point.intensity, point.share, linestyle="none", markersize=6, alpha=0.75, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.yaxis.set_major_locator(MultipleLocator(0.2))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if not found:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#666666")
        return
    intensities = [point.intensity for point in found]
    axes.set_xlim(min(intensities) / 1.5, max(intensities) * 1.5)
    is_wide = max(intensities) > 1000 * min(intensities)
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, max(1.0, *(point.share for point in found)) + LABEL_HEIGHT)
    label_columns(axes, found)
    draw_legend(axes, found)


def draw_roof(axes: Axes, share_of_a_flop_a_byte: float) -> None:
    """What memory and products allow at each place: the copy rate times FLOP a byte, and at most the products' rate."""
    low, high = axes.get_xlim()
    places = [low * (high / low) ** (i / RIDGE_POINTS) for i in range(RIDGE_POINTS + 1)]
    axes.plot(places, [min(1, share_of_a_flop_a_byte * place) for place in places], color="black", linewidth=1)


def label_columns(axes: Axes, found: list[Point]) -> None:
    """Above the ceiling the cases that stand below, a label for all that share a column."""
    low, high = axes.get_xlim()
    widest = (high / low) ** SAME_COLUMN
    columns: list[list[Point]] = []
    for point in sorted(found, key=lambda point: point.intensity):
        if columns and point.intensity < widest * columns[-1][0].intensity:
            columns[-1].append(point)
        else:
            columns.append([point])
    for column in columns:
        cases = " ".join(sorted({point.row["case"] for point in column}))
        middle = (column[0].intensity * column[-1].intensity) ** 0.5
        height = max(1.0, *(point.share for point in column)) + 0.03
        axes.text(middle, height, cases, fontsize=8, rotation=90, ha="center", va="bottom")


def draw_legend(axes: Axes, found: list[Point]) -> None:
    ops = dict.fromkeys(point.row["op"] for point in found)
    entries = [Line2D([], [], marker="o", linestyle="none", color=COLORS.get(op, OTHER_COLOR), label=op) for op in ops]
    entries += [Line2D([], [], marker="o", linestyle="none", color="#444444", label="ours")]
    entries += [
        Line2D([], [], marker=marker, linestyle="none", mfc="none", mec="#444444", label=kind)
        for kind, marker in OTHERS.items()
        if any(kind_of(point.row) == kind for point in found)
    ]
    axes.legend(handles=entries, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=4, frameon=False)
