"""Tables and figures of a result file of bench/bench_esr_speedup.py (E1), also for one that was brought from elsewhere.

python -m bench.reports.speedup_report esr_speedup.json          # tables on the screen, figures beside the file
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from bench.floor import STAGES
from bench.reports.floor_report import CAPTION as FLOOR_CAPTION
from bench.reports.floor_report import floor_shares_table, prediction_sentence
from bench.reports.markdown_tables import markdown
from bench.reports.row_keys import groups
from bench.steps.implementations import COMPILED, EAGER, OURS, TRL
from esr_distill.complete_files import complete_file

NOT_MEASURED = "not measured"
SMOKE = "smoke run: no figure here means anything"
ROWS_TABLE, SPEEDUP_TABLE, FLOOR_TABLE = "esr-speedup-rows", "esr-speedup", "esr-speedup-floor"
STAGE_NAMES = {stage: stage.replace("_", " ") for stage in STAGES}
ROW_HEADINGS = (
    "pair",
    "rows",
    "horizon",
    "implementation",
    "s a step",
    "least to most",
    "n",
    "first step s",
    "tokens/s",
    *(f"{name} s" for name in STAGE_NAMES.values()),
    "peak GB",
    "loss",
    "gate: loss, cosine",
)
# How many times as long another step takes: (implementation or None for the row's own, whether of the full rollout), heading.
AGAINST = {
    (None, True): "own full rollout",
    (EAGER, True): f"{EAGER}, full rollout",
    (EAGER, False): f"{EAGER}, same horizon",
    (TRL, False): f"{TRL}, same horizon",
}

SHORT_NAMES = {OURS: "ours", COMPILED: "ours,\ncompiled", EAGER: "generate\n+ eager", TRL: "TRL"}
COLORS = {OURS: "#0b4d8a", COMPILED: "#4393c3", EAGER: "#555555", TRL: "#8c510a"}
STAGE_COLORS = dict(zip(STAGES, ("#0b4d8a", "#4393c3", "#a6cee3", "#d6791e", "#b2182b", "#7b3294"), strict=True))
OTHER, OTHER_COLOR = "between stages", "#bbbbbb"
OURS_AGAINST = {
    (EAGER, False): ("ours against generate + eager, same horizon", {"color": "#b2182b", "linestyle": (0, (5, 2))}),
    (EAGER, True): ("ours against generate + eager, full rollout", {"color": "#7b3294", "linestyle": (0, (5, 2))}),
    (TRL, False): ("ours against TRL, same horizon", {"color": "#d6791e", "linestyle": (0, (5, 2))}),
}


def tables(results: dict) -> dict[str, str]:
    """Markdown by the name of its block: every row, the speed-ups, and what part of the floor is reached where ours was timed,
    each with a line that says what it shows."""
    found = {
        ROWS_TABLE: f"{rows_caption(results)}\n\n{rows_table(results['rows'])}",
        SPEEDUP_TABLE: f"{speedup_caption(results)}\n\n{speedup_table(results['rows'])}",
    }
    reached = floor_shares_table(results)
    return found | ({FLOOR_TABLE: f"{FLOOR_CAPTION} {prediction_sentence(results)}\n\n{reached}"} if reached else {})


def rows_caption(results: dict) -> str:
    rates, rows = results["rates"], results["rows"]
    kinds = sorted({(row["prompt"], row["dtype"], row["threads"]) for row in rows})
    settings = "; ".join(
        f"prompts of {prompt} tokens, weights and AdamW's moments in {dtype}"
        + ("" if results["machine"]["gpu"] else f", {threads} thread{'s' if threads > 1 else ''}")
        for prompt, dtype, threads in kinds
    )
    parts = [f"**{SMOKE[0].upper()}{SMOKE[1:]}.**"] if results["is_smoke"] else []
    parts += (
        [] if results["is_finished"] else ["**The run was not finished: rows are missing or have fewer repetitions.**"]
    )
    parts += [
        f"Whole training steps: {settings}. Every rollout has the whole horizon: no id ends it.",
        "Medians; the first step, which captures graphs, stands apart (the gate before it has compiled the kernels).",
        f"In {EAGER} the output heads are part of the forwards, else of the divergence.",
        "Gate: relative difference of the loss, and cosine of the gradient, to the step by full logits on one given rollout.",
        f"Copy {rates['copy_gb_per_s']:,.0f} GB/s, products {1e-12 * rates['flop_per_s']:,.3g} TFLOP/s in this run.",
    ]
    return " ".join(parts)


def speedup_caption(results: dict) -> str:
    return (
        "Speed-up of a step: how many times as long the other one takes, by medians. A full rollout is the largest horizon of "
        "the run. Lengths are forced, so what a real run saves depends on where its rollouts end."
    )


def rows_table(rows: Iterable[dict]) -> str:
    return markdown(ROW_HEADINGS, map(row_cells, rows), "lrrl" + "r" * (len(ROW_HEADINGS) - 4))


def row_cells(row: dict) -> tuple[str, ...]:
    """One row of results as text; columns as in ROW_HEADINGS."""
    start = row["pair"], str(row["batch_size"]), str(row["horizon"]), row["implementation"]
    if row["status"] != "timed":
        told = f"{row['status']}: {row['message'].splitlines()[0]}"[:160].replace("|", "/")
        return *start, told, *("",) * (len(ROW_HEADINGS) - len(start) - 1)
    peaks, difference = row["stage_peak_bytes"], row["gate_loss_difference"]
    return (
        *start,
        seconds(row["step_s"]),
        f"{seconds(row['least_s'])} to {seconds(row['most_s'])}",
        str(row["repetitions"]),
        seconds(row["first_step_s"]),
        f"{row['tokens_per_s']:,.0f}",
        *(seconds(row["stage_s"][stage]) for stage in STAGES),
        "" if peaks is None else f"{1e-9 * max(peaks.values()):.1f} ({STAGE_NAMES[max(peaks, key=peaks.get)]})",
        f"{row['loss']:.4f}",
        "" if difference is None else f"{difference:.1e}, {row['gate_gradient_cosine']:.6f}",
    )


def seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def settings(rows: list[dict]) -> list[list[dict]]:
    """Rows that differ in horizon and implementation alone, together."""
    return groups(rows, without=("horizon",))


def speedups(row: dict, rows: list[dict]) -> dict[tuple[str | None, bool], float | None]:
    """How many times as long others take, by the keys of AGAINST; None where the other one was not timed.

    Args:
        row: a timed row.
        rows: all of its setting. The full rollout is their largest horizon, whether it was timed or not.
    """
    full = max(other["horizon"] for other in rows)
    timed = {(other["implementation"], other["horizon"]): other for other in rows if other["status"] == "timed"}
    found = {}
    for name, is_full in AGAINST:
        other = timed.get((name or row["implementation"], full if is_full else row["horizon"]))
        found[name, is_full] = None if other is None else other["step_s"] / row["step_s"]
    return found


def speedup_table(rows: list[dict]) -> str:
    headings = ("pair", "rows", "horizon", "implementation", "s a step", *(f"x {name}" for name in AGAINST.values()))
    cells = []
    for setting in settings(rows):
        for row in setting:
            if row["status"] != "timed":
                continue
            ratios = speedups(row, setting).values()
            start = (
                row["pair"],
                str(row["batch_size"]),
                str(row["horizon"]),
                row["implementation"],
                seconds(row["step_s"]),
            )
            cells.append((*start, *(NOT_MEASURED if ratio is None else f"{ratio:.2f}" for ratio in ratios)))
    return markdown(headings, cells, "lrrlr" + "r" * len(AGAINST))


def write_figures(results: dict, folder: Path) -> list[Path]:
    """Speed-up by horizon and stage times, where a row was timed; what was written."""
    shown = [setting for setting in settings(results["rows"]) if any(row["status"] == "timed" for row in setting)]
    if not shown:
        return []
    title = SMOKE if results["is_smoke"] else results["machine"]["gpu"] or results["machine"]["processor"]
    written = []
    for name, draw in (("esr_speedup-horizon.png", draw_speedups), ("esr_speedup-stages.png", draw_stages)):
        figure = draw(shown, title)
        with complete_file(folder / name) as partial:
            figure.savefig(partial, format="png", dpi=130, bbox_inches="tight")
        written.append(folder / name)
    return written


def draw_speedups(settings: list[list[dict]], title: str) -> Figure:
    """A panel for each setting: every implementation against its own full rollout, and ours against the others."""
    columns = min(2, len(settings))
    figure = new_figure(-(-len(settings) // columns), columns, (5.2 * columns, 4.0 * -(-len(settings) // columns)))
    panels = figure.axes
    for axes, rows in zip(panels, settings, strict=False):
        full = max(row["horizon"] for row in rows)
        horizons = sorted({row["horizon"] for row in rows})
        axes.plot(
            horizons,
            [full / horizon for horizon in horizons],
            color="gray",
            linestyle=":",
            label="by response tokens alone",
        )
        timed = [row for row in rows if row["status"] == "timed"]
        for name in dict.fromkeys(row["implementation"] for row in timed):
            label = f"{SHORT_NAMES[name].replace(chr(10), ' ')} against its own full rollout"
            curve(axes, timed, rows, name, (None, True), label, {"color": COLORS[name], "marker": "o"})
        for key, (label, style) in OURS_AGAINST.items():
            curve(axes, timed, rows, OURS, key, label, style | {"marker": "s"})
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="horizon (response tokens)", ylabel="speed-up of a step (times)")
        axes.set_title(setting_name(rows[0]), fontsize=9)
        axes.xaxis.set_major_locator(FixedLocator(horizons))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10, 20, 50, 100, 200]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    finish(figure, panels[len(settings) :], title, columns=1 if len(settings) == 1 else 2)
    return figure


def curve(axes: Axes, timed: list[dict], rows: list[dict], name: str, key: tuple, label: str, style: dict) -> None:
    points = [(row["horizon"], speedups(row, rows)[key]) for row in timed if row["implementation"] == name]
    points = sorted(point for point in points if point[1] is not None)
    if points:
        axes.plot(*zip(*points, strict=True), label=label, markersize=4, linewidth=1.3, **style)


def draw_stages(settings: list[list[dict]], title: str) -> Figure:
    """A row of panels for each setting, a panel for each horizon with a scale of its own, a bar for each implementation."""
    horizons = sorted({row["horizon"] for rows in settings for row in rows})
    figure = new_figure(len(settings), len(horizons), (2.1 * len(horizons) + 0.6, 2.9 * len(settings)))
    panels, unused = figure.axes, []
    for i, rows in enumerate(settings):
        names = list(dict.fromkeys(row["implementation"] for row in rows if row["status"] == "timed"))
        for j, horizon in enumerate(horizons):
            axes = panels[i * len(horizons) + j]
            here = {row["implementation"]: row for row in rows if row["horizon"] == horizon}
            if not any(row["status"] == "timed" for row in here.values()):
                unused.append(axes)
                continue
            for place, name in enumerate(names):
                if name in here and here[name]["status"] == "timed":
                    stacked_bar(axes, place, here[name])
                else:
                    told = here[name]["status"] if name in here else "not measured"
                    axes.text(place, 0, f" {told}", rotation=90, ha="center", va="bottom", fontsize=7)
            axes.set_xticks(range(len(names)), [SHORT_NAMES[name] for name in names], fontsize=7)
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.tick_params(axis="y", labelsize=7)
            axes.set_title(f"horizon {horizon}", fontsize=8)
            if j == 0:
                axes.set_ylabel(f"{setting_name(rows[0], separator=chr(10))}\nseconds a step", fontsize=7)
    finish(figure, unused, title, columns=len(STAGES) + 1)
    return figure


def stacked_bar(axes: Axes, place: int, row: dict) -> None:
    """Stages from below, on top what the step does between them; medians, so their sum is not quite the step's."""
    below = 0.0
    for stage in STAGES:
        seconds = row["stage_s"][stage]
        axes.bar(place, seconds, 0.7, bottom=below, color=STAGE_COLORS[stage], label=STAGE_NAMES[stage])
        below += seconds
    axes.bar(place, row["between_stages_s"], 0.7, bottom=below, color=OTHER_COLOR, label=OTHER)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.08 * (below + row["between_stages_s"])))


def setting_name(row: dict, separator: str = ", ") -> str:
    return f"{row['pair']}{separator}{row['batch_size']} rollouts, {row['dtype']}"


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> Figure:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, _ = plt.subplots(rows, columns, figsize=size, squeeze=False)
    plt.close(figure)  # it is saved by whoever gets it
    return figure


def finish(figure: Figure, unused: list[Axes], title: str, *, columns: int) -> None:
    """One legend for all panels below them, and the title above."""
    for axes in unused:
        axes.set_visible(False)
    found: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.legend(
        found.values(),
        found.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=columns,
        fontsize=8,
        frameon=False,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a result file, e.g. bench/results/nvidia-h200/esr_speedup.json")
    parser.add_argument("--folder", type=Path, help="of the figures; default: that of the file")
    options = parser.parse_args(argv)
    results = json.loads(options.result.read_text(encoding="utf-8"))
    print(*tables(results).values(), sep="\n\n")
    print(*write_figures(results, options.folder or options.result.parent), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
