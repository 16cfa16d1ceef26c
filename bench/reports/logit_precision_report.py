"""The results of `logit_precision.py` as tables and as a figure."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from bench.reports.markdown_tables import markdown
from esr_distill.complete_files import complete_file

BUDGET = 2e-3
SOURCE_BLOCKS = ("logit-precision-drawn", "logit-precision-model")
SHOWN_NOISE = (0.5, 0.05, 0.01)  # in the tables that have no room for all
DIVERGENCES = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "jsd_0.5": "JSD(0.5)",
}
# (quantity, storage): its name in the tables and in the figure, and how its line is drawn.
LINES = {
    ("logits", "bfloat16"): ("logits in bfloat16 (2 B)", {"color": "#b2182b", "marker": "o"}),
    ("logits", "float16"): ("logits in float16 (2 B)", {"color": "#d6791e", "marker": "^"}),
    ("logits", "tile_relative_apart"): ("TRF16, each side apart (2.03 B)", {"color": "#4393c3", "marker": "v"}),
    ("logits", "tile_relative"): ("TRF16 (2.03 B)", {"color": "#0b4d8a", "marker": "s"}),
    ("logits", "float32"): ("logits in float32 (4 B)", {"color": "#222222", "marker": "D"}),
    ("logits_gradient", "bfloat16"): ("d(logits) in bfloat16 (2 B)", {"color": "#6b6b6b", "linestyle": (0, (5, 2))}),
    ("logits_gradient", "row_scaled_float16"): (
        "d(logits) in row-scaled float16 (2 B)",
        {"color": "#6b6b6b", "linestyle": (0, (1, 1.5))},
    ),
}
PIPELINES = {
    "exact": "float64, float64",
    "bfloat16": "float64, bfloat16",
    "row_scaled_float16": "float64, row-scaled float16",
    "float32_then_row_scaled_float16": "float32, row-scaled float16",
    "tile_relative_then_row_scaled_float16": "TRF16, row-scaled float16",
    "tile_relative_apart_then_row_scaled_float16": "TRF16 each side apart, row-scaled float16",
    "bfloat16_then_bfloat16": "bfloat16, bfloat16",
}
WAYS = {"direct": "computed directly", "minus_the_others": "minus the sum of the others"}


def scientific(number: float) -> str:
    """Two digits: 5.4e-4."""
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def tables(results: dict) -> dict[str, str]:
    """Every table by the name of its block in docs/numerics.md; that of the model only where one was measured."""
    sources = results["sources"].values()
    by_storage = {name: storage_table(source["levels"]) for name, source in zip(SOURCE_BLOCKS, sources, strict=False)}
    return by_storage | {
        "logit-precision-divergences": divergence_table(results),
        "shared-tiles": sharing_table(results),
        "hidden-gradient": hidden_gradient_table(results),
        "confident-rows": confident_table(results),
    }


def storage_table(levels: list[dict]) -> str:
    """Error of the gradient of reverse KL, a row per storage and a column per noise level, for one source of rows."""
    of_reverse_kl = [level["divergences"]["reverse_kl"] for level in levels]
    rows = [["reverse KL (nats)", *(scientific(level["value"]) for level in of_reverse_kl)]]
    for (quantity, storage), (label, _) in LINES.items():
        rows.append([label, *(scientific(level[quantity][storage]) for level in of_reverse_kl)])
    return markdown(["error of d(logits)", *(f"noise {level['noise']:g}" for level in levels)], rows)


def shown_levels(results: dict) -> list[tuple[str, dict]]:
    """(heading, level) of the levels of every source that are in SHOWN_NOISE, or of all when none is."""
    pairs = [
        (f"{name}, noise {level['noise']:g}", level)
        for name, source in results["sources"].items()
        for level in source["levels"]
    ]
    return [(heading, level) for heading, level in pairs if level["noise"] in SHOWN_NOISE] or pairs


def divergence_table(results: dict) -> str:
    """Error of d(logits) by divergence: a row per storage, a column per source and divergence, at one noise level."""
    noise = min(results["settings"]["noise"], key=lambda noise: abs(noise - 0.05))
    levels = [
        (f"{name}, {label}", level["divergences"][divergence])
        for name, source in results["sources"].items()
        for level in source["levels"]
        if level["noise"] == noise
        for divergence, label in DIVERGENCES.items()
    ]
    rows = [
        [label, *(scientific(level[quantity][storage]) for _, level in levels)]
        for (quantity, storage), (label, _) in LINES.items()
    ]
    return markdown([f"noise {noise:g}", *(heading for heading, _ in levels)], rows)


def hidden_gradient_table(results: dict) -> str:
    """Error of the bfloat16 gradient of the hidden states under reverse KL, a row per pair of storages."""
    levels = shown_levels(results)
    rows = [
        [label, *(scientific(level["divergences"]["reverse_kl"]["hidden_gradient"][pipeline]) for _, level in levels)]
        for pipeline, label in PIPELINES.items()
    ]
    return markdown(["logits, d(logits)", *(heading for heading, _ in levels)], rows)


def sharing_table(results: dict) -> str:
    """How often a likely token has a likelier one in its tile, a row per source."""
    rows = [
        [
            f"{name}, {source['vocab_size']:,} ids",
            f"{source['likely_tokens_of_a_row']:.1f}",
            f"{100 * source['share_beside_a_likelier']:.0f} %",
        ]
        for name, source in results["sources"].items()
    ]
    return markdown(["rows", "tokens with p > 1e-3 in a row", "of these beside a likelier one in their tile"], rows)


def confident_table(results: dict) -> str:
    """Worst error over rows and divergences of the likeliest token's gradient, a column per confidence."""
    headings = ["gradient of the likeliest token", *(f"p = 1 - {row['remainder']:.0e}" for row in results["confident"])]
    rows = [
        [label, *(scientific(max(d[way] for d in row["divergences"].values())) for row in results["confident"])]
        for way, label in WAYS.items()
    ]
    return markdown([heading.replace("e-0", "e-") for heading in headings], rows)


def write_figure(results: dict, path: Path) -> None:
    """Gradient error against reverse KL, a panel per source: lines for reverse KL, bands over the three divergences."""
    sources = results["sources"]
    figure, panels = plt.subplots(
        1,
        len(sources),
        figsize=(3.2 + 5.2 * len(sources), 6.2),
        sharex=True,
        sharey=True,
        squeeze=False,
        constrained_layout=True,
    )
    for axes, (name, source) in zip(panels[0], sources.items(), strict=True):
        draw_source(axes, source["levels"])
        title = "drawn logits" if name == "drawn" else name
        axes.set_title(f"{title}, {source['vocab_size']:,} ids", loc="left", fontsize=11)
    panels[0][0].invert_xaxis()
    panels[0][0].set_ylabel("error of d(logits) in norm, relative to float64")
    draw_labels(panels[0][-1], source["levels"])
    settings = results["settings"]
    figure.suptitle(
        "Plain 16-bit logits lose the gradient as the student approaches its teacher", x=0.01, ha="left", fontsize=13
    )
    low, high = min(settings["noise"]), max(settings["noise"])
    figure.supxlabel(
        f"{settings['rows']} rows; student = teacher + Gaussian noise of {low:g} to {high:g}. TRF16: float16 of the "
        "difference to the maximum of 128 columns, for the teacher further to the student.\n"
        "Lines: reverse KL. Bands: also forward KL and JSD(0.5), mostly within the line.",
        fontsize=9.5,
        color="#444444",
        x=0.01,
        ha="left",
    )
    with complete_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)


def draw_source(axes: Axes, levels: list[dict]) -> None:
    kl = [level["divergences"]["reverse_kl"]["value"] for level in levels]
    for (quantity, storage), (_, style) in LINES.items():
        errors = [[level["divergences"][name][quantity][storage] for name in DIVERGENCES] for level in levels]
        axes.fill_between(
            kl, *zip(*((min(e), max(e)) for e in errors), strict=True), color=style["color"], alpha=0.2, lw=0
        )
        line = [level["divergences"]["reverse_kl"][quantity][storage] for level in levels]
        axes.plot(kl, line, linewidth=1.8, markersize=5.5, **style)
    axes.axhline(BUDGET, color="black", linewidth=1.2)
    transform = axes.get_yaxis_transform()
    axes.text(0.01, 1.08 * BUDGET, f"budget {BUDGET:.0e}".replace("e-0", "e-"), transform=transform, fontsize=10)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("mean reverse KL between student and teacher (nats)", loc="left")
    plain = FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+00", "").replace("e+0", "e"))
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def draw_labels(axes: Axes, levels: list[dict]) -> None:
    """Name each line at its right end, in the order of their heights and far enough from each other."""
    last = min(levels, key=lambda level: level["divergences"]["reverse_kl"]["value"])["divergences"]["reverse_kl"]
    labels = [(last[quantity][storage], label, style["color"]) for (quantity, storage), (label, style) in LINES.items()]
    below = -math.inf
    for error, label, color in sorted(labels):
        height = max(math.log10(error), below + 0.24)
        axes.annotate(
            label,
            (last["value"], error),
            xytext=(1.05, 10**height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=color,
            fontsize=10,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 5, "shrinkA": 1},
        )
        below = height
